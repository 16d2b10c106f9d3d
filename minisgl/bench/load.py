"""Conversations sent to a server at their times, and what each request met."""

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from minisgl.bench.client import Answer, RequestFailed, Server
from minisgl.bench.traces import Conversation, Prompt


@dataclass
class Sample:
    """One request. Times are seconds after the start of the run; latencies count from `start`.

    A request that waits for a free place (`--concurrency`) or for the turn before it starts later than it
    arrives. A client that cannot keep up starts late too: `start - arrival` shows it.
    """

    conversation: int
    turn: int
    arrival: float  # when it should start; for later turns, when the turn before ended
    asked_tokens: int
    start: float = 0.0  # the connection is opened
    chunks: "array[float]" = field(default_factory=lambda: array("d"))  # when each piece of text was read
    prompt_tokens: int = 0  # these three as the server's usage counts them
    tokens: int = 0
    cached_tokens: int | None = None
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first piece of text."""
        return self.chunks[0] - self.start if self.chunks else None

    @property
    def latency(self) -> float | None:
        """Seconds to the last piece of text."""
        return self.chunks[-1] - self.start if self.chunks else None

    @property
    def itl(self) -> float | None:
        """Inter-token latency: seconds from the first to the last piece of text, over tokens - 1.

        None for one token or one piece, which say nothing about it. A first piece of several tokens makes
        it a little too small, by their number over all tokens.
        """
        if len(self.chunks) < 2 or self.tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.tokens - 1)


@dataclass(frozen=True)
class Load:
    """How to ask."""

    server: Server
    model: str
    timeout_s: float  # of each request, from the opening of its connection to the end of its answer
    concurrency: int | None = None  # conversations in flight at most; None: no limit

    async def drive(
        self, conversations: Sequence[Conversation], samples: list[Sample], on_end: Callable[[], object]
    ) -> None:
        """Send everything; each request that has ended, well or not, is appended to `samples`.

        A conversation whose turn fails ends there. Cancelling this cancels what is in flight, and leaves no
        sample of it.
        """
        places = asyncio.Semaphore(self.concurrency or len(conversations))
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number, conversation in enumerate(conversations):
                prompt = conversation.turns[0].prompt()  # before the wait, so that it delays nothing
                await places.acquire()
                await asyncio.sleep(0)  # lets the others read while all start at once
                due = begin + conversation.arrival_s
                while (wait := due - time.perf_counter()) > 0:  # noqa: ASYNC110  # no event to wait for
                    await asyncio.sleep(wait)  # maybe again: uvloop rounds to milliseconds, down too
                talk = self._converse(number, conversation, prompt, begin, samples, on_end)
                tasks.create_task(talk).add_done_callback(lambda _: places.release())

    async def _converse(
        self,
        number: int,
        conversation: Conversation,
        prompt: Prompt,
        begin: float,
        samples: list[Sample],
        on_end: Callable[[], object],
    ) -> None:
        arrival = conversation.arrival_s
        for index, turn in enumerate(conversation.turns):
            if index:
                more = turn.prompt()
                assert isinstance(prompt, str)  # as `Conversation` says
                assert isinstance(more, str)
                prompt += more
            sample = Sample(number, index, arrival, turn.output_tokens)
            answer = await self._ask(prompt, sample, begin)
            samples.append(sample)
            on_end()
            if sample.error is not None:
                return
            if isinstance(prompt, str):
                prompt += "".join(answer.texts)
            arrival = time.perf_counter() - begin

    async def _ask(self, prompt: Prompt, sample: Sample, begin: float) -> Answer:
        body = msgspec.json.encode(completion_body(self.model, prompt, sample.asked_tokens))
        answer = Answer()
        sample.start = time.perf_counter() - begin
        try:
            await self.server.stream("/completions", body, answer, self.timeout_s)
            if not answer.chunk_times:
                raise RequestFailed("the answer holds no text")
            _count(answer, sample)
        except RequestFailed as failure:
            sample.error = str(failure)
        sample.chunks = array("d", (read - begin for read in answer.chunk_times))
        return answer


def completion_body(model: str, prompt: Prompt, tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _count(answer: Answer, sample: Sample) -> None:
    usage = answer.usage
    if usage is None:
        raise RequestFailed("the stream brought no usage, so its tokens cannot be counted")
    texts = sum(map(bool, answer.texts))
    if texts > usage.completion_tokens + 1:  # a flush of held-back text may come alone, all else has a token
        raise RequestFailed("the stream brought more pieces of text than the usage counts tokens")
    sample.prompt_tokens, sample.tokens = usage.prompt_tokens, usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        sample.cached_tokens = usage.prompt_tokens_details.cached_tokens
