"""From the `config.json` of a Hugging Face folder to keys that mean the same for every family.

Where a file says nothing, `transformers` has a default, and which keys it heeds differs by family too. All of
that stands in the table FAMILIES, and no family's name stands anywhere else. Imports no torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
T = TypeVar("T")


@dataclass(frozen=True)
class Family:
    """What the models of one architecture have in common, beyond `Settings`."""

    model_type: str  # its name in `transformers`
    defaults: dict[str, Any]  # of keys that config.json leaves out; those of `Settings` suit Qwen
    fixed: dict[str, Any] = field(default_factory=dict)  # whatever config.json says: no heed is paid to that
    qkv_bias: bool = False  # on q, k and v alone, without being asked for
    qk_norm: bool = False  # RMSNorm on each head of q and k


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_ALL_WINDOWS = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
_LLAMA = {"vocab_size": 32_000, "num_key_value_heads": None, "eos_token_id": 2}

FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama",
        defaults={**_LLAMA, "intermediate_size": 11_008, "max_position_embeddings": 2_048},
        fixed={"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0},
    ),
    "MistralForCausalLM": Family(
        "mistral",
        defaults={
            **_LLAMA, "intermediate_size": 14_336, "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
        },
        fixed={**_NO_BIAS, **_ALL_WINDOWS},
    ),
    "Qwen2ForCausalLM": Family("qwen2", defaults={}, fixed=_NO_BIAS, qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", defaults={"head_dim": 128}, fixed={"mlp_bias": False}, qk_norm=True),
}  # fmt: skip


class Settings(msgspec.Struct):
    """The keys of `config.json` that are heeded or refused. A key that is null where a default is another
    means that there is none: no window, no heads of their own for keys and values."""

    vocab_size: Count = 151_936
    hidden_size: Count = 4_096
    intermediate_size: Count = 22_016
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = 32
    head_dim: Count | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count = 32_768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None  # on q, k, v and o
    mlp_bias: bool | None = None
    eos_token_id: int | list[int] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None  # the older name of `dtype`

    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # the newer name of `rope_scaling`, with the theta in it
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Count | None = None

    use_sliding_window: bool | None = None
    sliding_window: int | None = 4_096
    max_window_layers: int = 28  # this layer and those after it have the window
    layer_types: list[str] | None = None  # if given, says the same layer by layer

    quantization_config: dict[str, Any] | None = None
    per_layer_config: Any = None
    transformers_weights: Any = None
    configuration_files: Any = None


def read_settings(path: Path) -> tuple[Family, Settings]:
    """The family of a `config.json`, and its keys, completed with what that family takes for granted.

    Raises:
        ValueError: the file cannot be read, is of another family, or a key has a wrong type.
    """
    raw = read_json(path)
    family = FAMILIES[_architecture(path, raw)]
    return family, convert(path, {**family.defaults, **raw, **family.fixed}, Settings)


class _Names(msgspec.Struct):
    """The keys by which a file says what it is of."""

    architectures: list[str] | None = None
    model_type: str | None = None
    auto_map: Any = None
    text_config: "_Names | None" = None  # of a model that takes more than text


def _architecture(path: Path, raw: dict[str, Any]) -> str:
    """The row of FAMILIES. `transformers` goes by the model type and others by the architecture, so a file in
    which they contradict each other is refused, like one whose model is not served."""
    names = convert(path, raw, _Names)
    text = names.text_config or _Names()
    name, kind = (names.architectures or text.architectures or [""])[0], names.model_type or text.model_type
    row = name or {f.model_type: architecture for architecture, f in FAMILIES.items()}.get(kind or "", "")
    if names.text_config or row not in FAMILIES or kind not in (None, FAMILIES[row].model_type):
        known = (
            f"{name or 'model'} of the type {kind}" if kind else name or "model that names no architecture"
        )
        known += ", with code of its own (auto_map)" if names.auto_map else ""
        raise ValueError(f"{path.parent} is a {known}; supported are {', '.join(FAMILIES)}")
    return row


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    try:
        return convert(path, msgspec.json.decode(path.read_bytes()), dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def convert(path: Path, values: Any, kind: type[T]) -> T:
    """The keys of `kind` among `values`, which `path` holds.

    Raises:
        ValueError: one of them has a wrong type or is out of its range.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path} is JSON, but not a model's: {error}") from error
