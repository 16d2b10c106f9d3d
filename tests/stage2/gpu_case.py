"""Requests whose tokens are forced, so that every engine scores the same sequences."""

import random
from collections.abc import Iterable, Iterator

import torch

from stages.interface import Engine, Request, SamplingParams
from stages.stage2_paged.attention.choice import choose
from tests.checkpoints import VOCAB_SIZE
from tests.oracle import run_engine

MEAN, MOST = 0.03, 0.25  # of log-probabilities; bfloat16 against float32 on a CPU: 0.008, 0.046
Scores = tuple[list[int], torch.Tensor]  # tokens, and the log-probability of each


def forced(lengths: Iterable[int], stem: int = 0) -> Iterator[Request]:
    """Each continues its random prompt with one token again and again. The prompts begin alike, for up to
    `stem` tokens."""
    rng = random.Random(0)
    shared = rng.choices(range(VOCAB_SIZE), k=stem)
    for i, length in enumerate(lengths):
        bias = {rng.randrange(VOCAB_SIZE): 100.0}
        params = SamplingParams(
            temperature=0.0, logit_bias=bias, logprobs=0, max_tokens=rng.randint(1, 40), ignore_eos=True
        )
        prompt = [*shared[: length - 1], *rng.choices(range(VOCAB_SIZE), k=length)][:length]
        yield Request(str(i), prompt, params)


def mixed_lengths(count: int) -> list[int]:
    """Prompts of 1 to 400 tokens, many of them around a page's end."""
    rng = random.Random(1)
    return [rng.choice([1, 15, 16, 17, 63, 64, 65, 255, 256, 257, rng.randint(1, 400)]) for _ in range(count)]


def score(engine: Engine, requests: Iterable[Request]) -> Scores:
    outputs = [o for each in run_engine(engine, requests).values() for o in each]
    tokens = [output.token_id for output in outputs]
    return tokens, torch.tensor([o.logprobs.chosen for o in outputs if o.logprobs is not None])


def assert_alike(actual: Scores, expected: Scores) -> None:
    assert actual[0] == expected[0]
    error = (actual[1] - expected[1]).abs()
    assert error.mean() < MEAN
    assert error.max() < MOST


def available(attention: str | None) -> str:
    """Why this machine cannot serve these backends; empty if it can."""
    try:
        choose(attention, torch.device("cuda"), torch.bfloat16)
    except ValueError as error:
        return str(error)
    return ""
