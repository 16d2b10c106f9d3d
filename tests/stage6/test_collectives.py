"""How often the ranks speak to each other, and how much."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.interface import Request, SamplingParams
from tests.checkpoints import VOCAB_SIZE
from tests.stage2.oracle_case import settings
from tests.stage6 import cases
from tests.stage6.ranks import Ranks

LAYERS, HIDDEN = 3, 64  # of the tiny models


def test_two_collectives_a_layer(checkpoint: Callable[[str], Path], ranks: Callable[[int], Ranks]) -> None:
    """Besides them, one for the embedding, and one for the logits of what samples."""
    prompt, new = 10, 4
    config = settings(checkpoint("qwen3"), tp=2, num_pages=20, attention="torch")
    request = Request("a", list(range(prompt)), SamplingParams(max_tokens=new, ignore_eos=True))
    for calls, size in ranks(2).run(cases.count, config, [request]):
        assert calls == {"all_reduce": new * (2 * LAYERS + 1), "all_gather": new}
        positions = prompt + new - 1
        assert size["all_reduce"] == positions * (2 * LAYERS + 1) * HIDDEN * 8  # float64
        assert size["all_gather"] == new * VOCAB_SIZE // 2 * 8


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values(ranks: Callable[[int], Ranks], dtype: torch.dtype, rows: int) -> None:
    own = [[2 * row, 2 * row + 1] for row in range(rows)]
    for gathered, reduced in ranks(2).run(cases.collect, dtype, rows):
        assert gathered == [[a, b, a + 10, b + 10] for a, b in own]
        assert reduced == [[2 * a + 10, 2 * b + 10] for a, b in own]


@pytest.mark.parametrize("able", [[], [0], [1], [0, 1]])
def test_memory_that_cannot_be_shared(ranks: Callable[[int], Ranks], able: list[int]) -> None:
    """All ranks hear of it, and none waits for another: those with none to share, or that cannot open it."""
    said = ranks(2).run(cases.share, able)
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: " if able == [0] else "rank 0: ")
