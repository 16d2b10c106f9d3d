"""The API process's end of the link: starts the engine process, and hands its tokens to those who wait."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import zmq
import zmq.asyncio

from minisgl.server.engine_process import run_engine
from minisgl.server.messages import Abort, Add, Died, Outputs, Ready, Refused, ToEngine, encode
from minisgl.server.messages import decode_from_engine as decode
from stages.interface import EngineConfig, EngineFailed, Request, RequestRefused, Statistics, TokenOutput

_LAST_WORDS_S = 0.2  # a dead process's last message may still be on its way
_PATIENCE_S = 5.0  # from SIGTERM to SIGKILL
_TICK_S = 0.5
# Ticks of silence from an engine process. A library that is being loaded stops all threads of a process.
_LOADING, _SERVING = 1200, 16
_LONGEST_FOLDER = 60  # characters: a socket's path may have 103 on some systems, and the rest of it takes 30
_SENT_AT_ONCE = 2**18  # bytes, some milliseconds of work, before others have their turn


class EngineDied(EngineFailed):
    """The engine is gone, or going; the message says why."""


@dataclass
class _Mailbox:
    """What the engine brought for one call and the call has not read yet."""

    open: set[str]  # ids of the requests that will bring more
    tokens: list[TokenOutput] = field(default_factory=list)
    error: Exception | None = None
    reader: asyncio.Future[None] | None = None  # who waits; cheaper than an Event, and it is once a token

    def put(self, token: TokenOutput) -> None:
        self.tokens.append(token)
        self._wake()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self._wake()

    async def take(self) -> list[TokenOutput]:
        """All that has piled up, at least one token; raises the error after the last of them."""
        if not self.tokens and not self.error:
            self.reader = asyncio.get_running_loop().create_future()
            await self.reader
        if not self.tokens and self.error:
            raise self.error
        tokens, self.tokens = self.tokens, []
        return tokens

    def _wake(self) -> None:
        if self.reader and not self.reader.done():
            self.reader.set_result(None)


class EngineClient:
    """Speaks with an engine process over two sockets; `listen` must run beside it."""

    def __init__(self, outbox: "zmq.Socket[bytes]", inbox: zmq.asyncio.Socket) -> None:
        loop = asyncio.get_running_loop()
        self.died: asyncio.Future[str] = loop.create_future()  # the reason, as soon as there is one
        self.statistics = Statistics()  # the engine's newest
        self.heard = False  # whether anything arrived since this was set to False
        self._ready: asyncio.Future[int] = loop.create_future()
        self._outbox = outbox
        self._inbox = inbox
        self._mailboxes: dict[str, _Mailbox] = {}  # request id -> the mailbox of its call

    async def ready(self) -> int:
        """Wait until the model is loaded; its context length in tokens.

        Raises:
            EngineDied: the engine could not be built.
        """
        either: list[asyncio.Future[Any]] = [self._ready, self.died]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        self.check_alive()
        return self._ready.result()

    @property
    def is_ready(self) -> bool:
        return self._ready.done()

    async def generate(self, requests: Sequence[Request]) -> AsyncGenerator[list[TokenOutput], None]:
        """The tokens of all `requests` as they arrive; those that piled up meanwhile come at once.

        Closing the generator early aborts in the engine what has not finished.

        Raises:
            RequestRefused: the engine can never serve one of them.
            EngineDied: the engine is dead.
        """
        self.check_alive()
        mailbox = _Mailbox({request.id for request in requests})
        try:
            sent = 0
            for request in requests:
                self._mailboxes[request.id] = mailbox
                sent += self._send(Add(request))
                if sent > _SENT_AT_ONCE:
                    sent = 0
                    await asyncio.sleep(0)
            while mailbox.open or mailbox.tokens:
                yield await mailbox.take()
        finally:
            for request_id in tuple(mailbox.open):
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """Stop one request of a running `generate`, which ends when none of its requests is open."""
        if self._forget(request_id):
            self._send(Abort(request_id))

    def close(self, reason: str) -> None:
        """Take the engine for dead: every open and every later `generate` fails with `reason`."""
        if not self.died.done():
            self.died.set_result(reason)
        for mailbox in self._mailboxes.values():
            mailbox.fail(EngineDied(reason))

    async def listen(self) -> None:
        """Deliver the engine's messages, for ever."""
        while True:
            message = decode(await self._inbox.recv())
            self.heard = True
            match message:
                case Outputs():
                    self.statistics = message.statistics
                    self._deliver(message.tokens)
                case Refused():
                    if mailbox := self._mailboxes.pop(message.request_id, None):
                        mailbox.fail(RequestRefused(message.reason, message.param))
                case Ready():
                    self._ready.set_result(message.context_length)
                case Died():
                    self.close(message.reason)

    def _deliver(self, tokens: Sequence[TokenOutput]) -> None:
        for output in tokens:
            if mailbox := self._mailboxes.get(output.request_id):  # else: aborted while this was on its way
                if output.finish_reason:
                    self._forget(output.request_id)
                mailbox.put(output)

    def _forget(self, request_id: str) -> _Mailbox | None:
        if mailbox := self._mailboxes.pop(request_id, None):
            mailbox.open.discard(request_id)
        return mailbox

    def _send(self, message: ToEngine) -> int:
        """How many bytes that was."""
        encoded = encode(message)
        with suppress(zmq.Again):  # no peer: the engine is dead, and `_watch` is about to say so
            self._outbox.send(encoded, zmq.NOBLOCK)
        return len(encoded)

    def check_alive(self) -> None:
        """Raise an EngineDied if it is not."""
        if self.died.done():
            raise EngineDied(self.died.result())


