"""The server's life: bind, load, serve until told to stop, leave nothing behind."""

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from minisgl.server.app import create_app
from minisgl.server.calls import Served
from minisgl.server.engine_client import EngineClient, EngineDied, start_engine
from minisgl.server.protocol import HttpProtocol
from stages.interface import EngineConfig
from stages.stage1_naive.config import ModelConfig, find_model
from stages.stage1_naive.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_ACCEPTS_AT_ONCE = 32
_THREADS = 32  # many, as large texts may keep some of them busy for long, without the interpreter lock
_GRACE_S = 3  # for clients to read the end of their answers when the server stops


@dataclass(frozen=True)
class ServerOptions:
    """Where and as what to serve. `port` 0 takes a free one; `log_level` is a name of `logging`; with
    `model_defaults` what a request leaves out is as the model's generation_config.json has it."""

    host: str
    port: int
    model_name: str
    log_level: str
    max_body_mb: int = 32  # MiB
    model_defaults: bool = True


def run_server(stage: int, config: EngineConfig, options: ServerOptions) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: the model cannot be served.
        EngineDied: the engine could not be built, or failed later.
        KeyboardInterrupt: interrupted before the engine was started.
    """
    with _bind(options.host, options.port) as listener:  # first: it is quick, and loading a model is not
        path = find_model(config.model)
        model = ModelConfig.load(path)  # what cannot be served is refused before anything is loaded
        defaults = model.sampling_defaults if options.model_defaults else {}
        config = replace(config, model=str(path))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, _threads() as threads:
            runner.run(_serve(stage, config, options, defaults, listener, threads))


@contextmanager
def _threads() -> Iterator[Executor]:
    """Nobody waits for their work in the end: it may be a text that takes minutes to tokenize."""
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="calls")
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _bind(host: str, port: int) -> socket.socket:
    """Bound, but not listening: until the model is ready clients are refused, not left waiting."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection may linger
        listener.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> OSError:
    return OSError(f"cannot listen on {host} port {port}: {error.strerror}")


async def _serve(
    stage: int,
    config: EngineConfig,
    options: ServerOptions,
    defaults: Mapping[str, float],
    listener: socket.socket,
    threads: Executor,
) -> None:
    stop = asyncio.Event()
    _on_signals(stop)
    stopped = asyncio.create_task(stop.wait())
    async with start_engine(stage, config, options.log_level) as engine:
        logger.info("loading %s", config.model)
        loading = asyncio.create_task(_load(engine, Path(config.model)))
        await _first(loading, stopped)
        if stopped.done():
            loading.cancel()
            return
        tokenizer, context_length = loading.result()
        served = Served(options.model_name, tokenizer, context_length, defaults)
        app = create_app(engine, served, int(time.time()), options.max_body_mb * 2**20, threads)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                log_config=None,
                log_level=None if options.log_level == "debug" else "warning",  # a line per request only then
                lifespan="off",
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        gc.collect()
        gc.freeze()  # the libraries' objects stay: no later collection need look at them
        try:
            listener.listen(server.config.backlog)
        except OSError as error:  # another server, bound as this one was, has begun to listen before it
            raise _cannot_listen(options.host, options.port, error) from error
        # libuv accepts one connection of a socket each time round the loop, and a round takes as long as a
        # token for every open stream. With copies, requests that arrive together need few rounds.
        listeners = [listener, *(listener.dup() for _ in range(_ACCEPTS_AT_ONCE - 1))]
        serving = asyncio.create_task(server.serve(sockets=listeners))
        while not (server.started or serving.done()):  # noqa: ASYNC110 (uvicorn offers no event)
            await asyncio.sleep(0.01)
        if server.started:
            _on_signals(stop)  # again: uvicorn took them, and would raise them once more at its end
            print(_welcome(options.model_name, context_length, listener), flush=True)
            await _first(serving, stopped, engine.died)
        reason = engine.died.result() if engine.died.done() else None
        engine.close("the server is shutting down")  # answers under way end now, with this as their error
        server.should_exit = True
        await serving
        if reason is not None:
            raise EngineDied(reason)


async def _load(engine: EngineClient, path: Path) -> tuple[Tokenizer, int]:
    """The tokenizer, while the engine's process loads the weights; and the context length."""
    return await asyncio.to_thread(Tokenizer, path), await engine.ready()


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _on_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


def _welcome(model_name: str, context_length: int, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return f"""
Mini-SGLang serves {model_name} at {url}/v1 (context: {context_length} tokens). Ctrl-C stops it. Try:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "{model_name}", "messages": [{{"role": "user", "content": "What is a radix cache?"}}]}}'
"""
