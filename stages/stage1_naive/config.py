"""What a model folder is, and what its `config.json` means for the model. Imports no torch."""

import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from huggingface_hub import snapshot_download

from stages.interface import SamplingParams
from stages.stage1_naive.families import Count, Positive, Settings, convert, read_json, read_settings

logger = logging.getLogger(__name__)

_DOWNLOAD = ["*.json", "*.safetensors", "*.jinja"]
_NOT_NEEDED = ["consolidated*", "original/*"]  # the same weights again, in another layout
_OTHER_FORMATS = {  # patterns of a file's name -> what the file is, and what would be right
    "adapter_config.json": "of a LoRA adapter, which is no model: merge it into its base model and save that",
    "*.gguf": "in the format GGUF: take the folder in Hugging Face's format that it was made from",
    "consolidated*": "in Mistral's own layout: take the folder with config.json and model.safetensors",
    "*.safetensors": "not read: model.safetensors is, or what model.safetensors.index.json names",
    "*.bin* *.pt *.pth *.h5 *.msgpack": "no safetensors: load it with transformers, and save_pretrained it",
}


def other_format(files: Iterable[Path]) -> str:
    """The end of a sentence about a folder that is none of ours: which of `files` says what it is instead."""
    names = sorted(file.name for file in files)
    for patterns, text in _OTHER_FORMATS.items():
        if found := [name for pattern in patterns.split() for name in fnmatch.filter(names, pattern)]:
            return f"; {found[0]} is {text}"
    return ""


