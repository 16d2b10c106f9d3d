"""The engine process: loads the model, then steps the engine for as long as its parent lives."""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback

import zmq

from minisgl.server.messages import Abort, Alive, Died, FromEngine, Outputs, Ready, Refused, ToEngine, encode
from minisgl.server.messages import decode_to_engine as decode
from stages import load_stage
from stages.interface import Engine, EngineConfig, EngineFailed, RequestRefused

_PULSE_S = 1.0


class Link:
    """The engine's end of the link."""

    def __init__(self, inbox: "zmq.Socket[bytes]", outbox: "zmq.Socket[bytes]") -> None:
        self._inbox = inbox
        self._outbox = outbox

    def receive(self, wait: bool) -> ToEngine | None:
        """The next message; None if there is none, with `wait` for a second."""
        return decode(self._inbox.recv()) if self._inbox.poll(1000 if wait else 0) else None

    def send(self, message: FromEngine) -> None:
        """Does not block: a slow reader never slows the engine."""
        self._outbox.send(encode(message))


def serve_engine(engine: Engine, link: Link) -> None:
    """Step `engine`, and between the steps do what the messages say. Ends only by an exception."""
    while True:
        while message := link.receive(wait=not engine.has_work):
            _obey(message, engine, link)
        if engine.has_work:  # else it was waited for a message in vain
            link.send(Outputs(engine.step(), engine.statistics))


def _obey(message: ToEngine, engine: Engine, link: Link) -> None:
    if isinstance(message, Abort):
        engine.abort(message.request_id)
        return link.send(Outputs([], engine.statistics))
    try:
        engine.add(message.request)
    except RequestRefused as error:
        link.send(Refused(message.request.id, str(error), error.param))


def run_engine(stage: int, config: EngineConfig, addresses: tuple[str, str], log_level: str) -> None:
    """The engine process: `addresses` are where to receive and to send, both bound by the parent.

    Ends with status 1 after its last words, or with 0 by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent ends this one
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_beat, args=(addresses[1],), daemon=True).start()
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
        for socket, address in zip((inbox, outbox), addresses, strict=True):
            socket.set_hwm(0)  # no limit of its own: the open requests are one
            socket.connect(address)
        link = Link(inbox, outbox)
        loaded = False
        try:
            engine = load_stage(stage).build(config)
            loaded = True
            gc.collect()
            gc.freeze()  # the libraries' objects stay: a collection that looks at them delays a step
            link.send(Ready(engine.context_length))
            serve_engine(engine, link)
        except Exception as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent's answer to the last words
            # The user's mistake, or nobody's: the sentence says it all.
            if isinstance(error, EngineFailed) or (isinstance(error, ValueError) and not loaded):
                link.send(Died(str(error)))
            else:
                traceback.print_exc()
                link.send(Died(f"the engine failed: {type(error).__name__}: {error}"))
    sys.exit(1)


def _leave(*_: object) -> None:
    """An exit that cleans up behind the libraries, and is not interrupted while it does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _beat(address: str) -> None:
    """Say that this process runs, and end it with its parent even if that is killed: also in the middle of
    loading or of a long step. Threads share no socket; and nobody waits for this one's context, which ends
    with the process."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this process is always a child
    with zmq.Context() as context, context.socket(zmq.PUSH) as outbox:
        outbox.set_hwm(0)  # a parent that is stopped, and reads nothing, must not keep it from seeing the end
        outbox.connect(address)
        while parent.is_alive():
            outbox.send(encode(Alive()))
            parent.join(_PULSE_S)
        os._exit(1)
