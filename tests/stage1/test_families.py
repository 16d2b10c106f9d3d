"""Every key of `config.json`, absent or changed, against `transformers`: whatever that does is right."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from stages.stage1_naive.attention import QKV, NaiveAttention, rope_table
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.families import FAMILIES
from stages.stage1_naive.model import Ops
from stages.stage1_naive.weights import Checkpoint, load_model

ABSENT = ...
LENGTH = 40
TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 5e3,
    "sliding_window": None,
    "initializer_range": 0.5,
    "torch_dtype": "float32",
    "eos_token_id": 7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
NO_ORIGINAL = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
WINDOW = {"use_sliding_window": True, "sliding_window": 9}

# What is changed, for all families. Where `transformers` cannot run it, there is nothing to compare with.
CHANGES: list[dict[str, Any]] = [
    {},
    *({key: ABSENT} for key in TINY),
    {"head_dim": None, "num_key_value_heads": 4},
    {"head_dim": ABSENT, "hidden_size": 32, "num_attention_heads": 2},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": ABSENT, "num_attention_heads": 32},
    {"hidden_act": "swish"},
    {"rms_norm_eps": 0.5},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"attention_bias": True, "mlp_bias": True},
    {"attention_dropout": 0.5},
    {"pretraining_tp": 2},
    {"eos_token_id": None},
    {"eos_token_id": [7, 9]},
    {"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 77.0}},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": None},
    {"rope_scaling": None},
    {"rope_scaling": {}, "rope_parameters": {"rope_theta": 77.0}},
    {"rope_scaling": {"rope_theta": 99.0}, "rope_parameters": {"rope_theta": 77.0, **LLAMA3}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": {**LLAMA3, "rope_type": "default", "type": "llama3"}},
    {"rope_scaling": {**NO_ORIGINAL, "type": "llama3"}},
    {"rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}}},
    {"rope_theta": ABSENT, "rope_scaling": LLAMA3},
    {"rope_parameters": {**LLAMA3, "rope_theta": 33.0}},
    {"rope_parameters": NO_ORIGINAL},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 24},
    {"original_max_position_embeddings": 24},
    WINDOW,
    {"use_sliding_window": False, "sliding_window": 9},
    {"sliding_window": 9},
    {**WINDOW, "max_window_layers": 1},
    {**WINDOW, "max_window_layers": 2},
    {**WINDOW, "max_window_layers": 0},
    {**WINDOW, "sliding_window": None, "max_window_layers": 0},
    {**WINDOW, "layer_types": ["full_attention", "full_attention"], "max_window_layers": 0},
    {**WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    {"architectures": ABSENT},
    {"architectures": None},
    {"architectures": []},
]
# What `transformers` heeds too, and is refused here.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "gelu"),
    ({"hidden_act": "SiLU"}, "SiLU"),
    ({"head_dim": 7}, "head_dim of 7"),
    ({"num_key_value_heads": 3}, "4 query heads on 3 key/value heads"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "mrope"),
    ({"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}}, "su"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "a greater high_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "factor": 0}}, "factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "of its own for full_attention"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": "1e4"}, "rope_theta"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantized by fp8"),
    ({"quantization_config": {"bits": 4}}, "quantized by an unnamed method"),
    ({"quantization_config": "awq"}, "quantization_config"),
    ({"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
]


def write(folder: Path, architecture: str, change: dict[str, Any]) -> Path:
    """A `config.json` alone."""
    settings = {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type, **TINY}
    settings = {key: value for key, value in {**settings, **change}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def reference(folder: Path, prompt: Tensor) -> tuple[Any, Tensor] | None:
    """The model of `transformers`, with weights that are drawn here and saved, and its logits [T, V].
    None: it cannot run this, which it says in many ways."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(float("norm" in name), 0.3)
            logits: Tensor = model(prompt[None], use_cache=False).logits[0]
    except Exception:
        return None
    tied = model.config.tie_word_embeddings
    weights = {
        name: x.clone() for name, x in model.state_dict().items() if not tied or name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors")
    return model, logits


def our_logits(folder: Path, config: ModelConfig, prompt: Tensor) -> Tensor:
    """[T, V]"""
    cpu = torch.device("cpu")
    model = load_model(config, Ops(), Checkpoint(folder, config).read, torch.float32, cpu, progress=False)
    positions = torch.arange(len(prompt))
    attend = NaiveAttention(QKV(config, rope_table(config, len(prompt), cpu)))
    with torch.inference_mode():
        return model.logits(model.hidden(prompt, positions, attend))


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_key_means_what_it_means_to_transformers(
    architecture: str, change: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, architecture, change)
    vocabulary = json.loads((tmp_path / "config.json").read_text()).get("vocab_size", 50)
    prompt = torch.randint(vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(1))
    if (found := reference(tmp_path, prompt)) is None:
        return
    theirs, expected = found
    if architecture == "LlamaForCausalLM" and "sliding_attention" in change.get("layer_types", ()):
        pytest.skip("only its cache heeds them, so they are refused")
    config = ModelConfig.load(tmp_path)
    window = "sliding_window" in change and config.context_length == change["sliding_window"]
    assert window or config.context_length == theirs.config.max_position_embeddings
    actual = our_logits(tmp_path, config, prompt[: config.context_length])
    torch.testing.assert_close(actual, expected[: len(actual)], atol=5e-4, rtol=1e-4)
    eos = theirs.generation_config.eos_token_id
    assert config.eos_token_ids == tuple([] if eos is None else eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_most_keys_can_be_compared(architecture: str, tmp_path: Path) -> None:
    """`transformers` runs what this is about; else the test above would prove nothing."""
    for change in ({}, {"rms_norm_eps": ABSENT}, {"sliding_window": ABSENT}, {"rope_scaling": LLAMA3}):
        assert reference(write(tmp_path, architecture, change), torch.arange(LENGTH)) is not None


@pytest.mark.parametrize(("change", "name"), REFUSED, ids=str)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_unsupported_is_refused_by_name(
    architecture: str, change: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        ModelConfig.load(write(tmp_path, architecture, change))
    assert str(tmp_path) in str(caught.value)


QWEN = "Qwen2ForCausalLM", "Qwen3ForCausalLM"


@pytest.mark.parametrize("architecture", QWEN)
@pytest.mark.parametrize(
    ("layer_types", "said"),
    [
        (["full_attention", "chunked_attention"], "layer_types full_attention, chunked_attention"),
        (["full_attention"], "layer_types full_attention \\(.* for each layer"),
        (
            ["full_attention", "sliding_attention"],
            "sliding_attention with a sliding_window of None",
        ),
    ],
)
def test_layer_types_that_do_not_fit(
    architecture: str, layer_types: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        ModelConfig.load(write(tmp_path, architecture, {"layer_types": layer_types}))


@pytest.mark.parametrize(
    ("architecture", "change", "context"),
    [
        ("LlamaForCausalLM", WINDOW, None),
        ("MistralForCausalLM", {"sliding_window": 9}, 9),
        ("MistralForCausalLM", {"sliding_window": 64}, None),
        ("MistralForCausalLM", {"sliding_window": ABSENT, "max_position_embeddings": 8192}, 4096),
        *((name, {**WINDOW, "max_window_layers": 2}, None) for name in QWEN),
        *((name, {**WINDOW, "max_window_layers": 1}, 9) for name in QWEN),
        *((name, {"sliding_window": 9, "max_window_layers": 1}, None) for name in QWEN),
        *((name, {"sliding_window": 9, "layer_types": ["full_attention"] * 2}, None) for name in QWEN),
    ],
    ids=str,
)
def test_a_window_that_shortens_the_context_is_logged(
    architecture: str,
    change: dict[str, Any],
    context: int | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        config = ModelConfig.load(write(tmp_path, architecture, change))
    assert config.context_length == (context or 64)
    assert [f"context is {context} tokens" in record.getMessage() for record in caplog.records] == [
        True
    ] * bool(context)


def refusal(folder: Path, settings: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"supported are {', '.join(FAMILIES)}$") as caught:
        ModelConfig.load(folder)
    return str(caught.value)


def test_every_other_family_is_refused_by_its_name(tmp_path: Path) -> None:
    served = {family.model_type for family in FAMILIES.values()}
    for kind in CONFIG_MAPPING_NAMES.keys() - served:
        names = (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or MODEL_MAPPING_NAMES.get(kind) or "NewForCausalLM"
        )
        name = names if isinstance(names, str) else names[0]
        assert f" is a {name} of the type {kind};" in refusal(
            tmp_path, {"architectures": [name], "model_type": kind}
        )
        assert f" is a model of the type {kind};" in refusal(
            tmp_path, {"architectures": None, "model_type": kind}
        )
        if name not in FAMILIES:
            assert f" is a {name};" in refusal(tmp_path, {"architectures": [name], "vocab_size": "?"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "a model that names no architecture"),
        ({"architectures": []}, "a model that names no architecture"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "llama"},
            "MistralForCausalLM of the type llama",
        ),
        ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "LlamaForSequence"),
        (
            {"architectures": ["QWenLMHeadModel"], "auto_map": {"AutoConfig": "x.y"}},
            "QWenLMHeadModel, with code of",
        ),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "llama"}},
            "Llava",
        ),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "the type llava"),
        (
            {"text_config": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}},
            "MistralForCausalLM",
        ),
    ],
    ids=str,
)
def test_what_names_itself_oddly_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, settings)
