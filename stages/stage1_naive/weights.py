"""From a folder of safetensors files to a `Transformer` on a device."""

from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from stages.stage1_naive.config import ModelConfig, other_format
from stages.stage1_naive.model import Layer, Ops, Transformer

Read = Callable[[str], Tensor]  # a tensor by name: the checkpoint's, stage 6's slice of it, or a random one


def pick_device(name: str) -> torch.device:
    """The device of a `--device` flag.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # events and kernels go to the current device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name} cannot be used here (auto, cpu, cuda, cuda:N): {reason}") from error
    return device


def pick_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of a `--dtype` flag. `auto`: the checkpoint's own, but float32 on a CPU, where bfloat16
    often has no hardware.

    Raises:
        ValueError: there is no such dtype.
    """
    dtypes = {
        str(d).removeprefix("torch."): d
        for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    }
    if name == "auto":
        name = config.dtype if device.type != "cpu" else "float32"
    if name not in dtypes:
        raise ValueError(f"dtype must be auto or one of {', '.join(dtypes)}, not {name}")
    return dtypes[name]


Stored = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype, as safetensors names it, and shape
_DTYPES = ("BF16", "F16", "F32", "F64")  # of stored weights, as safetensors names them


class _Index(msgspec.Struct):
    weight_map: dict[str, str]  # tensor name -> file name


class Checkpoint:
    """The tensors of a folder by name, read one by one, whichever files hold them.

    Raises:
        ValueError: a safetensors file is missing or damaged, or names or shapes are not those of `config`.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._path = path
        self.files: dict[str, Path] = {}  # tensor name -> file
        stored: Stored = {}
        for file in self._list_files():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                        self.files[name] = file
                        tensor = tensors.get_slice(name)
                        stored[name] = tensor.get_dtype(), tuple(tensor.get_shape())
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
        _check_tensors(path, config, stored)
        if config.tied_embeddings and "lm_head.weight" in self.files:
            self._check_tied()

    def _check_tied(self) -> None:
        """A checkpoint may store the tied matrix twice, but not two different ones."""
        if not torch.equal(self.read("lm_head.weight"), self.read("model.embed_tokens.weight")):
            raise ValueError(
                f"config.json in {self._path} ties the embeddings, but lm_head.weight is stored and differs; "
                "set tie_word_embeddings to false"
            )

    def _list_files(self) -> list[Path]:
        """The files that `transformers` reads; others in the folder, such as the same weights in another
        precision, do not count."""
        whole, index = self._path / "model.safetensors", self._path / "model.safetensors.index.json"
        if whole.is_file():
            return [whole]
        if not index.is_file():
            raise ValueError(
                f"{self._path} holds no model.safetensors and no model.safetensors.index.json"
                f"{other_format(self._path.iterdir())}"
            )
        try:
            names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{index} is no index of tensors: {error}") from error
        for name in names:
            if not (self._path / name).is_file() or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{index} names {name}, which is not a file in this folder")
        return [self._path / name for name in names]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it was saved in."""
        with safe_open(self.files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this shape must hold, and its shape."""
    h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, h)
    for n in range(config.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (q, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, q),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (i, h),
            "mlp.up_proj.weight": (i, h),
            "mlp.down_proj.weight": (h, i),
        }
        if config.qkv_bias:
            layer |= {
                "self_attn.q_proj.bias": (q,),
                "self_attn.k_proj.bias": (kv,),
                "self_attn.v_proj.bias": (kv,),
            }
        if config.o_bias:
            layer["self_attn.o_proj.bias"] = (h,)
        if config.mlp_bias:
            layer |= {"mlp.gate_proj.bias": (i,), "mlp.up_proj.bias": (i,), "mlp.down_proj.bias": (h,)}
        if config.qk_norm:
            layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


def _check_tensors(path: Path, config: ModelConfig, stored: Stored) -> None:
    """Raise a ValueError that names what is missing, what is there but would be ignored, a wrong shape, or
    numbers that mean nothing without the scales of a quantization."""
    names, expected = set(stored), tensor_shapes(config)
    harmless = {name for name in names if name.endswith("rotary_emb.inv_freq")}  # old exports save them
    if config.tied_embeddings:
        harmless.add("lm_head.weight")
    missing, surplus = sorted(expected.keys() - names), sorted(names - expected.keys() - harmless)
    problems = [
        f"{len(group)} {label} ({', '.join(group[:4])}{', ...' if len(group) > 4 else ''})"
        for label, group in (("missing", missing), ("not of this architecture", surplus))
        if group
    ]
    if problems:
        raise ValueError(f"the tensors in {path} do not fit its config.json: {'; '.join(problems)}")
    for name, asked in expected.items():
        dtype, shape = stored[name]
        if dtype not in _DTYPES:
            raise ValueError(
                f"{name} in {path} is stored as {dtype}, as quantized weights are, but config.json has no "
                f"quantization_config; supported are {', '.join(_DTYPES)}"
            )
        if shape != asked:
            raise ValueError(f"{name} has the shape {shape}, but config.json asks for {asked}")


def random_reader(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Read:
    """Draws what others read: matrices from a normal distribution of 0.02, and all ones for vectors.

    A name and a seed always bring the same numbers. They are drawn where they stay, in `dtype`: a large model
    needs room for its weights and nothing else.
    """
    shapes, generator = tensor_shapes(config), torch.Generator(device)

    def read(name: str) -> Tensor:
        tensor = torch.ones(shapes[name], device=device, dtype=dtype)
        if tensor.dim() > 1:
            tensor.normal_(0, 0.02, generator=generator.manual_seed(crc32(name.encode(), seed)))
        return tensor

    return read


def load_model(
    config: ModelConfig, ops: Ops, read: Read, dtype: torch.dtype, device: torch.device, progress: bool = True
) -> Transformer:
    """Read every tensor once, fuse what is used together, and put it on the device."""

    def get(*names: str) -> Tensor:
        parts = [read(name) for name in names]
        fused = parts[0] if len(parts) == 1 else torch.cat(parts)
        return fused.to(device=device, dtype=dtype)

    def get_layer(index: int) -> Layer:
        layer = f"model.layers.{index}."
        attention, gate_up = layer + "self_attn.", (layer + "mlp.gate_proj", layer + "mlp.up_proj")
        return Layer(
            index=index,
            input_norm=get(layer + "input_layernorm.weight"),
            qkv=get(*(f"{attention}{x}_proj.weight" for x in "qkv")),
            qkv_bias=get(*(f"{attention}{x}_proj.bias" for x in "qkv")) if config.qkv_bias else None,
            q_norm=get(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=get(attention + "k_norm.weight") if config.qk_norm else None,
            o=get(attention + "o_proj.weight"),
            post_norm=get(layer + "post_attention_layernorm.weight"),
            gate_up=get(*(x + ".weight" for x in gate_up)),
            down=get(layer + "mlp.down_proj.weight"),
            o_bias=get(attention + "o_proj.bias") if config.o_bias else None,
            gate_up_bias=get(*(x + ".bias" for x in gate_up)) if config.mlp_bias else None,
            down_bias=get(layer + "mlp.down_proj.bias") if config.mlp_bias else None,
        )

    embedding = get("model.embed_tokens.weight")
    indices = tqdm(range(config.num_layers), desc="loading weights", unit="layer", disable=not progress)
    return Transformer(
        config=config,
        ops=ops,
        embedding=embedding,
        layers=tuple(get_layer(index) for index in indices),
        norm=get("model.norm.weight"),
        head=embedding if config.tied_embeddings else get("lm_head.weight"),
    )
