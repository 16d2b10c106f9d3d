"""What stage 5 decides before it runs."""

from dataclasses import replace

import pytest
import torch

from stages.stage1_naive.config import ModelConfig
from stages.stage5_overlap import fused
from stages.stage5_overlap.fused import KERNELS, choose_kernels
from stages.stage5_overlap.graph_runner import graph_sizes
from tests.checkpoints import write_checkpoint

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.load(write_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3"))


@pytest.mark.parametrize("max_rows", [1, 2, 3, 15, 16, 17, 100, 256, 1000])
def test_every_batch_has_a_graph_that_is_little_larger(max_rows: int) -> None:
    sizes = graph_sizes(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
    for rows in range(1, max_rows + 1):
        padding = min(size for size in sizes if size >= rows) - rows
        assert padding < min(rows, 16)


def test_kernels_by_name(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: object())

    def choose(flag: str) -> set[str]:
        return set(choose_kernels(flag, config, CUDA, torch.bfloat16))

    assert choose("all") == set(KERNELS)
    assert choose("none") == set()
    assert choose("norm,mlp") == {"norm", "mlp"}
    assert choose("-norm,mlp") == set(KERNELS) - {"norm", "mlp"}
    for flag in ("gelu", "-gelu", "norm,gelu"):
        with pytest.raises(ValueError, match="no fused kernel gelu; there are norm, mlp"):
            choose(flag)


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)])
def test_without_a_gpu_and_16_bits_there_are_none(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> None:
    for flag in ("all", "none", "-norm"):
        assert choose_kernels(flag, config, device, dtype) == frozenset()
    with pytest.raises(ValueError, match="fused kernels need a GPU"):
        choose_kernels("norm", config, device, dtype)


def test_a_head_that_is_no_power_of_two_keeps_its_library(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: object())
    odd = choose_kernels("all", replace(config, head_dim=80), CUDA, torch.bfloat16)
    assert odd == set(KERNELS) - {"prepare", "decode"}
