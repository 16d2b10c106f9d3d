"""The HTTP endpoints."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from minisgl.server.bodies import MAX_MARKS, BodyReader, BodyT, ChatBody, CompletionBody
from minisgl.server.calls import Call, Served, chat_call, completion_call
from minisgl.server.engine_client import EngineClient, EngineDied
from minisgl.server.errors import ApiError, as_api_error, too_large
from minisgl.server.generation import Generation
from minisgl.server.responses import ChatFormat, CompletionFormat, Format, as_metrics
from stages.interface import RequestRefused

T = TypeVar("T")
_MARKS = (b",", b"[", b"{", b'"', b"\\")


def create_app(
    engine: EngineClient, served: Served, created: int, max_body: int, threads: Executor
) -> FastAPI:
    """The application over a loaded engine. `created` is the model's age in lists, in seconds since 1970;
    `max_body` is in bytes; what takes as long as a request is large is done in `threads`."""
    app = FastAPI(title="Mini-SGLang", openapi_url=None)  # msgspec reads the bodies, so there is no schema
    for kind in (ApiError, RequestRefused, EngineDied, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    reader = BodyReader()
    card = {"id": served.name, "object": "model", "created": created, "owned_by": "mini-sglang"}

    def readable(path: str) -> Callable[[T], T]:
        return app.api_route(path, methods=["GET", "HEAD"])  # type: ignore[return-value]

    def check_model(name: str) -> None:
        if name != served.name:
            message = f"the model {name[:100]!r} does not exist; this server has {served.name!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    async def respond(
        http: Request, body_type: type[BodyT], as_call: Callable[[BodyT, Served], Call], form: Format
    ) -> Response:
        raw = await _body(http, max_body)

        def prepare() -> tuple[Call, Generation]:
            body = reader.read(raw, body_type)
            check_model(body.model)
            call = as_call(body, served)
            return call, Generation(call, form, engine, served.tokenizer)

        call, generation = await _while_alive(engine, threads, prepare)
        try:
            if not call.body.stream:
                async with aclosing(generation):
                    return _json(await _while_connected(http, generation.whole()))
            await _while_connected(http, generation.begin())
        except RequestRefused as error:
            param = call.names.get(error.param or "", error.param)
            raise ApiError(str(error), param=param) from error
        return _EventStream(generation)

    @readable("/health")
    async def health() -> Response:
        engine.check_alive()
        return _json({"status": "ok"})

    @readable("/metrics")
    async def metrics() -> Response:
        return Response(as_metrics(engine.statistics), media_type="text/plain; version=0.0.4")

    @readable("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [card]})

    @readable("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        check_model(name)
        return _json(card)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await respond(http, ChatBody, chat_call, ChatFormat())

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await respond(http, CompletionBody, completion_call, CompletionFormat())

    return app


class _EventStream(StreamingResponse):
    """Server-sent events of a generation that ends with the response, however that ends."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(
            generation.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._generation):
            await super().__call__(scope, receive, send)


async def _body(http: Request, limit: int) -> bytearray:
    """The body, read in pieces as long as it is within the limits.

    Raises:
        ApiError: it is no JSON by its type, or too large.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("", "application/json") and not kind.endswith("+json"):
        raise ApiError(f"the content type must be application/json, not {kind[:100]!r}", status=415)
    over = too_large(f"this server reads bodies of up to {limit} bytes (--max-body-mb)")
    if int(http.headers.get("content-length", 0)) > limit:
        raise over
    body, marks = bytearray(), 0
    async for piece in http.stream():
        body += piece
        marks += sum(map(piece.count, _MARKS))
        if len(body) > limit:
            raise over
        if marks > MAX_MARKS:
            raise too_large(f"its JSON has over {MAX_MARKS} commas, brackets, quotes and backslashes")
    return body


async def _while_alive(engine: EngineClient, threads: Executor, work: Callable[[], T]) -> T:
    """What `work` returns, in a thread. A server that stops does not wait for it.

    Raises:
        EngineDied: the engine died first.
    """
    working = asyncio.get_running_loop().run_in_executor(threads, work)
    either: list[asyncio.Future[Any]] = [working, engine.died]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
        engine.check_alive()
    return working.result()


async def _while_connected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; cancels it as soon as the client hangs up.

    Raises:
        ClientDisconnect: the client hung up first.
    """

    async def hung_up() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(hung_up())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait({working, watching})  # what `work` cleans up is done on return


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    encoded = content if isinstance(content, bytes) else msgspec.json.encode(content)
    return Response(encoded, status, headers, media_type="application/json")


async def _on_error(http: Request, error: Exception) -> Response:
    headers = None
    if isinstance(error, HTTPException):  # no such route, or not this method, with those that there are
        headers = error.headers
        error = ApiError(f"{http.method} {http.url.path}: {error.detail}", status=error.status_code)
    told = as_api_error(error)
    return _json(told.body(), told.status, headers)


async def _on_disconnect(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number for a client that left
