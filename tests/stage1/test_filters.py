"""Penalties and filters against plain Python that was written from their definitions alone."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, currently_in_test_context, given
from hypothesis import strategies as st
from torch import Tensor

from stages.interface import Request, SamplingParams
from stages.stage1_naive.sampling import SamplingBatch, sample

CPU = torch.device("cpu")
LOGITS = st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=24)


def penalised(
    logits: Sequence[float], params: SamplingParams, prompt: list[int], out: list[int]
) -> list[float]:
    result = []
    for token, logit in enumerate(logits):
        if token in prompt or token in out:
            penalty = params.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= params.frequency_penalty * out.count(token)
        logit -= params.presence_penalty * (token in out)
        result.append(logit + params.logit_bias.get(token, 0.0))
    return result


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def kept(logits: Sequence[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that survive; those that tie with the last survivor do too. Skips a draw at a boundary."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or None]
    probs = softmax([logits[token] for token in order])
    chosen, mass = [], 0.0
    for token, prob in zip(order, probs, strict=True):
        if currently_in_test_context():  # rounding may decide either way
            assume(top_p in (0, 1) or not chosen or abs(mass - top_p) > 1e-6)
            assume(min_p in (0, 1) or abs(prob - min_p * probs[0]) > 1e-6 * min_p * probs[0])
        if (mass < top_p or top_p == 1 or not chosen) and prob >= min_p * probs[0]:
            chosen.append(token)
        mass += prob
    return {token for token in range(len(logits)) if logits[token] >= min(logits[t] for t in chosen)}


def batch_of(
    params: SamplingParams, vocab: int, prompt: list[int] | None = None, out: list[int] | None = None
) -> SamplingBatch:
    return SamplingBatch.of([(Request("r", prompt or [0], params), out or [])], vocab, CPU)


def survivors(logits: Tensor, batch: SamplingBatch) -> list[set[int]]:
    filtered = logits if batch.filters is None else batch.filters.apply(logits)
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in filtered]


TOP_P = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.001, 0.999))
MIN_P = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.001, 0.999))


@given(LOGITS, st.integers(0, 30), TOP_P, MIN_P)
def test_filters_equal_their_definition(logits: list[float], top_k: int, top_p: float, min_p: float) -> None:
    assume(top_p == 1 or min(logits) > max(logits) - 15)
    expected = kept(logits, top_k, top_p, min_p)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    row = torch.tensor([logits], dtype=torch.float64)
    assert survivors(row, batch_of(params, len(logits))) == [expected]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.integers(1, 25), MIN_P)
def test_ties_with_the_last_token_stay(logits: list[int], top_k: int, min_p: float) -> None:
    params = SamplingParams(top_k=top_k, min_p=min_p)
    row = torch.tensor([logits], dtype=torch.float32)
    assert survivors(row, batch_of(params, len(logits))) == [kept(logits, top_k, 1.0, min_p)]


@given(LOGITS, st.integers(0, 30), TOP_P, MIN_P)
def test_something_always_survives(logits: list[float], top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    row = torch.tensor([logits], dtype=torch.float32)
    (left,) = survivors(row, batch_of(params, len(logits)))
    assert int(row.argmax()) in left


@given(
    LOGITS,
    st.floats(0.05, 10),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.data(),
)
def test_penalties_and_bias_equal_their_definition(
    logits: list[float], repetition: float, frequency: float, presence: float, data: st.DataObject
) -> None:
    tokens = st.integers(0, len(logits) - 1)
    prompt = data.draw(st.lists(tokens, min_size=1, max_size=30))
    out = data.draw(st.lists(tokens, max_size=30))
    bias = data.draw(st.dictionaries(tokens, st.floats(-100, 100)))
    params = SamplingParams(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias
    )
    batch = batch_of(params, len(logits), prompt, out)
    actual = torch.tensor([logits], dtype=torch.float64)
    if batch.penalties is not None:
        actual = batch.penalties.apply(actual)
    if batch.bias is not None:
        actual = actual + batch.bias
    expected = torch.tensor([penalised(logits, params, prompt, out)], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


LOGIT_ROW = [2.0, 1.5, 1.0, 0.5, -1.0, -2.0]
# What each parameter does to the greedy choice among these logits, the prompt being token 0.
CHOICES: list[tuple[dict[str, object], list[int], int]] = [
    ({}, [], 0),
    ({"repetition_penalty": 2.0}, [], 1),  # 2.0 is in the prompt: 1.0
    ({"repetition_penalty": 2.5}, [1], 2),  # 1.5 was generated: 0.6
    ({"presence_penalty": 0.6}, [], 0),  # the prompt does not count
    ({"presence_penalty": 0.6}, [0, 0, 0], 1),
    ({"presence_penalty": 0.4}, [0, 0, 0], 0),  # once, however often
    ({"frequency_penalty": 0.2}, [0, 0, 0], 1),  # 2.0 - 0.6
    ({"frequency_penalty": 0.2}, [0], 0),
    ({"frequency_penalty": -1.0}, [3, 3], 3),  # negative: more of the same
    ({"logit_bias": {4: 100.0}}, [], 4),
    ({"logit_bias": {0: -100.0, 1: -100.0}}, [], 2),
    ({"top_k": 1}, [], 0),
    ({"top_p": 0.01, "logit_bias": {5: 10.0}}, [], 5),
]


@pytest.mark.parametrize(("settings", "out", "expected"), CHOICES)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "in a batch"])
def test_what_greedy_takes(settings: dict[str, object], out: list[int], expected: int, beside: bool) -> None:
    greedy: Callable[..., SamplingParams] = SamplingParams
    rows = [(Request("r", [0], greedy(temperature=0.0, **settings)), out)]
    if beside:
        others: list[tuple[dict[str, object], list[int], int]] = CHOICES
        rows += [(Request("o", [0], greedy(temperature=1.0, **other)), o) for other, o, _ in others]
    logits = torch.tensor([LOGIT_ROW] * len(rows))
    assert sample(logits, SamplingBatch.of(rows, len(LOGIT_ROW), CPU)).tokens[0] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 1e-46},  # zero in float32
        {"top_p": 5e-324},
        {"top_p": 1 - 1e-16, "top_k": 3},
        {"repetition_penalty": 1e-40, "top_k": 3},  # logits / 1e-40 is infinite
        {"repetition_penalty": 1e-46, "top_k": 3},  # and here the penalty is zero
        {"repetition_penalty": 1e-46},
        {"temperature": 1e-300, "min_p": 1.0},
        {"temperature": 1e-5, "logit_bias": {0: -100.0}, "top_p": 1e-6},
        {"temperature": 100.0, "top_k": 2**31 - 1},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_no_allowed_value_stops_the_engine(settings: dict[str, float], scale: float) -> None:
    """Whoever asks for it: either `SamplingParams` refuses, or a token comes out."""
    make: Callable[..., SamplingParams] = SamplingParams
    try:
        params = make(**settings)
    except ValueError:
        return
    rows = [(Request("r", [0, 1, 4], params), [0]), (Request("plain", [0], SamplingParams()), [])]
    tokens = sample(torch.tensor([LOGIT_ROW] * 2) * scale, SamplingBatch.of(rows, len(LOGIT_ROW), CPU)).tokens
    assert all(0 <= token < len(LOGIT_ROW) for token in tokens.tolist())
