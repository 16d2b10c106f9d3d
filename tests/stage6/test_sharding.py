"""Every rank reads its part, the parts make the whole, and what cannot be cut is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Transformer
from stages.stage1_naive.weights import Checkpoint, tensor_shapes
from stages.stage2_paged.assembly import load_whole
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage6_parallel import sharding
from stages.stage6_parallel.engine import EngineConfig, build
from stages.stage6_parallel.sharding import Shard, check_divisible

CPU = torch.device("cpu")


def load_shards(path: Path, size: int) -> list[Transformer]:
    config = ModelConfig.load(path)
    check_divisible(config, size)
    return [Shard(rank, size).load(path, config, torch.float32, CPU) for rank in range(size)]


def tensors_of(model: Transformer) -> list[Tensor]:
    tensors = [model.embedding, model.norm]
    tensors += [] if model.head is model.embedding else [model.head]
    for layer in model.layers:
        tensors += [value for value in vars(layer).values() if isinstance(value, Tensor)]
    return tensors


def bytes_of(model: Transformer) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(model))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_shards_make_the_whole(checkpoint: Callable[[str], Path], family: str, size: int) -> None:
    path = checkpoint(family)
    config = ModelConfig.load(path)
    whole, shards = load_whole(path, config, torch.float32, CPU), load_shards(path, size)
    d, copies = config.head_dim, max(1, size // config.num_kv_heads)
    local = Shard(0, size).cut(config)
    rows = [local.num_heads * d, local.num_kv_heads * d, local.num_kv_heads * d]

    def together(get: Callable[[Transformer], Tensor], dim: int = 0) -> Tensor:
        return torch.cat([get(shard) for shard in shards], dim)

    def fused(get: Callable[[Transformer], Tensor]) -> Tensor:
        """q of all ranks, then k, then v; of the ranks that hold the same head the first."""
        q, k, v = zip(*(get(shard).split(rows) for shard in shards), strict=True)
        return torch.cat([*q, *k[::copies], *v[::copies]])

    assert torch.equal(together(lambda m: m.embedding), whole.embedding)
    assert torch.equal(together(lambda m: m.head), whole.head)
    for i, layer in enumerate(whole.layers):
        assert torch.equal(fused(lambda m, i=i: m.layers[i].qkv), layer.qkv)  # type: ignore[misc]
        if layer.qkv_bias is not None:
            assert torch.equal(fused(lambda m, i=i: m.layers[i].qkv_bias), layer.qkv_bias)  # type: ignore[misc]
        assert torch.equal(together(lambda m, i=i: m.layers[i].o, dim=1), layer.o)  # type: ignore[misc]
        assert torch.equal(together(lambda m, i=i: m.layers[i].down, dim=1), layer.down)  # type: ignore[misc]
        for part in (0, 1):  # gate, up
            halves = together(lambda m, i=i, p=part: m.layers[i].gate_up.chunk(2)[p])  # type: ignore[misc]
            assert torch.equal(halves, layer.gate_up.chunk(2)[part])
        for shard in shards:
            assert torch.equal(shard.layers[i].input_norm, layer.input_norm)
    for shard in shards:
        assert shard.config == replace(local, vocab_size=config.vocab_size)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_of_the_bytes(checkpoint: Callable[[str], Path], size: int) -> None:
    path = checkpoint("llama")  # as many key/value heads as two ranks; four hold each twice
    config = ModelConfig.load(path)
    shapes = tensor_shapes(config)
    kv = sum(4 * a * b for name, (a, *rest) in shapes.items() for b in rest if "k_proj" in name) * 2
    norms = sum(4 * shape[0] for name, shape in shapes.items() if "norm" in name)
    whole = bytes_of(load_whole(path, config, torch.float32, CPU))
    expected = (whole - norms - kv) // size + norms + kv // min(size, 2)
    assert [bytes_of(shard) for shard in load_shards(path, size)] == [expected] * size
    page = [PagedKVCache.bytes_per_page(c, 16, torch.float32) for c in (config, Shard(0, size).cut(config))]
    assert page[0] == 2 * page[1], "a rank caches the heads that it computes"


def test_only_a_rank_s_part_is_read(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, int] = {}

    class Watched:
        """`safe_open`, and how much is taken from each tensor. Whole tensors it has none."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = opened(*arguments, **options)

        def __enter__(self) -> "Watched":
            self._tensors = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def get_slice(self, name: str) -> Any:
            inner = self._tensors.get_slice(name)

            class Slice:
                get_shape = inner.get_shape

                def __getitem__(self, index: Any) -> Tensor:
                    part: Tensor = inner[index]
                    read[name] = part.numel()
                    return part

            return Slice()

    opened: Any = sharding.safe_open
    path = checkpoint("qwen3")
    config = ModelConfig.load(path)
    checkpointed = Checkpoint(path, config)
    monkeypatch.setattr(sharding, "safe_open", Watched)
    shapes = tensor_shapes(Shard(1, 2).cut(config))
    reader = Shard(1, 2).reader(checkpointed, config)
    for name in shapes:
        reader(name)
    assert read == {name: torch.Size(shape).numel() for name, shape in shapes.items()}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_random_shards_have_the_shapes_of_read_ones(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, size: int
) -> None:
    path = checkpoint(family)
    shutil.copy(path / "config.json", tmp_path)  # and no weights
    config = ModelConfig.load(tmp_path)
    ranks = [Shard(rank, size) for rank in range(size)]
    shards = [shard.load(tmp_path, config, torch.float32, CPU, random=True) for shard in ranks]
    for shard, read in zip(shards, load_shards(path, size), strict=True):
        assert shard.config == read.config
        assert [t.shape for t in tensors_of(shard)] == [t.shape for t in tensors_of(read)]
    assert len({shard.layers[0].o[0, 0].item() for shard in shards}) == size, "each its own"


def test_a_tensor_that_is_too_large_is_not_cut_in_silence(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("qwen3")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.zeros(200, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} has the shape \(200, 64\), but .* \(96, 64\)"):
        load_shards(tmp_path, 2)


def test_what_does_not_divide_is_refused(checkpoint: Callable[[str], Path]) -> None:
    config = ModelConfig.load(checkpoint("qwen3"))  # 4 and 2 heads, 96 channels, 320 tokens
    for size in (1, 2, 4):
        check_divisible(config, size)
    with pytest.raises(ValueError, match=r"tp 3: its num_heads \(4\) is no multiple of that, .* 1, 2, 4$"):
        check_divisible(config, 3)
    with pytest.raises(ValueError, match=r"num_kv_heads \(6\) is neither .* may be 1, 2, 3, 6, 12$"):
        check_divisible(replace(config, num_heads=12, num_kv_heads=6), 4)
    with pytest.raises(ValueError, match="num_heads"):
        build(EngineConfig(model=str(checkpoint("qwen3")), device="cpu", tp=3))


@pytest.mark.parametrize("tp", [0, -2])
def test_no_ranks(tp: int) -> None:
    with pytest.raises(ValueError, match=f"tp must be at least 1, not {tp}"):
        EngineConfig(model="m", tp=tp)


@pytest.mark.parametrize("tp", [1, 4])
def test_torchrun_with_another_number(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tp: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"tp is {tp}, but WORLD_SIZE.* is 2: give --tp 2"):
        build(EngineConfig(model=str(checkpoint("qwen3")), device="cpu", tp=tp))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="not RANK, MASTER_ADDR, MASTER_PORT"):
        build(EngineConfig(model=str(checkpoint("qwen3")), device="cpu", tp=2))
