"""One call under way: the engine's tokens become the text of its choices, whole or streamed."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from msgspec.json import encode

from minisgl.server.calls import Call
from minisgl.server.engine_client import EngineClient
from minisgl.server.errors import as_api_error
from minisgl.server.responses import Format, Json, answer, frame, usage_chunk
from minisgl.server.text import Choice
from stages.stage1_naive.tokenizer import Tokenizer


class Generation:
    """Read it by `whole`, or by `begin` and `events`; then `aclose` it, which aborts what is unfinished."""

    def __init__(self, call: Call, form: Format, engine: EngineClient, tokenizer: Tokenizer) -> None:
        self._call = call
        self._form = form
        self._engine = engine
        self._choices = [Choice(index, tokenizer, call.stop) for index in range(len(call.requests))]
        self._frame = frame(call, form)
        self._progress = self._run()

    async def whole(self) -> Json:
        """The answer, when all its choices have finished."""
        async for _ in self._progress:
            pass
        return answer(self._call, self._form, self._choices)

    async def begin(self) -> None:
        """Wait for the first tokens: an error before them can still be the response's status."""
        await anext(self._progress)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. What piles up while the client is slow leaves in one."""
        try:
            yield self._events(entry for choice in self._choices for entry in self._form.opening(choice))
            yield self._news(self._choices)
            async for choices in self._progress:
                yield self._news(choices)
            if self._call.body.include_usage:
                yield _event(usage_chunk(self._call, self._form, self._choices))
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status has been sent: an event is all that is left to tell it
            yield _event(as_api_error(error).body())

    async def aclose(self) -> None:
        await self._progress.aclose()

    async def _run(self) -> AsyncGenerator[Iterable[Choice], None]:
        """Yields the choices that got tokens, as often as some arrive."""
        choices = {
            request.id: choice for request, choice in zip(self._call.requests, self._choices, strict=True)
        }
        async with aclosing(self._engine.generate(self._call.requests)) as arrivals:
            async for outputs in arrivals:
                touched = {}
                for output in outputs:
                    choice = choices[output.request_id]
                    if choice.finish_reason:
                        continue  # made before the engine heard of the stop string
                    choice.push(output)
                    touched[choice.index] = choice
                    if choice.finish_reason and not output.finish_reason:
                        self._engine.abort(output.request_id)
                yield touched.values()

    def _news(self, choices: Iterable[Choice]) -> bytes:
        pieces = [piece for choice in choices if (piece := choice.take())]
        return self._events(self._form.entry(piece) for piece in pieces)

    def _events(self, entries: Iterable[Json]) -> bytes:
        before, after = self._frame
        return b"".join([b"data: %b%b%b\n\n" % (before, encode(entry), after) for entry in entries])


def _event(content: Json) -> bytes:
    return b"data: %b\n\n" % encode(content)
