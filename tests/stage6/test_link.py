"""What rank 0 can tell the others, and what it cannot."""

from typing import Any

import numpy as np
import pytest
import torch

from stages.interface import Request, RequestRefused, SamplingParams
from stages.stage6_parallel.link import portable


@pytest.mark.parametrize(
    "prompt", [(1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), 2]]
)
def test_any_sequence_of_tokens_becomes_a_list(prompt: Any) -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), logit_bias={3: np.float64(1.5)}, stop_token_ids=(7,),
        bad_words_ids=((1, 2),), allowed_token_ids=np.array([4]),
    )  # fmt: skip
    request = portable(Request("a", prompt, params, seed=-5))
    plain = SamplingParams(
        temperature=0.5, logit_bias={3: 1.5}, stop_token_ids=[7], bad_words_ids=[[1, 2]],
        allowed_token_ids=[4],
    )  # fmt: skip
    assert request == Request("a", [1, 2], plain, seed=-5)
    assert type(request.params.temperature) is float


@pytest.mark.parametrize(
    "request_",
    [
        Request("a", [object()], SamplingParams()),
        Request("a", [2**70], SamplingParams()),
        Request("\ud800", [1], SamplingParams()),
    ],
)
def test_what_cannot_be_told_is_refused(request_: Any) -> None:
    with pytest.raises(RequestRefused, match="cannot be sent to the other ranks"):
        portable(request_)
