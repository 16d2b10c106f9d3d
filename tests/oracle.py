"""The tie rule (DESIGN.md section 4, invariant 1): what it means that greedy tokens equal the oracle's.

Two correct programs round differently, so where the oracle's best two tokens are a hair apart either may
be chosen, and every later token differs. Such a tie ends the comparison of its request; it must be rare.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from stages.interface import Engine, Request, SamplingParams, TokenLogprobs, TokenOutput

TIE = 1e-4  # logits closer than this are a tie
MAX_TIED = 0.01  # the share of requests whose comparison may end in one


@dataclass(frozen=True)
class OracleRun:
    """A request's greedy tokens, and at each step the second best and how far behind the best it was."""

    tokens: Sequence[int]
    runners_up: Sequence[int]
    margins: Sequence[float]


def ends_in_tie(oracle: OracleRun, actual: Sequence[int]) -> bool:
    """Whether `actual` leaves the oracle's tokens at a tie; False: they are equal to the end.

    Raises:
        AssertionError: they differ where there is no tie, or one is longer than the other.
    """
    for step, (expected, token) in enumerate(zip(oracle.tokens, actual, strict=False)):
        if token != expected:
            assert oracle.margins[step] <= TIE, (
                f"step {step}: token {token} instead of {expected}, "
                f"which leads {oracle.runners_up[step]} by {oracle.margins[step]:.2e}"
            )
            assert token == oracle.runners_up[step], f"step {step}: token {token} is neither of the tied two"
            return True
    assert len(actual) == len(oracle.tokens), f"{len(actual)} tokens instead of {len(oracle.tokens)}"
    return False


def assert_same_greedy(runs: Iterable[tuple[OracleRun, Sequence[int]]]) -> None:
    """Hold many requests to the rule, the limit on how many may end in a tie included."""
    tied = [ends_in_tie(oracle, actual) for oracle, actual in runs]
    assert tied, "there is nothing to compare"
    assert sum(tied) < MAX_TIED * len(tied), f"{sum(tied)} of {len(tied)} requests end in a tie"


def run_engine(engine: Engine, requests: Iterable[Request]) -> dict[str, list[TokenOutput]]:
    """Add all the requests, step until nothing is left, and return each one's outputs."""
    outputs: dict[str, list[TokenOutput]] = {}
    for request in requests:
        engine.add(request)
        outputs[request.id] = []
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def run_arriving(
    engine: Engine, requests: Sequence[Request], rng: random.Random
) -> dict[str, list[TokenOutput]]:
    """As `run_engine`, but requests arrive between steps, and others that are aborted come and go."""
    outputs: dict[str, list[TokenOutput]] = {request.id: [] for request in requests}
    left, passing = list(requests), 0
    while left or engine.has_work:
        while left and (rng.random() < 0.6 or not engine.has_work):
            engine.add(left.pop(0))
        if rng.random() < 0.2:
            passing += 1
            engine.add(
                Request(f"passing {passing}", [passing % 7 + 1] * rng.randint(1, 20), SamplingParams())
            )
        if rng.random() < 0.2 or not left:
            engine.abort(f"passing {rng.randint(0, passing)}")
        if not left and not any(not o or o[-1].finish_reason is None for o in outputs.values()):
            for i in range(passing):
                engine.abort(f"passing {i + 1}")
        for output in engine.step():
            if output.request_id in outputs:
                outputs[output.request_id].append(output)
    return outputs