@asynccontextmanager
async def start_engine(stage: int, config: EngineConfig, log_level: str) -> AsyncIterator[EngineClient]:
    """An engine in a process of its own, which begins to load at once and has ended on leaving."""
    short = None if len(gettempdir()) <= _LONGEST_FOLDER else "/tmp"
    with TemporaryDirectory(prefix="minisgl-", dir=short) as folder, zmq.Context() as context:
        addresses = (f"ipc://{folder}/to-engine", f"ipc://{folder}/from-engine")
        with context.socket(zmq.PUSH) as outbox, zmq.asyncio.Socket(context, zmq.PULL) as inbox:
            for socket, address in zip((outbox, inbox), addresses, strict=True):
                socket.set_hwm(0)  # no limit of its own: the open requests are one
                socket.linger = 0
                socket.bind(address)
            process = multiprocessing.get_context("spawn").Process(
                name="minisgl-engine", target=run_engine, args=(stage, config, addresses, log_level)
            )
            _start(process)
            client = EngineClient(outbox, inbox)
            tasks = [asyncio.create_task(work) for work in (client.listen(), _watch(process, client))]
            try:
                yield client
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.to_thread(_end, process)


def _start(process: SpawnProcess) -> None:
    """With SIGINT blocked, which the child inherits: Ctrl-C must not reach it before it ignores it."""
    resource_tracker.ensure_running()  # `start` would do it, and unblock SIGINT by the way
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


async def _watch(process: SpawnProcess, client: EngineClient) -> None:
    """Notice an engine process that ends without a word, as one does that is killed, or that is stopped.

    Ticks are counted, no clock is read: when both processes are stopped and go on together, none was silent.
    """
    silent = 0
    while process.is_alive() and silent < (_SERVING if client.is_ready else _LOADING):
        await asyncio.sleep(_TICK_S)
        silent = 0 if client.heard else silent + 1
        client.heard = False
    await asyncio.sleep(_LAST_WORDS_S)
    code = process.exitcode
    if code is None:
        end = f"is stopped or stuck: it was silent for {silent * _TICK_S:.0f} s"
    else:
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    client.close(f"the engine process {end}")


def _end(process: SpawnProcess) -> None:
    process.terminate()
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGCONT)  # were it stopped, it would not hear of it
    process.join(_PATIENCE_S)
    process.kill()
    process.join()
    process.close()
