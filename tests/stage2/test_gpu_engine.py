"""Every pair of backends serves many requests at once, and scores the same tokens alike, on a GPU."""

from itertools import product
from pathlib import Path

import pytest
import torch

from stages.stage2_paged.attention.choice import page_sizes
from stages.stage2_paged.engine import EngineConfig, build
from tests.checkpoints import write_checkpoint
from tests.stage2.gpu_case import Scores, assert_alike, available, forced, mixed_lengths, score

pytestmark = pytest.mark.gpu
NAMES = ("torch", "flash_attn", "flashinfer")
TIGHT = 40  # pages: too few for two long requests and many short ones


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bf16"), "qwen3", head_dim=64, initializer_range=0.1)


def scores(model: Path, attention: str, page_size: int, num_pages: int) -> Scores:
    config = EngineConfig(
        model=str(model), device="cuda", dtype="bfloat16", attention=attention, page_size=page_size,
        num_pages=num_pages,
    )  # fmt: skip
    engine = build(config)
    found = score(engine, forced(mixed_lengths(64)))
    assert (engine.statistics.preemptions > 0) == (num_pages == TIGHT)
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> Scores:
    return scores(model, "torch", 256, 200)


@pytest.mark.parametrize(("page_size", "num_pages"), [(256, 200), (16, TIGHT)], ids=["room", "tight"])
@pytest.mark.parametrize("pair", list(product(NAMES, NAMES)), ids=",".join)
def test_every_pair_scores_alike(
    model: Path, expected: Scores, pair: tuple[str, str], page_size: int, num_pages: int
) -> None:
    if why := available(",".join(pair)):
        pytest.skip(why)
    if page_size not in page_sizes(pair):
        pytest.skip(f"{pair} does not take pages of {page_size}")
    assert_alike(scores(model, ",".join(pair), page_size, num_pages), expected)
    torch.cuda.empty_cache()
