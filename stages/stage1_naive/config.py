"""What a checkpoint's `config.json` says, reduced to what the model needs. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

_DOWNLOAD = ["*.json", "*.safetensors", "*.jinja"]

# architecture -> (bias on q, k and v; RMSNorm on each head of q and k)
_FAMILIES = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}


def find_model(name: str) -> Path:
    """The folder of a model: `name` itself if it is one, else the hub's, downloaded once.

    Raises:
        ValueError: there is neither such a folder nor such a model on the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):  # the hub's names are owner/model
        raise ValueError(f"there is no folder {name}, and a hub name looks like Qwen/Qwen3-0.6B")
    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOAD))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name} is not a folder here and could not be fetched from the Hugging Face hub: {error}"
        ) from error


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies, to read beyond the trained context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer of the Llama, Mistral, Qwen2 or Qwen3 family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int  # tokens
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    dtype: str  # what the checkpoint was written in, e.g. "bfloat16"
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read `config.json`, and `generation_config.json` where there is one (it may name more stop tokens).

        Raises:
            ValueError: the folder is no model, or one of a family or feature that is not supported.
        """
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is not a model folder: it has no config.json")
        raw = _read_json(path / "config.json")
        family = (raw.get("architectures") or ["(none)"])[0]
        if family not in _FAMILIES:
            raise ValueError(f"{path} is a {family}; supported are {', '.join(_FAMILIES)}")
        qkv_bias, qk_norm = _FAMILIES[family]
        _refuse_unsupported(path, raw)
        eos = raw.get("eos_token_id")
        if (path / "generation_config.json").is_file():
            eos = _read_json(path / "generation_config.json").get("eos_token_id", eos)
        try:
            return cls(
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=raw["num_attention_heads"],
                num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
                head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                context_length=_context_length(raw),
                norm_eps=raw["rms_norm_eps"],
                rope_theta=float(_rope(raw).get("rope_theta", 10_000.0)),
                rope_scaling=_rope_scaling(path, _rope(raw)),
                tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                dtype=raw.get("dtype") or raw.get("torch_dtype") or "bfloat16",
                eos_token_ids=_as_tuple(eos),
            )
        except KeyError as error:
            raise ValueError(f"{path / 'config.json'} lacks {error.args[0]!r}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content


def _as_tuple(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    """Better no answer than a wrong one: name what this model has and the code lacks."""
    problems = []
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"the activation {raw['hidden_act']} (only silu)")
    if raw.get("attention_bias") and "Qwen2ForCausalLM" not in raw["architectures"]:
        problems.append("attention_bias")
    if raw.get("mlp_bias"):
        problems.append("mlp_bias")
    if raw.get("quantization_config"):
        problems.append("quantized weights")
    if problems:
        raise ValueError(f"{path} needs {', '.join(problems)}, which is not supported")


def _context_length(raw: Mapping[str, Any]) -> int:
    """Positions the model can tell apart. Within its sliding window a model that has one attends to
    everything, so a shorter context makes it exact without any code for windows."""
    context = int(raw["max_position_embeddings"])
    window = raw.get("sliding_window")
    return min(context, window) if window and raw.get("use_sliding_window", True) else context


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes one `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart."""
    if raw.get("rope_parameters"):
        return dict(raw["rope_parameters"])
    apart = dict(raw.get("rope_scaling") or {})
    return {"rope_theta": raw["rope_theta"], **apart} if "rope_theta" in raw else apart


def _rope_scaling(path: Path, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{path} scales RoPE by {kind!r}; supported are 'default' and 'llama3'")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )
