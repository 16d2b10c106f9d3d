"""What a model can serve, and when a request is over: the same answers in every stage."""

import logging
from collections.abc import Container
from dataclasses import dataclass

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
        prompt, params = request.prompt, request.params
        if request.id in known:
            raise RequestRefused(f"a request with the id {request.id!r} is being served already")
        if not -(2**63) <= request.seed < 2**63:
            raise RequestRefused(f"the seed {request.seed} does not fit into 64 bits", "seed")
        if not prompt:
            raise RequestRefused("the prompt has no tokens; at least one is needed", "prompt")
        if len(prompt) >= self.context_length:
            raise RequestRefused(
                f"the prompt has {len(prompt)} tokens, which leaves no room for an answer "
                f"in the context of {self.context_length}",
                "prompt",
            )
        if params.max_tokens is not None and len(prompt) + params.max_tokens > self.context_length:
            raise RequestRefused(
                f"the prompt's {len(prompt)} tokens and max_tokens {params.max_tokens} together exceed "
                f"the context of {self.context_length}",
                "max_tokens",
            )
        if params.max_tokens is not None and params.min_tokens > params.max_tokens:
            raise RequestRefused(
                f"min_tokens must be at most max_tokens {params.max_tokens}, but is {params.min_tokens}",
                "min_tokens",
            )
        for name, token_ids in (
            ("the prompt", prompt),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", () if params.allowed_token_ids is None else params.allowed_token_ids),
            ("bad_words_ids", [token for word in params.bad_words_ids for token in word]),
        ):
            wrong = next((token for token in token_ids if not 0 <= token < self.vocab_size), None)
            if wrong is not None:
                raise RequestRefused(
                    f"{name} has the token id {wrong}; the model's are from 0 to {self.vocab_size - 1}",
                    name.removeprefix("the "),
                )
        if (mask := self.mask(params)) and not mask.row(prompt, len(prompt)).any():
            raise RequestRefused(
                "allowed_token_ids, bad_words_ids and min_tokens together leave no token that may be drawn",
                "bad_words_ids" if params.allowed_token_ids is None else "allowed_token_ids",
            )

    def mask(self, params: SamplingParams) -> RequestMask | None:
        """What makes the masks of a request with these parameters, if it ever needs one."""
        if not needs_mask(params, 0):
            return None
        return RequestMask(params, self.vocab_size, {*self.eos_token_ids, *params.stop_token_ids})

    def finish_reason(self, request: Request, num_output: int, token_id: int) -> FinishReason | None:
        """Whether the request ends with `token_id`, its output token number `num_output` (from 1)."""
        params = request.params
        if token_id in params.stop_token_ids or (token_id in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        if num_output == params.max_tokens or len(request.prompt) + num_output == self.context_length:
            return "length"
        return None


def report_error(request: Request) -> None:
    """Say for which request, the first of an engine's, no token could be drawn."""
    logger.error(
        "request %r ends with an error: its logits are NaN or infinite, or its bad_words_ids leave no token; "
        "others go on, and no more of this kind are logged",
        request.id,
    )
