"""Ranks on GPUs: two that share one, and, where there are two, each with its own."""

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stages.interface import Engine, Request, SamplingParams
from stages.stage6_parallel.engine import EngineConfig, ParallelEngine, build
from tests.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.oracle import assert_same_greedy, greedy_request, oracle_run, run_engine, tokens_of
from tests.stage2.gpu_case import assert_alike, forced, mixed_lengths, score

pytestmark = pytest.mark.gpu
STEM = 100  # tokens that most prompts share


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tp"), "qwen3", head_dim=64, initializer_range=0.1)


@pytest.fixture(autouse=True)
def _ranks_are_gone() -> Iterator[None]:
    yield
    gc.collect()
    assert not dist.is_initialized()


def make(model: Path, tp: int, **more: Any) -> Engine:
    settings: dict[str, Any] = {"page_size": 16, "num_pages": 1000, "max_rows": 32, "prefill_budget": 100}
    return build(EngineConfig(model=str(model), tp=tp, **(settings | more)))


def test_two_ranks_that_share_a_gpu(model: Path) -> None:
    """In float32 the log-probabilities of the same tokens are those of one rank, but for rounding."""
    plain: dict[str, Any] = {"device": "cuda:0", "dtype": "float32", "attention": "torch"}
    expected = score(make(model, 1, **plain), forced(mixed_lengths(24), STEM))
    engine = make(model, 2, **plain)
    assert isinstance(engine, ParallelEngine)
    tokens, logprobs = score(engine, forced(mixed_lengths(24), STEM))
    assert tokens == expected[0]
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-3, atol=1e-3)


def test_two_ranks_that_share_a_gpu_in_bfloat16(model: Path) -> None:
    """With the fused kernels and the backends that this GPU has."""
    shared: dict[str, Any] = {"device": "cuda:0", "dtype": "bfloat16"}
    expected = score(make(model, 1, **shared), forced(mixed_lengths(24), STEM))
    assert_alike(score(make(model, 2, **shared), forced(mixed_lengths(24), STEM)), expected)


def test_sampled_tokens_are_repeatable(model: Path) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=20, ignore_eos=True)
    requests = [Request(str(i), [i + 1, 2, 3], params, seed=i) for i in range(8)]
    engine = make(model, 2, device="cuda:0", dtype="float32", attention="torch", radix=False)
    first, second = run_engine(engine, requests), run_engine(engine, requests)
    assert {k: tokens_of(v) for k, v in first.items()} == {k: tokens_of(v) for k, v in second.items()}


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
four_gpus = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")


@pytest.mark.parametrize(
    ("tp", "changed"),
    [
        pytest.param(2, {}, marks=two_gpus),
        pytest.param(2, {"one_shot": False}, marks=two_gpus),
        pytest.param(2, {"graphs": False}, marks=two_gpus),
        pytest.param(2, {"overlap": False}, marks=two_gpus),
        pytest.param(2, {"fused": "-sampling"}, marks=two_gpus),
        pytest.param(2, {"fused": "none"}, marks=two_gpus),
        pytest.param(4, {}, marks=four_gpus),
        pytest.param(4, {"one_shot": False}, marks=four_gpus),
    ],
)
def test_a_gpu_for_each_rank(model: Path, tp: int, changed: dict[str, Any]) -> None:
    """Collectives inside CUDA graphs and outside, through NCCL and through each other's memory; the requests
    ask for logits, so those are gathered too."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    expected = score(make(model, 1, **options), forced(mixed_lengths(64), STEM))
    engine = make(model, tp, **options, **changed)
    assert_alike(score(engine, forced(mixed_lengths(64), STEM)), expected)


@two_gpus
def test_one_engine_after_the_other(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0 is the same process again, and the other is a new one; both times they share memory."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    scores = []
    for _ in range(2):
        engine = make(model, 2, **options)
        scores.append(score(engine, forced(mixed_lengths(8), STEM)))
        engine.close()
        del engine
        gc.collect()
    assert_alike(*scores)
    assert "NCCL does all collectives" not in caplog.text


@two_gpus
@pytest.mark.parametrize("one_shot", [True, False])
def test_sampled_tokens_do_not_depend_on_who_shares_the_batch(model: Path, one_shot: bool) -> None:
    """Drawn inside the graphs from each rank's own logits. A graph's size is another with fewer rows, so
    these are equal only where the requests run together again."""
    params = SamplingParams(temperature=0.9, max_tokens=60, ignore_eos=True)
    requests = [Request(str(i), [i + 1, 2, 3], params, seed=i) for i in range(16)]
    engine = make(model, 2, device="cuda", dtype="bfloat16", one_shot=one_shot, radix=False)
    first, second = run_engine(engine, requests), run_engine(engine, requests)
    assert {k: tokens_of(v) for k, v in first.items()} == {k: tokens_of(v) for k, v in second.items()}


@pytest.mark.parametrize("tp", [pytest.param(2, marks=two_gpus), pytest.param(4, marks=four_gpus)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_many_gpus_say_what_one_says(tmp_path: Path, family: str, tp: int) -> None:
    """Greedy, in float32 without TF32, by the tie rule."""
    assert not torch.backends.cuda.matmul.allow_tf32
    model = write_checkpoint(tmp_path, family)
    plain: dict[str, Any] = {"device": "cuda", "dtype": "float32", "attention": "torch"}
    rng = random.Random(0)
    prompts = [rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 80)) for _ in range(120)]
    requests = [greedy_request(prompt, 16, str(i)) for i, prompt in enumerate(prompts)]
    expected = run_engine(make(model, 1, **plain), requests)
    actual = run_engine(make(model, tp, **plain), requests)
    assert_same_greedy((oracle_run(expected[name]), tokens_of(actual[name])) for name in expected)
