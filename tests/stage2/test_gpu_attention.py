"""Each kernel library against the backend that is written to be read, on a GPU."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.stage1_naive.config import ModelConfig
from stages.stage2_paged.attention.choice import choose, make_backend, page_sizes
from tests.stage2.attention_case import KV_HEADS, make_case, shapes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["decode", "prefill", "extend"])
@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_kernels_agree_with_torch(
    checkpoint: Callable[[str], Path], name: str, kind: str, ratio: int, head_dim: int, page_size: int
) -> None:
    try:
        choose(name, torch.device("cuda"), torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    if page_size not in page_sizes((name, name)):
        pytest.skip(f"{name} does not take pages of {page_size}")
    config = dataclasses.replace(
        ModelConfig.load(checkpoint("qwen3")),
        num_heads=KV_HEADS * ratio, num_kv_heads=KV_HEADS, head_dim=head_dim,
    )  # fmt: skip
    lengths = shapes(page_size)[kind]
    case = make_case(config, lengths, page_size, torch.bfloat16, "cuda", dense=False)
    outputs = []
    for backend in (make_backend(each, kind == "decode", case.cache, config) for each in (name, "torch")):
        backend.plan(case.rows)
        outputs.append(backend.attend(config.num_layers - 1, case.q))
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-2, rtol=2e-2)
