"""`config.json` in all its spellings, and what is said when it cannot be served."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from stages.interface import SamplingParams
from stages.stage1_naive.config import ModelConfig, RopeScaling, find_model
from stages.stage1_naive.limits import Limits

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 7,
    "dtype": "bfloat16",
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


def load(folder: Path, settings: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(settings))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.load(folder)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}, "dtype": "float16"},
        {
            "rope_theta": 500_000,
            "rope_scaling": {"rope_type": "llama3", **SCALING},
            "torch_dtype": "float16",
            "dtype": None,
        },
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}, "dtype": "float16"},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **SCALING}, "dtype": "float16"},
    ],
    ids=["new", "old", "older", "theta apart"],
)
def test_every_spelling_means_the_same(spelling: dict[str, Any], tmp_path: Path) -> None:
    assert load(tmp_path, {**LLAMA, **spelling}) == ModelConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        context_length=8192,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 2048),
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        dtype="float16",
        eos_token_ids=(7,),
    )


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"rope_scaling": None, "rope_theta": 10_000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {"rope_parameters": None, "rope_scaling": {"type": "default"}},
    ],
)
def test_rope_without_scaling(spelling: dict[str, Any], tmp_path: Path) -> None:
    config = load(tmp_path, {**LLAMA, **spelling})
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, None)


@pytest.mark.parametrize("asked", [True, False, None])
@pytest.mark.parametrize(
    ("family", "qkv", "o", "mlp"),  # whether there is a bias if both keys ask for one
    [
        ("LlamaForCausalLM", True, True, True),
        ("MistralForCausalLM", False, False, False),
        ("Qwen2ForCausalLM", True, False, False),
        ("Qwen3ForCausalLM", True, True, False),
    ],
)
def test_families_differ_in_bias_and_norm(
    family: str, qkv: bool, o: bool, mlp: bool, asked: bool | None, tmp_path: Path
) -> None:
    config = load(tmp_path, {**LLAMA, "architectures": [family], "attention_bias": asked, "mlp_bias": asked})
    expected = (qkv, o, mlp) if asked else (family == "Qwen2ForCausalLM", False, False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == expected
    assert config.qk_norm == (family == "Qwen3ForCausalLM")


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"head_dim": None}, {"head_dim": 16}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        ({"dtype": None}, {"dtype": "bfloat16"}),
        ({"eos_token_id": [7, 9]}, {"eos_token_ids": (7, 9)}),
        ({"eos_token_id": None}, {"eos_token_ids": ()}),
        ({"eos_token_id": 0}, {"eos_token_ids": (0,)}),
    ],
)
def test_optional_keys(settings: dict[str, Any], changed: dict[str, Any], tmp_path: Path) -> None:
    plain = load(tmp_path, LLAMA)
    assert load(tmp_path, {**LLAMA, **settings}) == dataclasses.replace(plain, **changed)


def test_generation_config_names_the_stop_tokens(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert load(tmp_path, LLAMA, {"temperature": 0.6}).eos_token_ids == (7,)


def test_generation_config_says_how_to_sample(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA).sampling_defaults == {}
    said = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "repetition_penalty": 1.05}
    others = {"do_sample": True, "max_length": 9, "bos_token_id": 1, "eos_token_id": 8}
    assert load(tmp_path, LLAMA, {**said, **others}).sampling_defaults == said
    silent = {"temperature": None, "top_p": None, "top_k": 5}
    assert load(tmp_path, LLAMA, {**silent, **others}).sampling_defaults == {"top_k": 5}
    assert load(tmp_path, LLAMA, {"top_k": -1}).sampling_defaults == {"top_k": 0}
    SamplingParams(**load(tmp_path, LLAMA, said).sampling_defaults)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "warm"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("eos_token_id", "</s>"),
    ],
)
def test_a_wrong_sampling_value_is_named(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json.*{key}"):
        load(tmp_path, LLAMA, {key: value})


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
@pytest.mark.parametrize("value", [None, "many", [1]])
def test_a_broken_key_is_named(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"config\.json.*{key}"):
        load(tmp_path, {**LLAMA, key: value})


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"', "{'a': 1}"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json_is_named(content: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*JSON"):
        ModelConfig.load(tmp_path)


def test_config_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} is not a model folder, with config.json$"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors", "README.md"],
            "adapter_config.json is of a LoRA adapter",
        ),
        (
            ["adapter_config.json", "config.json", "model.safetensors"],
            "adapter_config.json is of a LoRA adapter",
        ),
        (["x.Q4_K_M.gguf", "README.md"], "with config.json; x.Q4_K_M.gguf is in the format GGUF"),
        (
            ["consolidated.safetensors", "params.json", "tekken.json"],
            "consolidated.safetensors is in Mistral's own",
        ),
        (["pytorch_model.bin"], "with config.json; pytorch_model.bin is no safetensors"),
        (["model.safetensors"], "with config.json; model.safetensors"),
        (["README.md"], "with config.json$"),
    ],
)
def test_a_folder_of_another_kind_is_named(files: list[str], said: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match=f"{tmp_path} is not a model folder.*{said}"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "x.gguf", "config.json"])
def test_a_file_is_no_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} is a file, but a model is a folder") as caught:
        find_model(str(tmp_path / name))
    assert ("GGUF" in str(caught.value)) == (name == "x.gguf")


def test_find_model_takes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert find_model("~/models/mine") == tmp_path / "models" / "mine"
    monkeypatch.chdir(tmp_path)
    assert find_model("models/mine").resolve() == (tmp_path / "models" / "mine").resolve()


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/at/all",
        "./nothing",
        "~/nothing",
        "~nosuchuser/x",
        "nothing",
        "a/b/c",
        "no one/has this",
        "x/..",
        "/x",
        "/etc/passwd/x",
        "~nosuchuser",
        "x" * 5000,
    ],
)
def test_no_such_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="folder") as caught:
        find_model(name)
    assert name in str(caught.value)


def test_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ValueError, match="nobody/nothing is not a folder here and could not be fetched"):
        find_model("nobody/nothing")
    assert time.monotonic() - start < 2


def test_limits_of_a_model(tmp_path: Path) -> None:
    config = load(tmp_path, {**LLAMA, "eos_token_id": [3, 5]})
    assert Limits.of(config, None) == Limits(1000, 8192, frozenset({3, 5}))
    assert Limits.of(config, 2).context_length == 2
    assert Limits.of(config, 8192).context_length == 8192
    for wrong in (8193, 1, 0, -5):
        with pytest.raises(ValueError, match=rf"from 2 to the model's 8192, not {wrong}"):
            Limits.of(config, wrong)
