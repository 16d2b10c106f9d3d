"""What a model can serve, and when a request is over: the same answers in every stage."""

import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import chain

from stages.interface import FinishReason, Request, RequestRefused, SamplingParams
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.mask import RequestMask, needs_mask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    vocab_size: int
    context_length: int  # tokens of prompt and output together
    eos_token_ids: frozenset[int]

    @classmethod
    def of(cls, config: ModelConfig, max_context: int | None) -> "Limits":
        """The model's own, or a shorter context.

        Raises:
            ValueError: `max_context` is more than the model was made for, or less than 2.
        """
        if max_context is not None and not 2 <= max_context <= config.context_length:
            raise ValueError(
                f"max_context must be from 2 to the model's {config.context_length}, not {max_context}"
            )
        return cls(config.vocab_size, max_context or config.context_length, frozenset(config.eos_token_ids))

    def check(self, request: Request, known: Container[str]) -> None:
        """Refuse what can never be served. `known` are the ids of the requests being served.

        Raises:
            RequestRefused: the id is taken, the seed too large, the prompt is empty or too long, something
                names tokens the model does not have, or no token may be drawn.
        """
        if request.id in known:
            raise RequestRefused(f"a request with the id {request.id!r} is being served already")
        for param, problem in self._problems(request):
            raise RequestRefused(problem, param)

    def _problems(self, request: Request) -> Iterator[tuple[str, str]]:
        """Fields of the request, and what is wrong with them."""
        params, length, context = request.params, len(request.prompt), self.context_length
        most, tokens, room = params.max_tokens, f"{length} tokens", f"the context of {context}"
        if not -(2**63) <= request.seed < 2**63:
            yield "seed", f"the seed {request.seed} does not fit into 64 bits"
        if not length:
            yield "prompt", "the prompt has no tokens; at least one is needed"
        if length >= context:
            yield "prompt", f"the prompt has {tokens}, which leaves no room for an answer in {room}"
        if most is not None and length + most > context:
            yield "max_tokens", f"the prompt's {tokens} and max_tokens {most} together exceed {room}"
        if most is not None and params.min_tokens > most:
            yield "min_tokens", f"min_tokens must be at most max_tokens {most}, but is {params.min_tokens}"
        for name, token_ids in (
            ("the prompt", request.prompt),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words_ids", chain.from_iterable(params.bad_words_ids)),
        ):
            for token in token_ids:
                if not 0 <= token < self.vocab_size:
                    problem = f"{name} has the token id {token}; the model's are 0 to {self.vocab_size - 1}"
                    yield name.removeprefix("the "), problem
        if (mask := self.mask(params)) and not mask.row(request.prompt, length).any():
            name = "bad_words_ids" if params.allowed_token_ids is None else "allowed_token_ids"
            yield name, "allowed_token_ids, bad_words_ids and min_tokens together leave no token to draw"

    def mask(self, params: SamplingParams) -> RequestMask | None:
        """What makes the masks of a request with these parameters, if it ever needs one."""
        if not needs_mask(params, 0):
            return None
        return RequestMask(params, self.vocab_size, {*self.eos_token_ids, *params.stop_token_ids})

    def finish_reason(self, request: Request, num_output: int, token_id: int) -> FinishReason | None:
        """Whether the request ends with `token_id`, its output token number `num_output` (from 1). -1 is no
        token: none could be drawn, which is logged."""
        params = request.params
        if token_id < 0:
            logger.error(
                "request %r ends with an error: its logits are NaN or infinite, or its bad_words_ids leave "
                "no token; others go on",
                request.id,
            )
            return "error"
        if token_id in params.stop_token_ids or (token_id in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        if num_output == params.max_tokens or len(request.prompt) + num_output == self.context_length:
            return "length"
        return None
