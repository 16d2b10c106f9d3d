"""The pieces every engine from here on is assembled from: loaded, measured, joined."""

import logging
from dataclasses import dataclass, field, replace

import torch

from stages import interface
from stages.interface import Request, SamplingParams
from stages.stage1_naive.attention import QKV, rope_table
from stages.stage1_naive.config import ModelConfig, find_model
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.model import Ops, Transformer
from stages.stage1_naive.weights import Checkpoint, load_model, pick_device, pick_dtype
from stages.stage2_paged.attention.backend import PagedAttention
from stages.stage2_paged.attention.choice import choose, make_backend, pick_page_size
from stages.stage2_paged.inputs import Slots
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable
from stages.stage2_paged.runner import ModelRunner
from stages.stage2_paged.sampler import Sampler
from stages.stage2_paged.scheduler import Scheduler

logger = logging.getLogger(__name__)

_CACHE_ON_CPU = 1 << 30  # bytes: a person's machine has other uses for its memory


@dataclass(frozen=True, kw_only=True)
class EngineConfig(interface.EngineConfig):
    """What an engine with a paged cache can be told besides."""

    attention: str | None = field(
        default=None,
        metadata={"help": "PREFILL[,DECODE]: torch, flash_attn or flashinfer; else the fastest for the GPU"},
    )
    page_size: int | None = field(
        default=None, metadata={"help": "tokens in a page of the KV cache: 1, 16, 64 or 256; else what suits"}
    )
    num_pages: int | None = field(default=None, metadata={"help": "pages of the KV cache; else measured"})
    memory_fraction: float = field(
        default=0.9, metadata={"help": "of the GPU's memory, for weights, activations and KV cache together"}
    )
    max_rows: int = field(default=256, metadata={"help": "requests that run at once"})
    max_batch_tokens: int = field(
        default=16_384, metadata={"help": "prompt tokens that one step takes; a longer prompt runs alone"}
    )

    def __post_init__(self) -> None:
        for name in ("num_pages", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.max_batch_tokens < self.max_rows:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_rows ({self.max_rows}): "
                "each running request takes one token of a step"
            )
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction must be above 0 and at most 1, not {self.memory_fraction}")


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and what was decided for it."""

    model: Transformer
    limits: Limits
    attention: tuple[str, str]  # the backends of prefill and decode
    page_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_page(self) -> int:
        return PagedKVCache.bytes_per_page(self.model.config, self.page_size, self.dtype)


def load(config: EngineConfig, ops: Ops = Ops()) -> Loaded:  # noqa: B008 (frozen)
    """Read the model.

    Raises:
        ValueError: the model or the configuration cannot be served; the message says why.
    """
    path = find_model(config.model)
    model_config = ModelConfig.load(path)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, model_config, device)
    attention = choose(config.attention, device, dtype)
    page_size = pick_page_size(config.page_size, attention)
    limits = Limits.of(model_config, config.max_context)
    model = load_model(model_config, ops, Checkpoint(path, model_config).read, dtype, device)
    return Loaded(model, limits, attention, page_size, dtype, device)


def make_runner(config: EngineConfig, loaded: Loaded, num_pages: int) -> ModelRunner:
    """A cache of `num_pages`, and all that computes with it."""
    model, device, page_size = loaded.model, loaded.device, loaded.page_size
    cache = PagedKVCache(model.config, num_pages, page_size, loaded.dtype, device)
    prefill, decode = (
        make_backend(name, is_decode, cache, model.config)
        for name, is_decode in zip(loaded.attention, (False, True), strict=True)
    )
    qkv = QKV(model.config, rope_table(model.config, loaded.limits.context_length, device))
    sampler = Sampler(model.config.vocab_size, config.max_rows, device)
    max_pages = -(-loaded.limits.context_length // page_size)
    slots = Slots(config.max_rows, max_pages, page_size, num_pages, sampler, device)
    return ModelRunner(model, PagedAttention(cache, prefill, decode, qkv), sampler, slots)


def measure_pages(config: EngineConfig, loaded: Loaded) -> int:
    """How many pages fit besides the weights and the largest step.

    On a GPU that step is run once, and what its peak leaves of `memory_fraction` is the room; on a CPU the
    room is 1 GiB.

    Raises:
        ValueError: there is no room for the cache.
    """
    most = config.max_rows * -(-loaded.limits.context_length // loaded.page_size)  # more could not be used
    if loaded.device.type != "cuda":
        return min(most, max(1, _CACHE_ON_CPU // loaded.bytes_per_page))
    torch.cuda.reset_peak_memory_stats(loaded.device)
    used = _warm_up(config, loaded) * loaded.bytes_per_page
    torch.cuda.synchronize(loaded.device)
    peak = torch.cuda.max_memory_allocated(loaded.device) - used
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(loaded.device)
    others = total - free - torch.cuda.memory_reserved(loaded.device)  # CUDA itself, other processes
    room = int(total * config.memory_fraction) - others - peak
    if room < loaded.bytes_per_page:
        raise ValueError(
            f"weights and the largest step take {peak >> 20} MiB, which leaves nothing of "
            f"{config.memory_fraction:.0%} of {total >> 20} MiB for the KV cache; "
            "lower max_batch_tokens or max_context, or raise memory_fraction"
        )
    return min(most, room // loaded.bytes_per_page)


def _warm_up(config: EngineConfig, loaded: Loaded) -> int:
    """Run the largest step there can be; the pages of the cache that it was run with."""
    length = loaded.limits.context_length - 1
    count = max(1, min(config.max_batch_tokens // length, config.max_rows))
    num_pages = count * -(-(length + 1) // loaded.page_size)
    table = RequestTable(loaded.limits, num_pages, loaded.page_size, config.max_rows, NoPrefixCache())
    for i in range(count):
        table.add(Request(str(i), [0] * length, SamplingParams(max_tokens=1, top_p=0.5)))
    batch = Scheduler(table, max_batch_tokens=count * length).schedule()
    assert batch is not None, "the table has requests and pages for them"
    make_runner(config, loaded, num_pages).launch(batch).wait()
    return num_pages


def cap_context(limits: Limits, cache_tokens: int) -> Limits:
    """No request may be longer than the whole cache."""
    if cache_tokens >= limits.context_length:
        return limits
    logger.warning("the KV cache holds %d tokens, so that is the context length", cache_tokens)
    return replace(limits, context_length=cache_tokens)
