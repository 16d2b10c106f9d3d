"""Reading checkpoints: what is refused and how it is said, dtypes and devices."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Ops, Transformer
from stages.stage1_naive.weights import (
    Checkpoint,
    load_model,
    pick_device,
    pick_dtype,
    random_reader,
    tensor_shapes,
)
from tests.checkpoints import FAMILIES, write_checkpoint

CPU = torch.device("cpu")
LAYER = "model.layers.1."


def load(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    config = ModelConfig.load(path)
    return load_model(config, Ops(), Checkpoint(path, config).read, dtype, CPU, progress=False)


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite the one file of a checkpoint with its tensors changed."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)
    return path


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, "qwen3")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, "llama", shards=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expected_shapes_are_those_of_transformers(
    family: str, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint(family)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
    assert tensor_shapes(ModelConfig.load(path)) == written


def test_fused_weights_are_the_parts_in_order(qwen3: Path) -> None:
    parts, layer = load_file(qwen3 / "model.safetensors"), load(qwen3).layers[1]
    qkv = [parts[f"{LAYER}self_attn.{x}_proj.weight"] for x in "qkv"]
    gate_up = [parts[f"{LAYER}mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(layer.qkv, torch.cat(qkv))
    assert torch.equal(layer.gate_up, torch.cat(gate_up))
    assert layer.index == 1
    assert layer.qkv_bias is None


def test_missing_tensors_are_named(qwen3: Path) -> None:
    edit(qwen3, lambda tensors: tensors.pop(LAYER + "self_attn.q_norm.weight"))
    with pytest.raises(ValueError, match=rf"1 missing \({LAYER}self_attn\.q_norm\.weight\)") as caught:
        load(qwen3)
    assert str(qwen3) in str(caught.value)


def test_many_missing_tensors_are_counted(qwen3: Path) -> None:
    edit(qwen3, lambda tensors: [tensors.pop(name) for name in list(tensors) if LAYER in name])
    with pytest.raises(ValueError, match=r"11 missing \(model\.layers\.1\.\S+, .*, \.\.\.\)"):
        load(qwen3)


def test_surplus_tensors_are_named(qwen3: Path) -> None:
    """A bias that is ignored would be a wrong answer, not a warning."""
    bias = torch.zeros(64)
    edit(qwen3, lambda tensors: tensors.update({LAYER + "self_attn.o_proj.bias": bias}))
    with pytest.raises(ValueError, match=r"1 not of this architecture \(.*o_proj\.bias\)"):
        load(qwen3)


def test_untied_needs_its_head(tmp_path: Path) -> None:
    path = edit(write_checkpoint(tmp_path, "llama"), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(lm_head\.weight\)"):
        load(path)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", LAYER + "self_attn.k_proj.weight", LAYER + "mlp.up_proj.weight"]
)
def test_a_wrong_shape_is_named(name: str, qwen3: Path) -> None:
    edit(qwen3, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(ValueError, match=rf"{name} has the shape .* config\.json asks for"):
        load(qwen3)


@pytest.mark.parametrize("content", [b"", b"no tensors here", b"\xff" * 100])
def test_a_damaged_file_is_named(content: bytes, qwen3: Path) -> None:
    (qwen3 / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load(qwen3)


def test_a_file_cut_short_is_named(qwen3: Path) -> None:
    """As an interrupted download leaves it: the header is whole."""
    file = qwen3 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load(qwen3)


def test_a_folder_without_weights(qwen3: Path) -> None:
    (qwen3 / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds no model\.safetensors and no model\.safetensors\.index\.json$"
    ):
        load(qwen3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "no safetensors"),
        ("model.pt", "no safetensors"),
        ("tf_model.h5", "no safetensors"),
        ("flax_model.msgpack", "no safetensors"),
        ("model-Q8_0.gguf", "in the format GGUF"),
        ("consolidated.safetensors", "in Mistral's own layout"),
        ("model-00001-of-00001.safetensors", "not read"),
    ],
)
def test_weights_in_another_format_are_named(name: str, said: str, qwen3: Path) -> None:
    (qwen3 / "model.safetensors").rename(qwen3 / name)
    with pytest.raises(ValueError, match=rf"holds no model\.safetensors .*; {name} is {said}"):
        load(qwen3)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(sharded)


def test_files_beside_the_index_do_not_count(sharded: Path) -> None:
    """Mistral's own folders hold the weights twice, in another naming too."""
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, sharded / "consolidated.safetensors")
    assert len(load(sharded).layers) == 3


def test_the_whole_file_comes_before_the_index(sharded: Path) -> None:
    """As in `transformers`; and what is beside it is not read."""
    other = write_checkpoint(sharded / "other", "llama", seed=1)
    (other / "model.safetensors").rename(sharded / "model.safetensors")
    (sharded / "model.fp16.safetensors").write_bytes(b"damaged")
    assert torch.equal(load(sharded).head, load_file(sharded / "model.safetensors")["lm_head.weight"])
    theirs = AutoModelForCausalLM.from_pretrained(sharded)
    assert torch.equal(load(sharded).head, theirs.lm_head.weight)


