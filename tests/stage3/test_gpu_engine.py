"""Kernels that read a prefix which another request computed, also in the same batch, on a GPU."""

from pathlib import Path

import pytest

from stages.stage2_paged.engine import EngineConfig
from stages.stage2_paged.engine import build as build_stage2
from stages.stage3_radix.engine import build
from tests.checkpoints import write_checkpoint
from tests.stage2.gpu_case import Scores, assert_alike, available, forced, mixed_lengths, score

pytestmark = pytest.mark.gpu
STEM = 200  # tokens that most prompts share


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bf16"), "qwen3", head_dim=64, initializer_range=0.1)


def config(model: Path, attention: str, num_pages: int = 2000) -> EngineConfig:
    return EngineConfig(
        model=str(model), device="cuda", dtype="bfloat16", attention=attention, page_size=16,
        num_pages=num_pages,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(model: Path) -> Scores:
    return score(build_stage2(config(model, "torch")), forced(mixed_lengths(64), STEM))


@pytest.mark.parametrize("num_pages", [2000, 60], ids=["room", "tight"])
@pytest.mark.parametrize("attention", ["torch", "flashinfer", "flash_attn", "flash_attn,flashinfer"])
def test_shared_prefixes_score_as_computed_ones(
    model: Path, expected: Scores, attention: str, num_pages: int
) -> None:
    if why := available(attention):
        pytest.skip(why)
    engine = build(config(model, attention, num_pages))
    requests = list(forced(mixed_lengths(64), STEM))
    for _ in range(2):  # the second time nearly everything is found, if there was room for it
        assert_alike(score(engine, requests), expected)
    counted = engine.statistics
    assert counted.hit_rate > (0.7 if num_pages == 2000 else 0.3)
    assert (counted.evicted_pages > 0) == (num_pages == 60)
