"""Which attention backend serves which GPU, and with which page sizes."""

from importlib.util import find_spec

import torch

from stages.stage1_naive.config import ModelConfig
from stages.stage2_paged.attention.backend import AttentionBackend
from stages.stage2_paged.attention.torch import TorchAttention
from stages.stage2_paged.kv_cache import PagedKVCache

PAGE_SIZES = (1, 16, 64, 128, 256)
_HALF = (torch.bfloat16, torch.float16)


def choose(flag: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backends `(prefill, decode)` of a flag such as "flash_attn,flashinfer"; one name is for both.

    Without a flag, what measured fastest: on an H200 flash-attn 4 prefills at 355 TFLOP/s where FlashInfer
    reaches 322, and FlashInfer decodes at 3.8 TB/s where flash-attn 4 reaches 2.7.

    Raises:
        ValueError: there is no such backend, or it cannot serve this device and dtype.
    """
    fast = device.type == "cuda" and dtype in _HALF
    available = {
        "torch": True,
        "flash_attn": fast and _has_flash_attn(),
        "flashinfer": fast and find_spec("flashinfer") is not None,
    }
    if flag is None:
        prefill = next(name for name in ("flash_attn", "flashinfer", "torch") if available[name])
        decode = next(name for name in ("flashinfer", "flash_attn", "torch") if available[name])
        return prefill, decode
    names = flag.split(",")
    if len(names) > 2:
        raise ValueError(f"attention takes one backend, or two as PREFILL,DECODE, not {flag!r}")
    for name in names:
        if name not in available:
            raise ValueError(f"there is no attention backend {name!r}; there are {', '.join(available)}")
        if not available[name]:
            raise ValueError(
                f"attention backend {name} needs its package installed, a GPU, and bfloat16 or float16; "
                f"this is {device.type} with {str(dtype).removeprefix('torch.')}"
            )
    return names[0], names[-1]


def page_sizes(names: tuple[str, str]) -> tuple[int, ...]:
    """The page sizes that both backends take; flash-attn 2 takes pages of 256 tokens only."""
    if "flash_attn" in names and _flash_attn_version() == 2:
        return (256,)
    return PAGE_SIZES


def pick_page_size(wanted: int | None, names: tuple[str, str]) -> int:
    """The page size of a flag, or the smallest from 16 on that the backends take.

    Raises:
        ValueError: a backend does not take that size.
    """
    sizes = page_sizes(names)
    if wanted is None:
        return min(size for size in sizes if size >= 16)
    if wanted not in sizes:
        raise ValueError(f"attention {','.join(names)} takes pages of {_list(sizes)} tokens, not {wanted}")
    return wanted


def make_backend(name: str, decode: bool, cache: PagedKVCache, config: ModelConfig) -> AttentionBackend:
    """A backend for the decode rows of batches, or for the others. Its library is imported only here."""
    if name == "flash_attn":
        from stages.stage2_paged.attention.flash_attn import FlashAttention

        return FlashAttention(cache, _flash_attn_version())
    if name == "flashinfer":
        from stages.stage2_paged.attention.flashinfer import FlashInfer

        return FlashInfer(cache, config, decode)
    return TorchAttention(cache)


def _flash_attn_version() -> int:
    """Version 4 is made for Hopper and newer GPUs, version 2 for Ampere and Ada."""
    return 4 if torch.cuda.get_device_capability() >= (9, 0) else 2


def _has_flash_attn() -> bool:
    if find_spec("flash_attn") is None:
        return False
    return find_spec("flash_attn.cute" if _flash_attn_version() == 4 else "flash_attn_2_cuda") is not None


def _list(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
