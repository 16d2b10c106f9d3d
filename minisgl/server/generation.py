"""One call under way: the engine's tokens become the text of its choices, whole or streamed."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from msgspec.json import encode

from minisgl.server.calls import Call
from minisgl.server.engine_client import EngineClient
from minisgl.server.errors import RequestFailed, as_api_error
from minisgl.server.responses import Format, Frame, Json, answer, opening, usage_chunk
from minisgl.server.text import Choice
from stages.stage1_naive.tokenizer import Tokenizer

_FEW = 64  # choices, written in a millisecond or two


class Generation:
    """Read it by `whole`, or by `begin` and `events`; then `aclose` it, which aborts what is unfinished."""

    def __init__(self, call: Call, form: Format, engine: EngineClient, tokenizer: Tokenizer) -> None:
        self._call = call
        self._form = form
        self._engine = engine
        self._choices = [
            Choice(index, request, tokenizer, call.text) for index, request in enumerate(call.requests)
        ]
        params = call.requests[0].params
        self._shows_prompt = call.echo or params.prompt_logprobs is not None
        scored = params.logprobs is not None or params.prompt_logprobs is not None
        self._is_large = scored or len(call.requests) > _FEW
        self._progress = self._run()

    async def whole(self) -> bytes:
        """The answer, when all its choices have finished."""
        async for _ in self._progress:
            pass
        if self._is_large:  # log-probabilities of thousands of tokens, and many choices take long to write
            return await asyncio.to_thread(answer, self._call, self._form, self._choices)
        return answer(self._call, self._form, self._choices)

    async def begin(self) -> None:
        """Wait for the first tokens: an error before them can still be the response's status."""
        await anext(self._progress)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. What piles up while the client is slow leaves in one."""
        frame = Frame(self._call, self._form)
        try:
            yield b"".join(_event(first) for first in opening(self._call, self._form, self._choices))
            yield self._news(frame, self._choices)
            async for choices in self._progress:
                yield self._news(frame, choices)
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
                    if output.finish_reason == "error":
                        raise RequestFailed
                    if self._shows_prompt and not choice.completion_tokens:
                        await asyncio.to_thread(choice.show_prompt, output.prompt_logprobs, self._call.echo)
                    choice.end() if self._call.no_output else choice.push(output)
                    touched[choice.index] = choice
                    if choice.finish_reason and not output.finish_reason:
                        self._engine.abort(output.request_id)
                yield touched.values()

    def _news(self, frame: Frame, choices: Iterable[Choice]) -> bytes:
        return frame.events([piece for choice in choices if (piece := choice.take())], self._choices)


def _event(content: Json) -> bytes:
    return b"data: %b\n\n" % encode(content)
