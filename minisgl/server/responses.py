"""What clients receive: the JSON of the two endpoints."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from msgspec.json import encode

from minisgl.server.calls import Call
from minisgl.server.text import Choice, Piece, ScoredToken
from stages.interface import Statistics
from stages.stage1_naive.tokenizer import Tokenizer

Json = dict[str, Any]


class ChatFormat:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self, choice: Choice) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def entry(self, piece: Piece) -> Json:
        return {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def choice(self, piece: Piece) -> Json:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[ScoredToken] | None) -> Json | None:
        if tokens is None:
            return None
        content = [
            self._token(token.token_id, token.logprobs.chosen)
            | {"top_logprobs": [self._token(*top) for top in token.logprobs.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        text = self._tokenizer.token(token_id)
        # A token may be part of a character; its text is then U+FFFD, which does not tell the bytes.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class CompletionFormat:
    kind = chunk_kind = "text_completion"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self, choice: Choice) -> list[Json]:
        return []

    def entry(self, piece: Piece) -> Json:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    choice = entry

    def _logprobs(self, tokens: Sequence[ScoredToken] | None) -> Json | None:
        if tokens is None:
            return None
        return {
            "tokens": [self._tokenizer.token(token.token_id) for token in tokens],
            "token_logprobs": [token.logprobs.chosen for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ScoredToken) -> dict[str, float]:
        """The most probable tokens and the chosen one, by their text."""
        ranked = [*token.logprobs.top, (token.token_id, token.logprobs.chosen)]
        by_text: dict[str, float] = {}
        for token_id, logprob in ranked:
            by_text.setdefault(self._tokenizer.token(token_id), logprob)  # of equal texts, the most probable
        return by_text


Format = ChatFormat | CompletionFormat


def answer(call: Call, form: Format, choices: Sequence[Choice]) -> Json:
    """The whole answer to a call whose choices have all finished."""
    pieces = [piece for choice in choices if (piece := choice.take())]
    return _envelope(call, form.kind) | {
        "choices": [form.choice(piece) for piece in pieces],
        "usage": _usage(call, choices),
    }


def frame(call: Call, form: Format) -> tuple[bytes, bytes]:
    """What stands in each event of a stream before and after its one entry, which alone differs."""
    usage: Json = {"usage": None} if call.body.include_usage else {}
    event = encode(_envelope(call, form.chunk_kind) | {"choices": []} | usage)
    before, key, after = event.partition(b'"choices":[')  # within a text the quotes would be escaped
    return before + key, after


def usage_chunk(call: Call, form: Format, choices: Sequence[Choice]) -> Json:
    """The last event of a stream whose client asked for its usage."""
    return _envelope(call, form.chunk_kind) | {"choices": [], "usage": _usage(call, choices)}


def _envelope(call: Call, kind: str) -> Json:
    return {"id": call.id, "object": kind, "created": call.created, "model": call.body.model}


def _usage(call: Call, choices: Sequence[Choice]) -> Json:
    completion = sum(choice.completion_tokens for choice in choices)
    firsts = choices[:: call.body.n or 1]  # a prompt counts once, however many its choices
    cached = sum(choice.cached_tokens for choice in firsts)
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": call.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def as_metrics(statistics: Statistics) -> str:
    """The engine's statistics in Prometheus's text format."""
    lines = []
    for name, value in [*asdict(statistics).items(), ("hit_rate", statistics.hit_rate)]:
        kind, name = ("counter", f"{name}_total") if name in Statistics.COUNTERS else ("gauge", name)
        lines.append(f"# TYPE minisgl_{name} {kind}\nminisgl_{name} {value}\n")
    return "".join(lines)
