"""What clients receive: the JSON of the two endpoints."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from msgspec import Raw
from msgspec.json import encode

from minisgl.server.calls import Call
from minisgl.server.text import Choice, Piece, ScoredToken, TokenText
from stages.interface import Statistics

Json = dict[str, Any]


class ChatFormat:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, call: Call, choice: Choice) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        entry = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [{"choices": [entry]} | _prompt(call, choice)]

    def entry(self, piece: Piece) -> Json:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.index, "delta": delta, "logprobs": self._logprobs(piece.tokens)} | _end(piece)

    def whole(self, call: Call, choices: Sequence[Choice], pieces: Sequence[Piece]) -> Json:
        entries = []
        for piece in pieces:
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            logprobs = self._logprobs(piece.tokens)
            entry = {"index": piece.index, "message": message, "logprobs": logprobs} | _end(piece)
            entries.append(Raw(encode(entry | _token_ids(call, piece))))
        return {"choices": entries} | _prompt(call, choices[0])

    def _logprobs(self, tokens: Sequence[ScoredToken] | None) -> Json | None:
        if tokens is None:
            return None
        content = [
            Raw(
                encode(self._token(scored.token) | {"top_logprobs": [self._token(top) for top in scored.top]})
            )
            for scored in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: TokenText) -> Json:
        return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.bytes)}


class CompletionFormat:
    kind = chunk_kind = "text_completion"

    def opening(self, call: Call, choice: Choice) -> list[Json]:
        entry = {"index": choice.index, "text": "", "logprobs": None, "finish_reason": None}
        return [{"choices": [entry | prompt]}] if (prompt := _prompt(call, choice)) else []

    def entry(self, piece: Piece) -> Json:
        logprobs = self._logprobs(piece.tokens)
        return {"index": piece.index, "text": piece.text, "logprobs": logprobs} | _end(piece)

    def whole(self, call: Call, choices: Sequence[Choice], pieces: Sequence[Piece]) -> Json:
        entries = [
            Raw(encode(self.entry(piece) | _token_ids(call, piece) | _prompt(call, choice)))
            for choice, piece in zip(choices, pieces, strict=True)
        ]
        return {"choices": entries}

    def _logprobs(self, tokens: Sequence[ScoredToken] | None) -> Json | None:
        if tokens is None:
            return None
        return {
            "tokens": [scored.token.text for scored in tokens],
            "token_logprobs": [_finite(scored.token.logprob) for scored in tokens],
            "top_logprobs": [Raw(encode(self._top(scored))) for scored in tokens],
            "text_offset": [scored.offset for scored in tokens],
        }

    def _top(self, scored: ScoredToken) -> dict[str, float | None] | None:
        """The most probable tokens and the chosen one, by their text. Of several with the same text all but
        the most probable go by their number, written as vLLM does."""
        if scored.token.logprob is None:
            return None
        by_text: dict[str, float | None] = {}
        for token_id, token in {token.token_id: token for token in (*scored.top, scored.token)}.items():
            name = token.text if token.text not in by_text else f"token_id:{token_id}"
            by_text[name] = _finite(token.logprob)
        return by_text


Format = ChatFormat | CompletionFormat


def _end(piece: Piece) -> Json:
    stop_reason = {"stop_reason": piece.stop_reason} if piece.finish_reason else {}
    return {"finish_reason": piece.finish_reason} | stop_reason


def _token_ids(call: Call, piece: Piece) -> Json:
    return {"token_ids": piece.token_ids} if call.body.return_token_ids else {}


def _prompt(call: Call, choice: Choice) -> Json:
    """What the client asked for about the prompt, in vLLM's fields."""
    fields: Json = {}
    if call.body.return_token_ids:
        fields["prompt_token_ids"] = choice.prompt_token_ids
    if call.body.prompt_logprobs is not None and choice.prompt is not None:
        fields["prompt_logprobs"] = [Raw(encode(_ranked(scored))) for scored in choice.prompt]
    return fields


def _ranked(scored: ScoredToken) -> Json | None:
    """The most probable tokens and the prompt's own, by their number; None for the first of the prompt."""
    if scored.token.logprob is None:
        return None
    ranks = {token.token_id: rank for rank, token in enumerate(scored.top, 1)}
    return {
        str(token.token_id): {
            "logprob": _finite(token.logprob),
            "rank": ranks.get(token.token_id),
            "decoded_token": token.text,
        }
        for token in (*scored.top, scored.token)
    }


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; other servers, too, write this for a probability of 0."""
    return logprob if logprob is None else max(logprob, -9999.0)


def answer(call: Call, form: Format, choices: Sequence[Choice]) -> bytes:
    """The whole answer to a call whose choices have all finished. It is encoded in small parts, each of which
    holds the interpreter for a short time only."""
    pieces = [piece for choice in choices if (piece := choice.take())]
    content = form.whole(call, choices, pieces)
    return encode(_envelope(call, form.kind) | content | {"usage": _usage(call, choices)})


def opening(call: Call, form: Format, choices: Sequence[Choice]) -> list[Json]:
    """The first events of a stream."""
    usage: Json = {"usage": None} if call.body.include_usage else {}
    contents = [content for choice in choices for content in form.opening(call, choice)]
    return [_envelope(call, form.chunk_kind) | content | usage for content in contents]


class Frame:
    """Makes the events of a stream, of which little differs but their one entry."""

    def __init__(self, call: Call, form: Format) -> None:
        self._call = call
        self._form = form
        self._before = encode(_envelope(call, form.chunk_kind)).removesuffix(b"}") + b',"choices":['
        self._after = b'],"usage":null}' if call.body.include_usage else b"]}"

    def events(self, pieces: Sequence[Piece], choices: Sequence[Choice]) -> bytes:
        """An event for each piece; `choices` are all of the call."""
        call, after = self._call, self._after
        if call.body.continuous_usage:
            after = b'],"usage":%b}' % encode(_usage(call, choices))
        return b"".join(
            b"data: %b%b%b\n\n"
            % (self._before, encode(self._form.entry(piece) | _token_ids(call, piece)), after)
            for piece in pieces
        )


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
