"""Requests whose tokens are forced, so that every engine scores the same sequences."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from stages.interface import Engine, Request, SamplingParams
from stages.stage2_paged.attention.choice import choose
from tests.checkpoints import VOCAB_SIZE
from tests.oracle import run_engine
from tests.stage2.bad_case import BAD

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


def with_mask(request: Request) -> Request:
    """A request of `forced` again: the one token is all that it may draw."""
    params = replace(request.params, allowed_token_ids=list(request.params.logit_bias), logit_bias={})
    return replace(request, params=params)


def without_bad(request: Request) -> Request:
    """A request of `forced` again, without the token that a model of `write_bad` cannot compute."""
    token = next(iter(request.params.logit_bias))
    params = replace(request.params, logit_bias={token if token != BAD else 0: 100.0})
    return replace(request, prompt=[t if t != BAD else 0 for t in request.prompt], params=params)


def with_bad(request: Request, where: int) -> Request:
    """Another request, that has that token."""
    prompt = list(request.prompt)
    prompt[where % len(prompt)] = BAD
    return replace(request, id=f"bad {request.id}", prompt=prompt)


def assert_bad_neighbours_do_no_harm(engine: Any, fresh: Engine, lengths: list[int], stem: int) -> None:
    """Half of the requests fail; those of the other half say what they say alone, on `fresh`. All pages hold
    keys that are NaN before, as failed requests leave them."""
    runner = getattr(engine._runner, "_eager", engine._runner)
    runner._attention._prefill._cache.keys.fill_(torch.nan)
    good = [without_bad(request) for request in forced(lengths, stem)]
    bad = [with_bad(request, 7 * i) for i, request in enumerate(good)]
    alone = score(fresh, good)
    outputs = run_engine(engine, [request for pair in zip(bad, good, strict=True) for request in pair])
    assert all(outputs[request.id][-1].finish_reason == "error" for request in bad)
    beside = [output for request in good for output in outputs[request.id]]
    scores = torch.tensor([o.logprobs.chosen for o in beside if o.logprobs is not None])
    assert_alike(([output.token_id for output in beside], scores), alone)


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
