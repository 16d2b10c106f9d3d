"""Rank 0 tells the others what to do. They wait on a plain socket: an idle collective would time out."""

import hashlib
import socket
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from stages.interface import EngineFailed, Request, RequestRefused, Statistics, TokenOutput
from stages.stage6_parallel.launcher import Place
from stages.stage6_parallel.watch import Report, Watch, watch_rank_0

_STEPS, _WATCH = "minisgl/steps", "minisgl/watch"  # where rank 0 listens, in the store
_LINGER_MS = 1000
_SUBSCRIBED = b"\x01"  # what ZeroMQ says then


class Step(msgspec.Struct):
    """Do these calls in order, and step; `digest` is of what the step before brought to rank 0."""

    calls: list[Request | str]  # a request to add, or the id of one to abort
    digest: bytes


def portable(request: Request) -> Request:
    """The same request in plain numbers and lists, as all ranks will have it.

    Raises:
        RequestRefused: something in it is neither.
    """
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(request, enc_hook=_plain), type=Request)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestRefused(f"request {request.id!r} cannot be sent to the other ranks: {error}") from error


def _plain(value: Any) -> Any:
    """NumPy's and PyTorch's numbers and arrays know how; any other sequence of tokens is a list."""
    return value.tolist() if hasattr(value, "tolist") else list(value)


def digest(outputs: Sequence[TokenOutput], statistics: Statistics) -> bytes:
    """What two ranks agree on if they made the same step: who got which token, and how the pages stand."""
    tokens = [(output.request_id, output.token_id) for output in outputs]
    return hashlib.blake2b(msgspec.msgpack.encode((tokens, statistics)), digest_size=8).digest()


class Leader:
    """Rank 0's end of the link."""

    def __init__(self, place: Place) -> None:
        self._context = zmq.Context()
        self._others = place.size - 1
        self._steps = self._bind(zmq.XPUB, place, _STEPS)
        watched = self._bind(zmq.ROUTER, place, _WATCH)
        self.watch = Watch(watched, range(1, place.size), place.children)

    def _bind(self, kind: int, place: Place, key: str) -> "zmq.Socket[bytes]":
        bound: zmq.Socket[bytes] = self._context.socket(kind)
        bound.set_hwm(0)  # no step is ever dropped
        bound.linger = _LINGER_MS
        if kind == zmq.XPUB:
            bound.setsockopt(zmq.XPUB_VERBOSE, 1)  # each rank that listens is a message
        # a machine's own name may be a loopback address, so that is not what tells whether all are here
        bound.bind(f"tcp://{socket.gethostbyname(place.host) if place.local_size == place.size else '*'}:*")
        port = bound.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        place.store.set(key, f"tcp://{place.host}:{port}")
        return bound

    def wait_for_ranks(self) -> None:
        """Until each of them listens; call it in the guard of `watch`."""
        missing = self._others
        while missing:
            self.watch.check()
            if self._steps.poll(100):
                missing -= 1 if self._steps.recv().startswith(_SUBSCRIBED) else -1

    def send(self, step: Step) -> None:
        """To all ranks; does not wait for them."""
        self._steps.send(msgspec.msgpack.encode(step))

    def close(self) -> None:
        """Let the others go, and end those that were started here."""
        self._steps.send(b"")
        self.watch.close()
        self._context.destroy(linger=_LINGER_MS)


class Follower:
    """The end of any other rank."""

    def __init__(self, place: Place) -> None:
        self._rank = place.rank
        self._context = zmq.Context()
        self._watch = place.store.get(_WATCH).decode()
        threading.Thread(
            target=watch_rank_0, args=(self._connect(zmq.DEALER, self._watch), place.rank), daemon=True
        ).start()
        self._steps = self._connect(zmq.SUB, place.store.get(_STEPS).decode())
        self._steps.subscribe(b"")

    def _connect(self, kind: int, address: str) -> "zmq.Socket[Any]":
        connected: zmq.Socket[Any] = self._context.socket(kind)
        connected.set_hwm(0)
        connected.linger = _LINGER_MS
        connected.connect(address)
        return connected

    def receive(self) -> Step | None:
        """The next step, however long it takes; None: rank 0 needs this one no more."""
        message = self._steps.recv()
        return msgspec.msgpack.decode(message, type=Step) if message else None

    def report(self, error: Exception, refused: bool) -> None:
        """The last words, to rank 0, of which those count that are not the consequence of another rank's.
        `refused`: the configuration cannot be served."""
        report = Report(self._rank, str(error), refused)
        if not (refused or isinstance(error, EngineFailed)):
            report.reason = f"rank {self._rank} failed: {type(error).__name__}: {error}"
            report.traceback = traceback.format_exc()
        with self._connect(zmq.DEALER, self._watch) as outbox:
            outbox.send(msgspec.msgpack.encode(report))
            outbox.poll(_LINGER_MS)  # for the answer: then it has arrived
