"""Every pair of backends serves many requests at once, and scores the same tokens alike, on a GPU."""

import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from stages.interface import Request, SamplingParams
from stages.stage2_paged.attention.choice import choose, page_sizes
from stages.stage2_paged.engine import EngineConfig, build
from tests.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.oracle import run_engine

pytestmark = pytest.mark.gpu
NAMES = ("torch", "flash_attn", "flashinfer")
TIGHT = 40  # pages: too few for two long requests and many short ones
MEAN, MOST = 0.03, 0.25  # of log-probabilities; bfloat16 against float32 on a CPU: 0.008, 0.046


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bf16"), "qwen3", head_dim=64, initializer_range=0.1)


def requests() -> Iterator[Request]:
    """Each continues with one token again and again, so every engine scores the same sequences."""
    rng = random.Random(0)
    for i in range(64):
        length = rng.choice([1, 15, 16, 17, 63, 64, 65, 255, 256, 257, rng.randint(1, 400)])
        forced = {rng.randrange(VOCAB_SIZE): 100.0}
        params = SamplingParams(
            temperature=0.0, logit_bias=forced, logprobs=0, max_tokens=rng.randint(1, 40), ignore_eos=True
        )
        yield Request(str(i), rng.choices(range(VOCAB_SIZE), k=length), params)


def scores(model: Path, attention: str, page_size: int, num_pages: int) -> tuple[list[int], torch.Tensor]:
    config = EngineConfig(
        model=str(model), device="cuda", dtype="bfloat16", attention=attention, page_size=page_size,
        num_pages=num_pages,
    )  # fmt: skip
    engine = build(config)
    outputs = [o for each in run_engine(engine, requests()).values() for o in each]
    assert (engine.statistics.preemptions > 0) == (num_pages == TIGHT)
    tokens = [output.token_id for output in outputs]
    return tokens, torch.tensor([o.logprobs.chosen for o in outputs if o.logprobs is not None])


@pytest.fixture(scope="module")
def expected(model: Path) -> tuple[list[int], torch.Tensor]:
    return scores(model, "torch", 256, 200)


@pytest.mark.parametrize(("page_size", "num_pages"), [(256, 200), (16, TIGHT)], ids=["room", "tight"])
@pytest.mark.parametrize("pair", list(product(NAMES, NAMES)), ids=",".join)
def test_every_pair_scores_alike(
    model: Path,
    expected: tuple[list[int], torch.Tensor],
    pair: tuple[str, str],
    page_size: int,
    num_pages: int,
) -> None:
    attention = ",".join(pair)
    try:
        choose(attention, torch.device("cuda"), torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    if page_size not in page_sizes(pair):
        pytest.skip(f"{attention} does not take pages of {page_size}")
    tokens, logprobs = scores(model, attention, page_size, num_pages)
    assert tokens == expected[0]
    error = (logprobs - expected[1]).abs()
    assert error.mean() < MEAN
    assert error.max() < MOST