@pytest.mark.parametrize("name", ["nothing.safetensors", "../x.safetensors", "/etc/passwd", "."])
def test_an_index_that_names_other_files(name: str, sharded: Path) -> None:
    save_file({}, sharded.parent / "x.safetensors")
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"index\.json names {name}, which is not a file in this folder"):
        load(sharded)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_numbers_are_not_taken_for_weights(dtype: torch.dtype, qwen3: Path) -> None:
    name = LAYER + "mlp.up_proj.weight"
    edit(qwen3, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"{name} in {qwen3} is stored as \w+, .* no quantization_config"):
        load(qwen3)


def test_shards_give_the_same_model(sharded: Path, checkpoint: Callable[[str], Path]) -> None:
    one, many = load(checkpoint("llama")), load(sharded)
    assert torch.equal(one.head, many.head)
    assert all(torch.equal(a.down, b.down) for a, b in zip(one.layers, many.layers, strict=True))


def test_tied_embeddings_are_one_tensor(qwen3: Path) -> None:
    model = load(qwen3)
    assert model.head.data_ptr() == model.embedding.data_ptr()


def test_tied_checkpoints_may_store_the_head_too(qwen3: Path) -> None:
    edit(qwen3, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load(qwen3)
    assert torch.equal(model.head, model.embedding)


def test_a_tied_checkpoint_with_another_head_is_not_served_wrongly(qwen3: Path) -> None:
    """transformers 5 uses the stored head then, so the config is wrong: say so, or do as it does."""
    head = torch.randn(320, 64)
    edit(qwen3, lambda tensors: tensors.update({"lm_head.weight": head}))
    try:
        model = load(qwen3)
    except ValueError as error:
        assert "lm_head" in str(error)  # noqa: PT017 (either is right)
    else:
        assert torch.equal(model.head, head)


def test_old_exports_with_inv_freq(qwen3: Path) -> None:
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(16) for n in range(3)}
    edit(qwen3, lambda tensors: tensors.update(old))
    assert len(load(qwen3).layers) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_of_the_shape(family: str, checkpoint: Callable[[str], Path]) -> None:
    config = ModelConfig.load(checkpoint(family))
    shapes, read = tensor_shapes(config), random_reader(config, CPU, torch.bfloat16)
    drawn = {name: read(name) for name in shapes}
    assert {name: tuple(tensor.shape) for name, tensor in drawn.items()} == shapes
    assert {tensor.dtype for tensor in drawn.values()} == {torch.bfloat16}
    for tensor in drawn.values():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert tensor.float().std().item() == pytest.approx(0.02, rel=0.05)
            assert tensor.float().mean().item() == pytest.approx(0, abs=0.002)


def test_random_weights_depend_on_name_and_seed_alone(qwen3: Path) -> None:
    config = ModelConfig.load(qwen3)
    names = [name for name, shape in tensor_shapes(config).items() if len(shape) > 1]
    state = torch.get_rng_state()
    one, same, other = (random_reader(config, CPU, torch.float32, seed) for seed in (0, 0, 1))
    again = {name: same(name) for name in reversed(names)}
    assert all(torch.equal(one(name), again[name]) for name in names)
    assert len({tuple(again[name].flatten()[:4].tolist()) for name in names}) == len(names)
    assert not any(torch.equal(other(name), again[name]) for name in names)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's numbers change"


@pytest.mark.gpu
def test_random_weights_need_no_memory_but_their_own(qwen3: Path) -> None:
    config = replace(ModelConfig.load(qwen3), vocab_size=1 << 20)
    read = random_reader(config, torch.device("cuda"), torch.bfloat16)
    read("model.layers.0.self_attn.q_proj.weight")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    embedding = read("model.embed_tokens.weight")
    assert torch.cuda.max_memory_allocated() - before == embedding.nbytes == 2 * 64 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_weight_has_the_dtype(dtype: torch.dtype, qwen3: Path) -> None:
    model = load(qwen3, dtype)
    weights = [model.embedding, model.norm, model.head]
    weights += [
        value for layer in model.layers for value in vars(layer).values() if isinstance(value, Tensor)
    ]
    assert {weight.dtype for weight in weights} == {dtype}
    assert len(weights) == 3 + 3 * 8


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_pick_dtype_by_name(name: str, qwen3: Path) -> None:
    assert str(pick_dtype(name, ModelConfig.load(qwen3), CPU)) == f"torch.{name}"


def test_pick_dtype_auto(qwen3: Path) -> None:
    settings = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    config = ModelConfig.load(qwen3)
    assert pick_dtype("auto", config, CPU) == torch.float32
    assert pick_dtype("auto", config, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("name", ["int8", "half", "", "torch.float32", "float8_e4m3fn"])
def test_pick_dtype_refuses(name: str, qwen3: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be auto or one of bfloat16, .*, not"):
        pick_dtype(name, ModelConfig.load(qwen3), CPU)


def test_pick_device() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:cpu", "cuda:x", "meta"])
def test_pick_device_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"device {name} cannot be used here"):
        pick_device(name)
