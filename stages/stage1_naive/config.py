"""What a checkpoint's `config.json` says, reduced to what the model needs. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from huggingface_hub import snapshot_download

# architecture -> (bias on q, k and v; RMSNorm on each head of q and k)
_FAMILIES = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}
_DOWNLOAD = ["*.json", "*.safetensors", "*.jinja"]
_NOT_NEEDED = ["consolidated*", "original/*"]  # the same weights again, in another layout

Count = Annotated[int, msgspec.Meta(ge=1)]
T = TypeVar("T")


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
        return Path(snapshot_download(name, allow_patterns=_DOWNLOAD, ignore_patterns=_NOT_NEEDED))
    except Exception as error:  # a network fails in many ways
        raise ValueError(
            f"{name} is not a folder here and could not be fetched from the Hugging Face hub: {error}"
        ) from error


class _Rope(msgspec.Struct):
    """How positions turn. transformers 5 writes all of it as `rope_parameters`; before, `rope_theta` stood
    apart, and the rest was `rope_scaling`."""

    rope_theta: float | None = None
    rope_type: str | None = None
    type: str | None = None  # the older name of `rope_type`
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: Count | None = None


class _HuggingFaceConfig(msgspec.Struct):
    """`config.json`, the part of it that matters here."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    max_position_embeddings: Count
    rms_norm_eps: float
    architectures: list[str] | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    rope_theta: float | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None  # the older name of `dtype`
    eos_token_id: int | list[int] | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool | None = None
    hidden_act: str = "silu"
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    quantization_config: Any = None


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


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
        raw = _read(path / "config.json", _HuggingFaceConfig)
        family = raw.architectures[0] if raw.architectures else "model of no family (none is named)"
        if family not in _FAMILIES:
            raise ValueError(f"{path} is a {family}; supported are {', '.join(_FAMILIES)}")
        _refuse_unsupported(path, raw, family)
        eos = raw.eos_token_id
        if (path / "generation_config.json").is_file():
            generation = _read(path / "generation_config.json", _GenerationConfig)
            eos = eos if generation.eos_token_id is None else generation.eos_token_id
        qkv_bias, qk_norm = _FAMILIES[family]
        rope = raw.rope_parameters or raw.rope_scaling or _Rope()
        return cls(
            vocab_size=raw.vocab_size,
            hidden_size=raw.hidden_size,
            intermediate_size=raw.intermediate_size,
            num_layers=raw.num_hidden_layers,
            num_heads=raw.num_attention_heads,
            num_kv_heads=raw.num_key_value_heads or raw.num_attention_heads,
            head_dim=raw.head_dim or raw.hidden_size // raw.num_attention_heads,
            context_length=_context_length(raw, family),
            norm_eps=raw.rms_norm_eps,
            rope_theta=rope.rope_theta or raw.rope_theta or 10_000.0,
            rope_scaling=_rope_scaling(path, rope),
            tied_embeddings=bool(raw.tie_word_embeddings),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            dtype=raw.dtype or raw.torch_dtype or "bfloat16",
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path} is JSON, but not a model's: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _refuse_unsupported(path: Path, raw: _HuggingFaceConfig, family: str) -> None:
    """Better no answer than a wrong one: name what this model has and the code lacks."""
    problems = []
    if raw.hidden_act != "silu":
        problems.append(f"the activation {raw.hidden_act} (only silu)")
    if raw.attention_bias and family != "Qwen2ForCausalLM":
        problems.append("attention_bias")
    if raw.mlp_bias:
        problems.append("mlp_bias")
    if raw.quantization_config:
        problems.append("quantized weights")
    if raw.num_attention_heads % (raw.num_key_value_heads or raw.num_attention_heads):
        problems.append(f"{raw.num_attention_heads} query heads on {raw.num_key_value_heads} key/value heads")
    if problems:
        raise ValueError(f"{path} needs {', '.join(problems)}, which is not supported")


def _context_length(raw: _HuggingFaceConfig, family: str) -> int:
    """Positions the model can tell apart. Within its sliding window a model that has one attends to
    everything, so a shorter context makes it exact without any code for windows."""
    used = raw.use_sliding_window
    if used is None:
        used = not family.startswith("Qwen")  # what transformers takes for granted
    window = raw.sliding_window if used else None
    return min(raw.max_position_embeddings, window or raw.max_position_embeddings)


def _rope_scaling(path: Path, rope: _Rope) -> RopeScaling | None:
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{path} scales RoPE by {kind!r}; supported are 'default' and 'llama3'")
    factor, original = rope.factor, rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if factor is None or low is None or high is None or original is None:
        raise ValueError(
            f"{path}: llama3's RoPE scaling needs factor, low_freq_factor, high_freq_factor and "
            "original_max_position_embeddings"
        )
    return RopeScaling(factor, low, high, original)
