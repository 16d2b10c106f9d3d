"""What every way in (server, `LLM`, shell) does to make an engine's request of tokens and parameters."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stages.interface import Request, SamplingParams
from stages.stage1_naive.tokenizer import Tokenizer


def sampling_params(defaults: Mapping[str, float], given: Mapping[str, Any]) -> SamplingParams:
    """What is `given` and not None; else a model's `defaults`; else OpenAI's, those of `SamplingParams`.

    Raises:
        ValueError: a value is out of its range, or there is no such parameter.
    """
    values = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    try:
        return SamplingParams(**values)
    except TypeError as error:
        raise ValueError(f"SamplingParams: {error}") from error


def make_request(
    name: str, prompt: Sequence[int], params: SamplingParams, tokenizer: Tokenizer, choice: int = 0
) -> Request:
    """The request for one of the choices of a prompt.

    The tokenizer's own end token ends it, besides those that the model's configuration names. Its seed is
    drawn; where one was asked for, each choice has another, and the first has that one.
    """
    seed = secrets.randbits(63)
    if params.seed is not None:
        seed = (params.seed + choice + 2**63) % 2**64 - 2**63  # in 64 bits with a sign
    if not params.ignore_eos and tokenizer.eos_token_ids:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *tokenizer.eos_token_ids))
    return Request(name, prompt, params, seed)
