"""Log-probabilities are the model's own, whatever was done to the logits before the draw."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.interface import Request, SamplingParams
from stages.stage1_naive.sampling import Sampled, SamplingBatch, sample

CPU = torch.device("cpu")


def logprob_rows(count: int, **settings: object) -> tuple[Tensor, Sampled]:
    make: Callable[..., SamplingParams] = SamplingParams
    params = make(logprobs=count, **settings)
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) * 2
    rows = [(Request("r", [0, 3], params, seed=n), [4]) for n in range(40)]
    return logits, sample(logits, SamplingBatch.of(rows, 30, CPU))


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.3, "top_k": 2}, {"repetition_penalty": 5.0, "logit_bias": {7: 50.0}}],
    ids=["plain", "filtered", "penalised"],
)
def test_logprobs_are_the_models_own(count: int, settings: dict[str, object]) -> None:
    logits, sampled = logprob_rows(count, **settings)
    expected = logits.double().log_softmax(-1)
    for row in range(len(logits)):
        given = sampled.logprobs(row, count)
        assert given.chosen == pytest.approx(expected[row, sampled.tokens[row]].item(), abs=1e-5)
        values, ids = expected[row].topk(count)
        assert [token for token, _ in given.top] == ids.tolist()
        assert [value for _, value in given.top] == pytest.approx(values.tolist(), abs=1e-5)
        assert sum(np.exp(value) for _, value in given.top) <= 1 + 1e-6


def test_logprobs_of_a_small_vocabulary_sum_to_one() -> None:
    row = (Request("r", [0], SamplingParams(logprobs=20)), [])
    top = sample(torch.randn(1, 4), SamplingBatch.of([row], 4, CPU)).logprobs(0, 20).top
    assert len(top) == 4
    assert sum(np.exp(value) for _, value in top) == pytest.approx(1.0, abs=1e-6)


def test_logprobs_nobody_asked_for() -> None:
    with pytest.raises(ValueError, match="no row of this batch asked"):
        sample(
            torch.zeros(1, 3), SamplingBatch.of([(Request("r", [0], SamplingParams()), [])], 3, CPU)
        ).logprobs(0, 1)


def test_ties_do_not_depend_on_the_rows_beside() -> None:
    logits = torch.randint(0, 3, (2, 500), generator=torch.Generator().manual_seed(0)).bfloat16()
    few, many = ((Request("r", [0], SamplingParams(logprobs=n)), []) for n in (5, 20))
    alone = sample(logits[:1], SamplingBatch.of([few], 500, CPU)).logprobs(0, 5)
    beside = sample(logits, SamplingBatch.of([few, many], 500, CPU)).logprobs(0, 5)
    assert alone.top == beside.top
