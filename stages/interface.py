"""The nouns every stage shares: what goes into an engine, what comes out, and what an engine is.

An engine speaks token ids only. Text lives above it, in the tokenizer and the server.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Protocol

FinishReason = Literal["stop", "length", "error"]
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn, and when the request is over.

    The logits are penalised, biased and masked, divided by the temperature, and cut by top-k, then top-p,
    then min-p; the token is drawn from what is left.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest most probable tokens that hold this much probability, at least one
    min_p: float = 0.0  # keep tokens at least this fraction as probable as the most probable one
    frequency_penalty: float = 0.0  # subtracted once for every time a token was generated
    presence_penalty: float = 0.0  # subtracted once from every token that was generated
    repetition_penalty: float = 1.0  # divides (or multiplies) the logit of every token in prompt or output
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    allowed_token_ids: Sequence[int] | None = None  # only these may be drawn; None: all
    bad_words_ids: Sequence[Sequence[int]] = ()  # none of these sequences may appear in the output
    logprobs: int | None = None  # None: none; n: the chosen token's, and those of the n most probable
    prompt_logprobs: int | None = None  # the same of the prompt's own tokens
    seed: int | None = None  # for who makes the request: engines read `Request.seed` alone
    max_tokens: int | None = None  # None: until the context is full
    min_tokens: int = 0  # no stop token, the model's own or the request's, before so many tokens
    stop_token_ids: Sequence[int] = ()  # these end the request, besides the model's own
    ignore_eos: bool = False  # the model's own stop tokens do not end the request

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            raise ValueError("allowed_token_ids must be at least one token, but none was given")
        if not all(len(word) for word in self.bad_words_ids):
            raise ValueError("bad_words_ids must be at least one token each, but none was given")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _whole(name, count, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _whole("min_tokens", self.min_tokens, 0, 2**31 - 1)

    @cached_property  # asked at every step
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or bool(self.frequency_penalty or self.presence_penalty)

    @cached_property
    def has_filters(self) -> bool:
        return bool(self.top_k or self.min_p) or self.top_p < 1


def _whole(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, but {value!r} was given")
    _within(name, value, low, high)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} must be from {low} to {high}, but {value} was given")


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `n` choices of an API call are `n` requests.

    `seed` is drawn by whoever makes the request, so that an engine depends only on the calls made to
    it; a request with the same prompt, parameters and seed gets the same tokens.
    """

    id: str
    prompt: Sequence[int]  # token ids, at least one
    params: SamplingParams
    seed: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural logarithm) of one position, of the model's own distribution:
    before penalties, bias, temperature and filters."""

    chosen: float
    top: Sequence[tuple[int, float]]  # (token id, logprob), most probable first


@dataclass(frozen=True)
class TokenOutput:
    """One new token of one request. `finish_reason` is set on a request's last one: "stop" if the
    token is a stop token (it is counted, but not part of the text), "length" if no more may follow, "error"
    if none could be drawn (0 stands there): the logits were NaN or infinite, or `bad_words_ids` left nothing.
    """

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0  # of the request's prompt: found in a prefix cache when it was admitted
    # with a request's first token, if it asked: of each token of its prompt but the first
    prompt_logprobs: Sequence[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Statistics:
    """An engine at a glance. What an engine does not have stays 0."""

    COUNTERS: ClassVar = ("evicted_pages", "preemptions", "prompt_tokens", "cached_tokens")  # since the start

    running: int = 0  # requests
    waiting: int = 0
    pages: int = 0  # of the KV cache: free, cached, or owned by a running request
    free_pages: int = 0
    cached_pages: int = 0
    evicted_pages: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0  # of the requests that were admitted
    cached_tokens: int = 0  # those of them that the prefix cache had

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that the prefix cache had, from 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class RequestRefused(ValueError):
    """A request this engine can never serve; the message says why and what would be served, and `param` names
    the field of the request that is at fault, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineFailed(RuntimeError):
    """The engine cannot go on, for a reason outside its code; the message says it all."""


class Engine(Protocol):
    """Serves many requests, one `step` at a time. Not thread-safe: one thread calls everything."""

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and output together, that one request may have."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    @property
    def statistics(self) -> Statistics:
        """What there is now, and what was counted since the start."""

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestRefused: it can never be served; nothing was queued.
        """

    def abort(self, request_id: str) -> None:
        """Forget a request at once; unknown or finished ids are ignored. No output follows."""

    def step(self) -> list[TokenOutput]:
        """Do one unit of work and return the tokens that it brought, possibly none."""

    def close(self) -> None:
        """End what it started, such as processes; the last call."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What every stage's engine is built from. A stage that needs more extends this class.

    The command line is made from the fields: each is annotated with the help of its flag.
    """

    model: Annotated[str, "a folder in Hugging Face format, or a hub name"]
    device: Annotated[str, "cpu, cuda or cuda:N; auto takes a GPU if there is one"] = "auto"
    dtype: Annotated[
        str, "bfloat16, float16, float32 or float64; auto: the model's own, and float32 on a CPU"
    ] = "auto"
    max_context: Annotated[int | None, "cap the context, in tokens, below what the model allows"] = None
    random_weights: Annotated[
        bool, "random weights of the model's shape: only its config.json is read, to measure speed"
    ] = False


class Stage(Protocol):
    """What a stage's `engine` module offers."""

    EngineConfig: type[Any]  # EngineConfig or an extension of it

    def build(self, config: Any) -> Engine:
        """Load the model and assemble the engine.

        Raises:
            ValueError: the model or the configuration cannot be served; the message says why.
        """
