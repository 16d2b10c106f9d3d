"""What to ask a server and when: made up from a seed, or read from a trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

Prompt = list[int] | str
_Length = Annotated[int, Meta(ge=1)]
_Count = Annotated[int, Meta(ge=0)]
_Arrival = Annotated[float, Meta(ge=0)]

# One token each in most vocabularies, with the space before them.
_TEXT = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an "
    "they which one you were her all she there would their we him been has when who will more no if out so "
    "said what up its about into than them can only other new some could time these two may then do first "
    "any my now such like our over man me even most made after also did many before must through back years"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Turn:
    """One request. The prompt is made when it is called for, since those of a long trace fill gigabytes."""

    prompt: Callable[[], Prompt]
    output_tokens: int


@dataclass(frozen=True)
class Conversation:
    """Turns that follow each other. All prompts of a conversation with several turns are texts."""

    arrival_s: float  # of the first turn, after the start of the run
    turns: Sequence[Turn]


@dataclass(frozen=True)
class TokenSource:
    """Random prompts: equal keys give equal tokens. Another `salt` gives other tokens for every key."""

    vocab: int  # ids are drawn below this
    text: bool  # words instead of ids: about as many tokens
    seed: int
    salt: int = 0  # the position in a sweep: its runs must not find each other's prompts in the cache

    def ids(self, count: int, *key: int) -> list[int]:
        drawn: list[int] = self.rng(*key).integers(self.vocab, size=count).tolist()
        return drawn

    def prompt(self, ids: Sequence[int]) -> Prompt:
        return "".join(f" {_WORDS[i % len(_WORDS)]}" for i in ids) if self.text else list(ids)

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.salt, *key])


# First parts of keys, so that purposes never share a generator.
_LENGTHS, _ARRIVALS, _SHARED, _OWN, _BLOCK = range(5)


@dataclass(frozen=True)
class Synthetic:
    """A made-up workload: lengths uniform from the first number to the second, both included."""

    conversations: int
    turns: int
    input_tokens: tuple[int, int]  # of each turn, without the history and the shared prefix
    output_tokens: tuple[int, int]
    shared_prefix: int  # tokens before the first turn, the same for all conversations
    rate: float  # conversations per second on average, exponential gaps; infinity: all at once

    def build(self, source: TokenSource) -> list[Conversation]:
        lengths, shape = source.rng(_LENGTHS), (self.conversations, self.turns)
        inputs = lengths.integers(*self.input_tokens, size=shape, endpoint=True).tolist()
        outputs = lengths.integers(*self.output_tokens, size=shape, endpoint=True).tolist()
        gaps = source.rng(_ARRIVALS).exponential(1 / self.rate, size=self.conversations)
        arrivals = (np.cumsum(gaps) - gaps[0]).tolist()
        shared = source.ids(self.shared_prefix, _SHARED)

        def turn(i: int, j: int) -> Turn:
            ids = (shared if j == 0 else []) + source.ids(inputs[i][j], _OWN, i, j)
            return Turn(lambda: source.prompt(ids), outputs[i][j])

        return [
            Conversation(arrivals[i], [turn(i, j) for j in range(self.turns)])
            for i in range(self.conversations)
        ]


OWN_BLOCK = 16  # tokens for each id of a prefix in our own format


class _Own(Struct):
    arrival_ms: _Arrival
    input_tokens: _Length
    output_tokens: _Count
    prefix: list[_Count] = []


class _Foreign(Struct):
    """Mooncake's line, and Qwen-Bailian's."""

    timestamp: _Arrival  # milliseconds; Qwen-Bailian's: seconds
    input_length: _Length
    output_length: _Count
    hash_ids: list[_Count] = []


@dataclass(frozen=True)
class TraceRequest:
    """A line of a trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int  # at least 1: a server generates no fewer
    hash_ids: Sequence[int]  # equal ids: equal blocks of the prompt, from its beginning
    block: int  # tokens for each hash id; the last block may be cut off by `input_tokens`


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a JSONL file, by arrival; its keys tell its format.

    Formats: our own (blocks of 16 tokens), Mooncake (512, times in milliseconds), Qwen-Bailian (16, seconds).

    Raises:
        ValueError: it cannot be read, or a line is none of these; the message names file and line.
    """
    requests = []
    try:
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            for number, line in islice(lines, limit):
                requests.append(_request(line, f"{path}, line {number}"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not requests:
        raise ValueError(f"{path} holds no requests")
    return sorted(requests, key=lambda request: request.arrival_s)


def replay(requests: Sequence[TraceRequest], speed: float, source: TokenSource) -> list[Conversation]:
    """Each request at its time after the first one, divided by `speed`."""
    start = requests[0].arrival_s

    def turn(number: int, request: TraceRequest) -> Turn:
        def prompt() -> Prompt:
            ids: list[int] = []
            for hash_id in request.hash_ids[: -(-request.input_tokens // request.block)]:
                ids += source.ids(request.block, _BLOCK, hash_id)
            ids = ids[: request.input_tokens]
            return source.prompt(ids + source.ids(request.input_tokens - len(ids), _OWN, number))

        return Turn(prompt, request.output_tokens)

    return [
        Conversation((request.arrival_s - start) / speed, [turn(number, request)])
        for number, request in enumerate(requests)
    ]


def _request(line: bytes, where: str) -> TraceRequest:
    try:
        found = msgspec.json.decode(line)
        if not isinstance(found, dict):
            raise ValueError("a request must be a JSON object")
        if "arrival_ms" in found:
            return _own(msgspec.convert(found, _Own))
        if "chat_id" in found:
            return _foreign(msgspec.convert(found, _Foreign), per_second=1, block=16)
        if "timestamp" in found:
            return _foreign(msgspec.convert(found, _Foreign), per_second=1000, block=512)
        raise ValueError(
            'no "arrival_ms" (our own format), "chat_id" (Qwen-Bailian) or "timestamp" (Mooncake)'
        )
    except ValueError as error:  # msgspec's errors are ValueErrors too
        raise ValueError(f"{where}: {error}") from error


def _own(line: _Own) -> TraceRequest:
    if OWN_BLOCK * len(line.prefix) > line.input_tokens:
        given = f"{len(line.prefix)} blocks of {OWN_BLOCK} tokens"
        raise ValueError(f"a prefix of {given} exceeds input_tokens, {line.input_tokens}")
    output = max(line.output_tokens, 1)
    return TraceRequest(line.arrival_ms / 1000, line.input_tokens, output, line.prefix, OWN_BLOCK)


def _foreign(line: _Foreign, per_second: int, block: int) -> TraceRequest:
    output = max(line.output_length, 1)
    return TraceRequest(line.timestamp / per_second, line.input_length, output, line.hash_ids, block)