def find_model(name: str) -> Path:
    """The folder of a model: `name` itself if it is one, else the hub's, downloaded once.

    Raises:
        ValueError: there is neither such a folder nor such a model on the hub.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if path.is_file():
            raise ValueError(
                f"{name} is a file, but a model is a folder with a config.json{other_format([path])}"
            )
    except (OSError, RuntimeError) as error:  # a name too long, a user who is not known here
        raise ValueError(f"there is no folder {name}: {error}") from error
    if name.count("/") != 1 or name.startswith((".", "/", "~")):  # the hub's names are owner/model
        raise ValueError(f"there is no folder {name}, and a hub name looks like Qwen/Qwen3-0.6B")
    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOAD, ignore_patterns=_NOT_NEEDED))
    except Exception as error:  # a network fails in many ways
        raise ValueError(
            f"{name} is not a folder here and could not be fetched from the Hugging Face hub: {error}"
        ) from error


class _Rope(msgspec.Struct):
    """How positions turn, as `rope_parameters` (or `rope_scaling`) says it."""

    rope_theta: Positive | None = None
    rope_type: str | None = None
    type: str | None = None  # the older name of `rope_type`
    partial_rotary_factor: float | None = None
    factor: Positive | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: Count | None = None


class _GenerationConfig(msgspec.Struct):
    """`generation_config.json`, the part of it that matters here."""

    eos_token_id: int | list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies, to read beyond the trained context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer of one of the FAMILIES."""

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
    o_bias: bool = False
    mlp_bias: bool = False
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # as `SamplingParams` names them

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read `config.json`, and `generation_config.json` where there is one: its stop tokens are those that
        count, and how it samples is the model's default.

        Raises:
            ValueError: the folder is no model, or one of a family or feature that is not supported.
        """
        if (path / "adapter_config.json").is_file() or not (path / "config.json").is_file():
            raise ValueError(f"{path} is not a model folder, with config.json{other_format(path.glob('*'))}")
        family, raw = read_settings(path / "config.json")
        if problems := list(_unsupported(raw)):
            raise ValueError(f"{path} needs {', '.join(problems)}, which is not supported")
        generation = _GenerationConfig()
        if (file := path / "generation_config.json").is_file():
            generation = convert(file, read_json(file), _GenerationConfig)
        eos = raw.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
        rope_theta, rope_scaling = _read_rope(path, raw)
        return cls(
            vocab_size=raw.vocab_size,
            hidden_size=raw.hidden_size,
            intermediate_size=raw.intermediate_size,
            num_layers=raw.num_hidden_layers,
            num_heads=raw.num_attention_heads,
            num_kv_heads=raw.num_key_value_heads or raw.num_attention_heads,
            head_dim=raw.head_dim or raw.hidden_size // raw.num_attention_heads,
            context_length=_context_length(path, raw),
            norm_eps=raw.rms_norm_eps,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tied_embeddings=bool(raw.tie_word_embeddings),
            qkv_bias=family.qkv_bias or bool(raw.attention_bias),
            qk_norm=family.qk_norm,
            dtype=raw.dtype or raw.torch_dtype or "bfloat16",
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            o_bias=bool(raw.attention_bias),
            mlp_bias=bool(raw.mlp_bias),
            sampling_defaults=_sampling_defaults(path, generation),
        )


def _unsupported(raw: Settings) -> Iterator[str]:
    """Better no answer than a wrong one: name what this model has and the code lacks."""
    heads, kv_heads = raw.num_attention_heads, raw.num_key_value_heads or raw.num_attention_heads
    head_dim = raw.head_dim or raw.hidden_size // heads
    if raw.hidden_act not in ("silu", "swish"):
        yield f"the activation {raw.hidden_act} (only silu)"
    if raw.quantization_config:
        yield f"weights quantized by {raw.quantization_config.get('quant_method', 'an unnamed method')}"
    for key in ("per_layer_config", "transformers_weights", "configuration_files"):
        if getattr(raw, key):
            yield key
    if heads % kv_heads:
        yield f"{heads} query heads on {kv_heads} key/value heads"
    if head_dim % 2 or not head_dim:
        yield f"a head_dim of {head_dim} (only even ones)"
    kinds, window = raw.layer_types or (), _window(raw)
    if set(kinds) - {"full_attention", "sliding_attention"} or len(kinds) not in (0, raw.num_hidden_layers):
        yield f"layer_types {', '.join(kinds)} (full_attention or sliding_attention, for each layer)"
    if (window is None and "sliding_attention" in kinds) or (window is not None and window < 1):
        yield f"sliding_attention with a sliding_window of {window}"


def _window(raw: Settings) -> int | None:
    return raw.sliding_window if raw.use_sliding_window else None


def _context_length(path: Path, raw: Settings) -> int:
    """Positions the model can tell apart. Within its sliding window a layer that has one attends to
    everything, so a shorter context makes it exact without any code for windows."""
    context, window = raw.max_position_embeddings, _window(raw)
    kinds = raw.layer_types or ["sliding_attention"] * (raw.max_window_layers < raw.num_hidden_layers)
    if window is None or window >= context or "sliding_attention" not in kinds:
        return context
    logger.warning("%s: the context is %d tokens, its sliding window, instead of %d", path, window, context)
    return window


def _read_rope(path: Path, raw: Settings) -> tuple[float, RopeScaling | None]:
    """The theta and the scaling, from wherever they are: as in `transformers`, the older `rope_scaling` comes
    before `rope_parameters`, and a theta or factor in either before one beside it."""
    given = raw.rope_scaling or raw.rope_parameters or {}
    if nested := [key for key, value in given.items() if isinstance(value, dict)]:
        raise ValueError(f"{path} has RoPE of its own for {', '.join(nested)}; supported is one for all")
    rope = convert(path / "config.json", given, _Rope)
    theta = rope.rope_theta or raw.rope_theta or 10_000.0
    kind = rope.rope_type or rope.type or "default"
    if (part := rope.partial_rotary_factor or raw.partial_rotary_factor or 1.0) != 1:
        raise ValueError(f"{path} turns a part of each head (partial_rotary_factor {part}); supported is 1")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{path} scales RoPE by {kind!r}; supported are 'default' and 'llama3'")
    factor, low, high = rope.factor, rope.low_freq_factor, rope.high_freq_factor
    if factor is None or low is None or high is None or not 0 < low < high:
        raise ValueError(f"{path}: llama3's RoPE needs factor, low_freq_factor, a greater high_freq_factor")
    original = raw.original_max_position_embeddings or rope.original_max_position_embeddings
    return theta, RopeScaling(factor, low, high, original or raw.max_position_embeddings)


def _sampling_defaults(path: Path, generation: _GenerationConfig) -> dict[str, float]:
    values = msgspec.structs.asdict(generation)
    values = {key: x for key, x in values.items() if x is not None and key != "eos_token_id"}
    if values.get("top_k") == -1:  # off, as others write it
        values["top_k"] = 0
    try:
        SamplingParams(**values)
    except ValueError as error:
        raise ValueError(f"{path / 'generation_config.json'}: {error}") from error
    return values
