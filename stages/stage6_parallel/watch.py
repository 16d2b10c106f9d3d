"""Who is alive. A rank that dies or stops would leave the others waiting in a collective for ever.

Every rank has a thread that says so twice a second. It counts ticks of its own in which it hears nothing, and
compares no clocks: when all are stopped together, as Ctrl-Z does, and go on together, nobody was silent.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from subprocess import Popen, TimeoutExpired

import msgspec
import zmq

from stages.interface import EngineFailed

logger = logging.getLogger(__name__)

TICK_S = 0.5
# Ticks of silence that are borne. Loading is long: a library that is loaded holds Python's lock, and stops
# every thread. Rank 0 may be a program of the user's that does so at any time.
LOADING, SERVING, RANK_0 = 1200, 16, 60
_STUCK = 10  # ticks that the main thread gets to leave a step after a rank was lost
_DYING_S = 5.0  # a driver may hold on to a process that was killed


class Report(msgspec.Struct):
    """From a rank to rank 0. Without a `reason` it only says that the rank is alive."""

    rank: int
    reason: str = ""
    refused: bool = False  # the user's mistake: the reason says it all
    traceback: str = ""


class Watch:
    """Rank 0's eye on the others: `children`, which it started, and any other among `ranks`.

    `failure` is what `check` and `guard` raise from the moment on that one is lost. The others are ended
    then, and so is this process if its main thread does not leave the guard: `release` may help it.
    """

    def __init__(
        self, socket: "zmq.Socket[bytes]", ranks: range, children: Mapping[int, "Popen[bytes]"]
    ) -> None:
        self.failure: Exception | None = None
        self.patience = LOADING
        self.release: Callable[[], None] = lambda: None
        self._socket = socket  # a ROUTER; this thread's alone
        self._children = children
        self._silent = dict.fromkeys(ranks, 0)
        self._reports: list[Report] = []  # those with a reason, in order
        self._alarmed = False
        self._guarded = False
        self._found, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="minisgl-watch", daemon=True)
        self._thread.start()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around what waits for other ranks. Whatever ends it early ends the other ranks too: they would wait
        for what this one skipped.

        Raises:
            EngineFailed: a rank is lost; the message says which and how.
            ValueError: a rank refused the configuration.
        """
        self.check()
        self._guarded = True
        try:
            yield
        except BaseException as error:
            # A collective fails as soon as a rank is lost; to see which takes the watch some ticks.
            if isinstance(error, RuntimeError) and self._found.wait(4 * TICK_S):
                self.check()
            self._fail(EngineFailed(f"rank 0 left a step in the middle: {type(error).__name__}: {error}"))
            raise
        finally:
            self._guarded = False
        self.check()

    def check(self) -> None:
        """Raise `failure` if there is one; a copy, as exceptions hold on to the frames that they pass."""
        if self.failure is not None:
            raise type(self.failure)(str(self.failure)) from None

    def close(self) -> None:
        """End the children. The process may end afterwards without a word."""
        self._closed.set()
        self._thread.join()
        self._kill_children()

    def _run(self) -> None:
        while self.failure is None:
            if self._closed.wait(TICK_S):
                return
            self._look()
        threading.Thread(target=self.release, daemon=True).start()  # of its own: it may hang
        self._kill_children()
        stuck = 0
        while not self._closed.wait(TICK_S):
            self._receive(answer=str(self.failure))
            stuck = stuck + 1 if self._guarded else 0
            if stuck == _STUCK:
                print(f"error: {self.failure}", file=sys.stderr, flush=True)
                os._exit(1)

    def _look(self) -> None:
        """One tick. The first sign of trouble may come from a victim, so the cause is named a tick later."""
        self._receive(answer="")
        ended = {rank: code for rank, child in self._children.items() if (code := child.poll()) is not None}
        if self._alarmed:
            self._fail(self._cause(ended))
        self._alarmed = bool(self._reports or ended)
        for rank in self._silent:
            self._silent[rank] += 1
            if self._silent[rank] > self.patience and not self._alarmed:
                seconds = self.patience * TICK_S
                self._fail(EngineFailed(f"rank {rank} is stopped or stuck: nothing for {seconds:.0f} s"))

    def _receive(self, answer: str) -> None:
        while self._socket.poll(0):
            sender, message = self._socket.recv_multipart()
            report = msgspec.msgpack.decode(message, type=Report)
            self._silent[report.rank] = 0
            if report.reason:
                self._reports.append(report)
            self._socket.send_multipart([sender, answer.encode()])

    def _cause(self, ended: Mapping[int, int]) -> Exception:
        """Who was killed did not say so; the others say what that, or a mistake of theirs, did to them."""
        for rank, code in ended.items():
            if code < 0:
                return EngineFailed(f"rank {rank} was killed by {signal.Signals(-code).name}")
        for report in sorted(self._reports, key=lambda report: not report.refused):
            if report.traceback:
                logger.error("rank %d failed:\n%s", report.rank, report.traceback)
            return ValueError(report.reason) if report.refused else EngineFailed(report.reason)
        rank, code = next(iter(ended.items()))
        return EngineFailed(f"rank {rank} ended with status {code}")

    def _fail(self, failure: Exception) -> None:
        if self.failure is None:
            self.failure = failure
            self._found.set()

    def _kill_children(self) -> None:
        for child in self._children.values():
            child.kill()  # also one that is stopped
        for child in self._children.values():
            with suppress(TimeoutExpired):
                child.wait(_DYING_S)


def watch_rank_0(socket: "zmq.Socket[bytes]", rank: int) -> None:
    """A thread of any other rank: tell rank 0 through a DEALER, and end this process when rank 0 is gone."""
    silent, reason = 0, ""
    while silent < RANK_0 and not reason:
        socket.send(msgspec.msgpack.encode(Report(rank)))
        time.sleep(TICK_S)
        silent += 1
        while not reason and socket.poll(0):
            silent, reason = 0, socket.recv().decode()
    reason = reason or f"rank 0 is gone, or stopped: nothing for {RANK_0 * TICK_S:.0f} s"
    print(f"rank {rank} ends: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
