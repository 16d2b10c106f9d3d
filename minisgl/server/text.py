"""From tokens to the text of one choice: whole characters, stop strings, log-probabilities beside them."""

from collections import deque
from collections.abc import Sequence

from msgspec import Struct

from stages.interface import FinishReason, Request, TokenLogprobs, TokenOutput
from stages.stage1_naive.detokenizer import Detokenizer
from stages.stage1_naive.tokenizer import Tokenizer


class TextOptions(Struct, frozen=True):
    """How a request wants its tokens written."""

    stop: Sequence[str] = ()  # the text ends before any of these
    include_stop: bool = False  # or after it; also a stop token is written then
    skip_special_tokens: bool = True


class TokenText(Struct, frozen=True):
    """A token as log-probabilities show it: what it adds to the text, and the bytes of that. The first tokens
    of a character add nothing, the last one all of it; each has its own bytes."""

    token_id: int
    text: str
    bytes: bytes
    logprob: float | None  # None: the first token of a prompt has none


class ScoredToken(Struct, frozen=True):
    """A token and the most probable ones in its place. It begins `offset` characters into the text."""

    token: TokenText
    top: Sequence[TokenText]
    offset: int


class Piece(Struct, frozen=True):  # one for each token; a frozen dataclass costs more
    """What is new in a choice since its last piece. Without log-probabilities `tokens` is None."""

    index: int
    text: str
    token_ids: Sequence[int]
    tokens: Sequence[ScoredToken] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class _Scorer:
    """Log-probabilities beside a detokenizer, which settles each token's text now or a few tokens later."""

    def __init__(self, tokenizer: Tokenizer, detokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._open: deque[tuple[int, float | None, Sequence[TokenText]]] = deque()  # not settled
        self.offset = 0  # characters of all that is settled
        self.ready: deque[ScoredToken] = deque()

    def push(self, token_id: int, scores: TokenLogprobs | None) -> str:
        """Take in the next token; the text that is certain now. Without `scores` it is a prompt's first."""
        top = (
            [self._text(i, self._detokenizer.peek(i), logprob) for i, logprob in scores.top] if scores else []
        )
        self._open.append((token_id, scores.chosen if scores else None, top))
        return self._settle(self._detokenizer.settle(token_id))

    def finish(self) -> str:
        return self._settle(self._detokenizer.finish())

    def _settle(self, texts: Sequence[str]) -> str:
        for text in texts:
            if self._open:
                token_id, logprob, top = self._open.popleft()
                self.ready.append(ScoredToken(self._text(token_id, text, logprob), top, self.offset))
            elif self.ready:  # the end of the text, which the newest token left open
                last = self.ready.pop()
                token = self._text(last.token.token_id, last.token.text + text, last.token.logprob)
                self.ready.append(ScoredToken(token, last.top, last.offset))
            self.offset += len(text)
        return "".join(texts)

    def _text(self, token_id: int, text: str, logprob: float | None) -> TokenText:
        return TokenText(token_id, text, self._tokenizer.bytes_of(token_id, text), logprob)


class Choice:
    """One answer under way. `push` tokens in, `take` what has become certain out.

    Text is withheld while its end may be the beginning of a stop string, and tokens are withheld with
    their text. The text ends before the stop string that is complete first, however the tokens cut it.
    """

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer, options: TextOptions | None = None
    ) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None  # the text or the token of the request's that ended it
        self.completion_tokens = 0
        self.cached_tokens = 0  # of the prompt
        self.prompt: Sequence[ScoredToken] | None = None  # its log-probabilities, if they were asked for
        self._request = request
        self._tokenizer = tokenizer
        self._options = options or TextOptions()
        self._detokenizer = Detokenizer(tokenizer, request.prompt, self._options.skip_special_tokens)
        self._scorer: _Scorer | None = None
        if request.params.logprobs is not None:
            self._scorer = _Scorer(tokenizer, self._detokenizer)
        self._held = ""  # may yet become part of a stop string
        self._released = 0  # characters so far
        self._no_stop_until = 0  # characters, of `min_tokens`: no stop string may end there
        self._text: list[str] = []  # released, not taken
        self._token_ids: list[int] = []  # not taken
        self._tokens: list[ScoredToken] = []  # released, not taken

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        return self._request.prompt

    def show_prompt(self, scores: Sequence[TokenLogprobs] | None, echo: bool) -> None:
        """Before the first `push`: put the prompt before the answer, and keep the log-probabilities of its
        tokens if `scores` has them, of all but the first. Takes as long as the prompt is."""
        prompt, skip = self._request.prompt, self._options.skip_special_tokens
        if scores is None:
            text = self._tokenizer.decode(prompt, skip)
        else:
            scorer = _Scorer(self._tokenizer, Detokenizer(self._tokenizer, (), skip))
            texts = [scorer.push(i, score) for i, score in zip(prompt, (None, *scores), strict=True)]
            text = "".join(texts) + scorer.finish()
            self.prompt = tuple(scorer.ready)
        if echo:
            self._text.append(text)
            self._released += len(text)
            self._no_stop_until += len(text)
        if echo and self._scorer is not None:
            self._scorer.offset += len(text)
            self._tokens += self.prompt or ()

    def push(self, output: TokenOutput) -> None:
        """Take in the next token. Must not be called once `finish_reason` is set."""
        self.completion_tokens += 1
        self.cached_tokens = output.cached_tokens
        self._token_ids.append(output.token_id)
        ended, params = output.finish_reason, self._request.params
        early = self.completion_tokens <= params.min_tokens
        if ended == "stop" and output.token_id not in self._tokenizer.eos_token_ids:
            self.stop_reason = output.token_id if output.token_id in params.stop_token_ids else None
        if mark := "" if early else self._stop_mark(output.token_id):
            ended, self.stop_reason = "stop", mark
        if ended != "stop" or self._options.include_stop:  # a stop token is counted, and that is all
            self._held += self._write(output) + mark
        if ended:
            self._held += self._scorer.finish() if self._scorer else self._detokenizer.flush()
        if early:
            self._no_stop_until = self._released + len(self._held)
        if stop := self._find_stop():
            end, begin, self.stop_reason = stop
            self._release(end if self._options.include_stop else begin)
            self.finish_reason = "stop"
        elif ended:
            self._release(len(self._held), everything=True)
            self.finish_reason = ended
        else:
            self._release(len(self._held) - self._maybe_stop())

    def end(self) -> None:
        """Finish without an answer: the prompt was all that was wanted."""
        self.finish_reason = "length"

    def take(self) -> Piece | None:
        """What is new; None if there is nothing to say."""
        if not self._text and not self._tokens and not self.finish_reason:
            return None
        tokens = self._tokens if self._scorer else None
        text, ids = "".join(self._text), self._token_ids
        self._text, self._tokens, self._token_ids = [], [], []
        return Piece(self.index, text, ids, tokens, self.finish_reason, self.stop_reason)

    def _write(self, output: TokenOutput) -> str:
        if self._scorer:
            return self._scorer.push(output.token_id, output.logprobs)
        return self._detokenizer.push(output.token_id)

    def _stop_mark(self, token_id: int) -> str:
        """The stop string that is the name of this token, if that is special and adds no text; or nothing."""
        options = self._options
        if options.stop and options.skip_special_tokens and self._tokenizer.is_special(token_id):
            name = self._tokenizer.token(token_id)
            return name if name in options.stop else ""
        return ""

    def _find_stop(self) -> tuple[int, int, str] | None:
        """Where in the held text the stop string ends and begins that ends first; of several, the longest."""
        first_end = self._no_stop_until - self._released + 1
        hits = [
            (at + len(stop), at, stop)
            for stop in self._options.stop
            if (at := self._held.find(stop, max(0, first_end - len(stop)))) >= 0
        ]
        return min(hits) if hits else None

    def _maybe_stop(self) -> int:
        """How many characters at the end of the held text are the beginning of some stop string."""
        stops = self._options.stop
        if not stops:
            return 0
        for size in range(min(len(self._held), max(map(len, stops))), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in stops):
                return size
        return 0

    def _release(self, size: int, everything: bool = False) -> None:
        """Let go of the first characters that are held, and of the tokens that begin there; with `everything`
        also of those without text behind them."""
        if size:
            self._text.append(self._held[:size])
            self._held = self._held[size:]
            self._released += size
        ready = self._scorer.ready if self._scorer else deque[ScoredToken]()
        while ready and (everything or ready[0].offset < self._released):
            self._tokens.append(ready.popleft())
