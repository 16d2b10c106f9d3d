"""From tokens to the text of one choice: whole characters, stop strings, log-probabilities beside them."""

from collections import deque
from collections.abc import Sequence

from msgspec import Struct

from stages.interface import FinishReason, TokenLogprobs, TokenOutput
from stages.stage1_naive.tokenizer import Detokenizer, Tokenizer


class ScoredToken(Struct, frozen=True):
    """A token with its log-probabilities; its text begins `offset` characters into its choice's text."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs


class Piece(Struct, frozen=True):  # one for each token; a frozen dataclass costs more
    """What is new in a choice since its last piece. Without log-probabilities `tokens` is None."""

    index: int
    text: str
    tokens: Sequence[ScoredToken] | None
    finish_reason: FinishReason | None


class Choice:
    """One answer under way. `push` tokens in, `take` what has become certain out.

    Text is withheld while its end may be the beginning of a stop string, and tokens are withheld with
    their text. The text ends before the stop string that is complete first, however the tokens cut it.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.completion_tokens = 0
        self.cached_tokens = 0  # of the prompt
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._held = ""  # may yet become part of a stop string
        self._held_tokens: deque[ScoredToken] = deque()
        self._released = 0  # characters so far
        self._text: list[str] = []  # released, not taken
        self._tokens: list[ScoredToken] = []
        self._scored = False  # whether log-probabilities were asked for

    def push(self, output: TokenOutput) -> None:
        """Take in the next token. Must not be called once `finish_reason` is set."""
        self.completion_tokens += 1
        self.cached_tokens = output.cached_tokens
        self._scored = output.logprobs is not None
        is_text = output.finish_reason != "stop"  # a stop token is counted, and that is all
        if is_text and output.logprobs:
            offset = self._released + len(self._held)
            self._held_tokens.append(ScoredToken(output.token_id, offset, output.logprobs))
        self._held += self._detokenizer.push(output.token_id) if is_text else ""
        self._held += self._detokenizer.flush() if output.finish_reason else ""
        stop_at = self._find_stop()
        if stop_at is not None:
            self._release(stop_at)
            self._held_tokens.clear()
            self.finish_reason = "stop"
        elif output.finish_reason:
            self._release(len(self._held))
            self._tokens.extend(self._held_tokens)  # those without text
            self.finish_reason = output.finish_reason
        else:
            self._release(len(self._held) - self._maybe_stop())

    def take(self) -> Piece | None:
        """What is new; None if there is nothing to say."""
        if not self._text and not self._tokens and not self.finish_reason:
            return None
        tokens = self._tokens if self._scored else None
        piece = Piece(self.index, "".join(self._text), tokens, self.finish_reason)
        self._text, self._tokens = [], []
        return piece

    def _find_stop(self) -> int | None:
        """Where in the held text the stop string begins that ends first; of several, the longest."""
        if not self._stop:
            return None
        hits = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        return min(hits)[1] if hits else None

    def _maybe_stop(self) -> int:
        """How many characters at the end of the held text are the beginning of some stop string."""
        if not self._stop:
            return 0
        for size in range(min(len(self._held), max(map(len, self._stop))), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, size: int) -> None:
        if size:
            self._text.append(self._held[:size])
            self._held = self._held[size:]
            self._released += size
        while self._held_tokens and self._held_tokens[0].offset < self._released:
            self._tokens.append(self._held_tokens.popleft())