def random_request(rng: random.Random, name: str, lengths: Sequence[int], vocab_size: int) -> Request:
    """A request with any of the ways to sample, most of them rarely."""

    def rarely(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.3 else otherwise

    tokens = range(vocab_size)
    max_tokens = rng.randint(1, 24)
    allowed = rarely(rng.sample(tokens, rng.randint(30, 40)), None)
    words = [rng.choices(allowed or tokens, k=rng.choice([2, 2, 3])) for _ in range(80)]
    params = SamplingParams(
        temperature=rarely(0.0, rng.choice([0.5, 1.0, 2.0])),
        top_k=rarely(rng.randint(1, 50), 0),
        top_p=rarely(rng.uniform(0.3, 1.0), 1.0),
        min_p=rarely(rng.uniform(0.0, 0.3), 0.0),
        frequency_penalty=rarely(rng.uniform(-1, 2), 0.0),
        presence_penalty=rarely(rng.uniform(-1, 2), 0.0),
        repetition_penalty=rarely(rng.uniform(0.7, 1.5), 1.0),
        logit_bias=rarely({rng.choice(tokens): rng.uniform(-5, 5) for _ in range(5)}, {}),
        allowed_token_ids=allowed,
        bad_words_ids=rarely([*words, rng.choices(tokens)], ()),
        logprobs=rarely(rng.randint(0, 5), None),
        prompt_logprobs=rarely(rng.randint(0, 5), None),
        max_tokens=max_tokens,
        min_tokens=rarely(rng.randint(1, max_tokens), 0),
        stop_token_ids=rarely(rng.sample(tokens, 20), ()),
        ignore_eos=rng.random() < 0.5,
    )
    prompt = rng.choices(tokens, k=rng.choice(lengths))
    return Request(name, prompt, params, seed=rng.getrandbits(63))


def assert_same_outputs(expected: Sequence[TokenOutput], actual: Sequence[TokenOutput]) -> None:
    """Tokens and ends equal; log-probabilities within float64's rounding."""
    assert tokens_of(actual) == tokens_of(expected)
    assert [o.finish_reason for o in actual] == [o.finish_reason for o in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_logprobs([theirs.logprobs], [ours.logprobs])
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        assert_same_logprobs(theirs.prompt_logprobs or (), ours.prompt_logprobs or ())


def assert_same_logprobs(
    expected: Sequence[TokenLogprobs | None], actual: Sequence[TokenLogprobs | None]
) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.chosen == pytest.approx(theirs.chosen, abs=1e-9)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
            values = [value for _, value in theirs.top]
            assert [value for _, value in ours.top] == pytest.approx(values, abs=1e-9)


def tokens_of(outputs: Iterable[TokenOutput]) -> list[int]:
    return [output.token_id for output in outputs]


def greedy_request(prompt: Sequence[int], steps: int, name: str = "greedy") -> Request:
    """Exactly `steps` greedy tokens, with the log-probabilities that show how close the second best is."""
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, logprobs=2)
    return Request(name, prompt, params)


def from_engine(engine: Engine, prompt: Sequence[int], steps: int) -> OracleRun:
    """An engine's greedy run as the oracle of another's."""
    return oracle_run(run_engine(engine, [greedy_request(prompt, steps)])["greedy"])


def oracle_run(outputs: Sequence[TokenOutput]) -> OracleRun:
    """What a `greedy_request` brought."""
    tops = [output.logprobs.top for output in outputs if output.logprobs is not None]
    return OracleRun(
        tokens=tokens_of(outputs),
        runners_up=[second[0] for _, second in tops],
        margins=[first[1] - second[1] for first, second in tops],
    )


def from_transformers(model: Any, prompt: Sequence[int], steps: int) -> OracleRun:
    """The greedy run of a `transformers` model by its own `generate`."""
    model.generation_config.eos_token_id = None  # `steps` tokens, whatever they are
    model.generation_config.pad_token_id = 0
    generate: Callable[..., Any] = model.generate
    result = generate(
        torch.tensor([list(prompt)], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=model.device),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.cat(result.logits).topk(2, dim=-1)  # [steps, 2]
    return OracleRun(
        tokens=result.sequences[0, len(prompt) :].tolist(),
        runners_up=top.indices[:, 1].tolist(),
        margins=(top.values[:, 0] - top.values[:, 1]).tolist(),
    )
