"""The HTTP endpoints."""

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from minisgl.server.bodies import ChatBody, CompletionBody, parse
from minisgl.server.calls import Call, chat_call, completion_call
from minisgl.server.engine_client import EngineClient, EngineDied
from minisgl.server.errors import ApiError, as_api_error
from minisgl.server.generation import Generation
from minisgl.server.responses import ChatFormat, CompletionFormat, Format, as_metrics
from stages.interface import RequestRefused
from stages.stage1_naive.tokenizer import Tokenizer

T = TypeVar("T")


def create_app(
    engine: EngineClient, tokenizer: Tokenizer, model_name: str, context_length: int, created: int
) -> FastAPI:
    """The application over a loaded engine. `created` is the model's age in lists, in seconds since 1970."""
    app = FastAPI(title="Mini-SGLang", openapi_url=None)  # msgspec reads the bodies, so there is no schema
    for kind in (ApiError, RequestRefused, EngineDied, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    card = {"id": model_name, "object": "model", "created": created, "owned_by": "mini-sglang"}

    def check_model(name: str) -> None:
        if name != model_name:
            message = f"the model {name!r} does not exist; this server has {model_name!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    async def respond(http: Request, call: Call, form: Format) -> Response:
        generation = Generation(call, form, engine, tokenizer)
        if not call.body.stream:
            async with aclosing(generation):
                return _json(await _while_connected(http, generation.whole()))
        await _while_connected(http, generation.begin())
        return _EventStream(generation)

    @app.get("/health")
    async def health() -> Response:
        if engine.died.done():
            raise EngineDied(engine.died.result())
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(as_metrics(engine.statistics), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        check_model(name)
        return _json(card)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        body = parse(await http.body(), ChatBody)
        check_model(body.model)
        return await respond(http, await chat_call(body, tokenizer, context_length), ChatFormat(tokenizer))

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        body = parse(await http.body(), CompletionBody)
        check_model(body.model)
        call = await completion_call(body, tokenizer, context_length)
        return await respond(http, call, CompletionFormat(tokenizer))

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
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _on_error(http: Request, error: Exception) -> Response:
    headers = None
    if isinstance(error, HTTPException):  # no such route, or not this method, with those that there are
        headers = error.headers
        error = ApiError(f"{http.method} {http.url.path}: {error.detail}", status=error.status_code)
    told = as_api_error(error)
    return _json(told.body(), told.status, headers)


async def _on_disconnect(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number for a client that left
