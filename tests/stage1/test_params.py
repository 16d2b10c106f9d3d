"""Ranges of the sampling parameters, and finding a stage by its number."""

import math
import sys
from collections.abc import Callable

import pytest

import stages
from stages import load_stage
from stages.interface import EngineConfig, SamplingParams

Make = Callable[..., SamplingParams]
make: Make = SamplingParams

ALLOWED = {
    "temperature": [0, 0.0, 1e-9, 1.0, 2, 100.0],
    "top_p": [0, 0.0, 1e-3, 0.5, 1, 1.0],
    "min_p": [0, 0.0, 0.5, 1.0],
    "frequency_penalty": [-2.0, 0, 2.0],
    "presence_penalty": [-2.0, 0, 2.0],
    "repetition_penalty": [0.1, 1, 10.0],
    "top_k": [0, 1, 2**31 - 1],
    "logit_bias": [{}, {0: 100.0}, {5: -100, 7: 0.5}],
    "logprobs": [None, 0, 20],
    "seed": [None, 0, -1, 2**63 - 1, -(2**63)],
    "max_tokens": [None, 1, 2**31 - 1],
    "min_tokens": [0, 1, 2**31 - 1],
    "prompt_logprobs": [None, 0, 20],
    "allowed_token_ids": [None, [3], (3, 0, 3)],
    "bad_words_ids": [(), [], [[3]], [(3, 4), [5]]],
}
REFUSED = {
    "temperature": [-0.1, 100.1, math.nan, math.inf],
    "top_p": [-0.5, 1.01, math.nan],
    "min_p": [-0.01, 1.01, math.nan],
    "frequency_penalty": [-2.01, 2.01, math.nan, -math.inf],
    "presence_penalty": [-2.01, 2.01, math.nan],
    "repetition_penalty": [0.0, -1.0, 10.1, math.nan],
    "top_k": [-1, 2**31, math.nan],
    "logit_bias": [{0: 100.1}, {5: 1.0, 7: math.nan}, {1: -math.inf}],
    "logprobs": [-1, 21],
    "seed": [2**63, -(2**63) - 1],
    "max_tokens": [0, -1, 2**31],
    "min_tokens": [-1, 2**31],
    "prompt_logprobs": [-1, 21],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in ALLOWED for value in ALLOWED[name]])
def test_values_in_range(name: str, value: object) -> None:
    assert getattr(make(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    given = str(value if not isinstance(value, dict) else list(value.values())[-1])
    with pytest.raises(ValueError, match=rf"^{name} .*must be .*, but") as caught:
        make(**{name: value})
    assert given in str(caught.value)


@pytest.mark.parametrize("name", ["top_k", "logprobs", "seed", "max_tokens", "min_tokens", "prompt_logprobs"])
def test_whole_numbers_only(name: str) -> None:
    """`max_tokens=2.5` would never be reached, and half a seed is none."""
    with pytest.raises((ValueError, TypeError), match=name):
        make(**{name: 2.5})


@pytest.mark.parametrize(
    ("name", "value"), [("allowed_token_ids", []), ("bad_words_ids", [[]]), ("bad_words_ids", [[1], ()])]
)
def test_no_tokens_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*at least one token"):
        make(**{name: value})


def test_the_default_is_the_models_own_distribution() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)


def test_stages_are_found_by_number() -> None:
    stage = load_stage(1)
    assert stage is sys.modules["stages.stage1_naive.engine"]
    assert issubclass(stage.EngineConfig, EngineConfig)
    assert load_stage() is load_stage(stages.LATEST)


@pytest.mark.parametrize("number", [0, -1, 99, "1", None])
def test_stages_that_are_not(number: object) -> None:
    find: Callable[..., object] = load_stage
    with pytest.raises(ValueError, match=rf"there is no stage {number}; the stages are 1"):
        find(number)
