"""Each kernel library against the backend that is written to be read, on a GPU."""

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from stages.stage1_naive.config import ModelConfig
from stages.stage2_paged.attention.choice import choose, make_backend, page_sizes
from stages.stage2_paged.attention.flash_attn import FlashAttention
from stages.stage2_paged.attention.torch import TorchAttention
from tests.stage2.attention_case import KV_HEADS, make_case, shapes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("page_size", [1, 16, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["decode", "prefill", "extend"])
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn 2", "flashinfer"])
def test_kernels_agree_with_torch(
    checkpoint: Callable[[str], Path], name: str, kind: str, ratio: int, head_dim: int, page_size: int
) -> None:
    if name == "flash_attn 2":  # wherever it is installed, also on a GPU for which there is a newer one
        if find_spec("flash_attn_2_cuda") is None:
            pytest.skip("the package flash-attn is not installed")
        sizes: tuple[int, ...] = (256,)
    else:
        try:
            choose(name, torch.device("cuda"), torch.bfloat16)
        except ValueError as error:
            pytest.skip(str(error))
        sizes = page_sizes((name, name))
    if page_size not in sizes:
        pytest.skip(f"{name} does not take pages of {page_size}")
    config = dataclasses.replace(
        ModelConfig.load(checkpoint("qwen3")),
        num_heads=KV_HEADS * ratio, num_kv_heads=KV_HEADS, head_dim=head_dim,
    )  # fmt: skip
    lengths = shapes(page_size)[kind]
    case = make_case(config, lengths, page_size, torch.bfloat16, "cuda", dense=False)
    ours = (
        FlashAttention(case.cache, 2)
        if name == "flash_attn 2"
        else make_backend(name, kind == "decode", case.cache, config)
    )
    outputs = []
    for backend in (ours, TorchAttention(case.cache)):
        backend.plan(case.rows)
        outputs.append(backend.attend(config.num_layers - 1, case.q))
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-2, rtol=2e-2)
