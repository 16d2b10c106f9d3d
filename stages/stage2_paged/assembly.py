"""The pieces every engine from here on is assembled from: loaded, measured, joined."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from stages import interface
from stages.interface import Request, SamplingParams
from stages.stage1_naive.attention import QKV, rope_table
from stages.stage1_naive.config import ModelConfig, find_model
from stages.stage1_naive.limits import Limits
from stages.stage1_naive.model import Ops, Transformer
from stages.stage1_naive.sampling import sample
from stages.stage1_naive.weights import Checkpoint, load_model, pick_device, pick_dtype, random_reader
from stages.stage2_paged.attention.backend import PagedAttention
from stages.stage2_paged.attention.choice import choose, make_backend, pick_page_size
from stages.stage2_paged.inputs import Slots
from stages.stage2_paged.kv_cache import PagedKVCache
from stages.stage2_paged.prefix_cache import NoPrefixCache, PrefixCache
from stages.stage2_paged.request_table import RequestTable
from stages.stage2_paged.runner import ModelRunner, Runner
from stages.stage2_paged.sampler import Draw, Sampler
from stages.stage2_paged.scheduler import AnyScheduler

logger = logging.getLogger(__name__)

MakeScheduler = Callable[[RequestTable, int], AnyScheduler]
MakeRunner = Callable[[Any, "Loaded", int], Runner]  # (config, model, pages)
# (folder, what its config.json says, dtype, device, whether the weights are random)
LoadModel = Callable[[Path, ModelConfig, torch.dtype, torch.device, bool], Transformer]

_ADVICE = "lower prefill_budget, max_rows or max_context"
_CACHE_ON_CPU = 1 << 30  # bytes: a person's machine has other uses for its memory


@dataclass(frozen=True, kw_only=True)
class EngineConfig(interface.EngineConfig):
    """What an engine with a paged cache can be told besides."""

    attention: Annotated[
        str | None, "PREFILL[,DECODE]: torch, flash_attn or flashinfer; else the fastest for the GPU"
    ] = None
    page_size: Annotated[
        int | None, "tokens in a page of the KV cache: 1, 16, 64, 128 or 256; else what suits"
    ] = None
    num_pages: Annotated[int | None, "pages of the KV cache; else measured"] = None
    memory_fraction: Annotated[
        float, "of the GPU's memory, for weights, activations and KV cache together"
    ] = 0.9
    max_rows: Annotated[int, "requests that run at once"] = 256
    prefill_budget: Annotated[int, "prompt tokens that one step takes; a longer prompt runs alone"] = 16_384

    def __post_init__(self) -> None:
        for name in ("num_pages", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.prefill_budget < self.max_rows:
            raise ValueError(
                f"prefill_budget ({self.prefill_budget}) must be at least max_rows ({self.max_rows}): "
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


def load_whole(
    path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, random: bool = False
) -> Transformer:
    """All weights of a folder, or `random` ones."""
    read = random_reader(config, device, dtype) if random else Checkpoint(path, config).read
    return load_model(config, Ops(), read, dtype, device)


def load(config: EngineConfig, load_model: LoadModel = load_whole) -> Loaded:
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
    model = load_model(path, model_config, dtype, device, config.random_weights)
    return Loaded(model, limits, attention, page_size, dtype, device)


@dataclass(frozen=True)
class Parts:
    """What runs a model beside the model: the cache, and the tables by slot."""

    cache: PagedKVCache
    rope: torch.Tensor  # [context, 2, head_dim]
    sampler: Sampler
    slots: Slots


def make_parts(config: EngineConfig, loaded: Loaded, num_pages: int, draw: Draw = sample) -> Parts:
    """A cache of `num_pages`, and tables for `max_rows`."""
    model, device, page_size = loaded.model.config, loaded.device, loaded.page_size
    cache = PagedKVCache(model, num_pages, page_size, loaded.dtype, device)
    rope = rope_table(model, loaded.limits.context_length, device)
    sampler = Sampler(model.vocab_size, config.max_rows, device, draw)
    max_pages = -(-loaded.limits.context_length // page_size)
    slots = Slots(config.max_rows, max_pages, page_size, num_pages, sampler, device)
    return Parts(cache, rope, sampler, slots)


def make_runner(config: EngineConfig, loaded: Loaded, num_pages: int) -> ModelRunner:
    """A cache of `num_pages`, and all that computes with it."""
    model, parts = loaded.model, make_parts(config, loaded, num_pages)
    prefill, decode = (
        make_backend(name, is_decode, parts.cache, model.config)
        for name, is_decode in zip(loaded.attention, (False, True), strict=True)
    )
    attention = PagedAttention(parts.cache, prefill, decode, QKV(model.config, parts.rope))
    return ModelRunner(model, attention, parts.sampler, parts.slots)


def measure_pages(
    config: EngineConfig,
    loaded: Loaded,
    make_scheduler: MakeScheduler,
    make_runner: MakeRunner = make_runner,
    longest: int | None = None,
) -> int:
    """How many pages the cache gets: those asked for, or as many as fit besides the weights and a step.

    On a GPU the largest steps are run once, which also compiles their kernels, and what their peak leaves of
    `memory_fraction` is the room. On a CPU the room is 1 GiB. A prompt of `longest` tokens makes the largest
    steps, if the context's length is not what makes them.

    Raises:
        ValueError: there is no room for the cache.
    """
    rows, page_size, per_page = config.max_rows, loaded.page_size, loaded.bytes_per_page
    most = rows * -(-loaded.limits.context_length // page_size)  # more could not be used
    if loaded.device.type != "cuda":
        return config.num_pages or min(most, max(1, _CACHE_ON_CPU // per_page))
    logger.info("running the largest steps once; kernels that are not compiled yet take up to a minute")
    start = time.perf_counter()
    torch.cuda.reset_peak_memory_stats(loaded.device)
    try:
        used = _run_largest_steps(config, loaded, make_scheduler, make_runner, longest) * per_page
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the largest step does not fit into the GPU's memory; {_ADVICE}") from error
    peak = torch.cuda.max_memory_allocated(loaded.device) - used
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(loaded.device)
    others = total - free - torch.cuda.memory_reserved(loaded.device)  # CUDA itself, other processes
    room = int(total * config.memory_fraction) - others - peak
    num_pages = config.num_pages or min(most, room // per_page)
    logger.info(
        "ran them in %.0f s; %d pages of %d tokens", time.perf_counter() - start, num_pages, page_size
    )
    if num_pages < 1:
        raise ValueError(
            f"weights and the largest step take {peak >> 20} MiB, which leaves nothing of "
            f"{config.memory_fraction:.0%} of {total >> 20} MiB for the KV cache; "
            f"{_ADVICE}, or raise memory_fraction"
        )
    return num_pages


def _run_largest_steps(
    config: EngineConfig,
    loaded: Loaded,
    make_scheduler: MakeScheduler,
    make_runner: MakeRunner,
    longest: int | None,
) -> int:
    """Prefill and decode the longest prompts, then the most rows. Returns the pages that they had."""
    context, page_size = loaded.limits.context_length, loaded.page_size
    longest = max(1, min(longest or context, context - 2))
    few_long = [longest] * max(1, min(config.max_rows, config.prefill_budget // longest))
    many_short = [min(longest, config.prefill_budget // config.max_rows)] * config.max_rows
    loads = few_long, many_short
    num_pages = max(sum(length // page_size + 2 for length in load) for load in loads)
    runner = make_runner(config, loaded, num_pages)
    for load in loads:
        table = RequestTable(loaded.limits, num_pages, page_size, config.max_rows, NoPrefixCache())
        scheduler = make_scheduler(table, config.prefill_budget)
        for i, length in enumerate(load):
            params = SamplingParams(
                max_tokens=min(2, context - length),
                ignore_eos=True,
                top_p=0.5,  # this, a penalty, a bias and a mask are what takes memory in sampling,
                presence_penalty=1.0,
                logit_bias={0: 1.0},
                bad_words_ids=[[0]],
                prompt_logprobs=0,  # and where few rows sample, the scores of a prompt take more
            )
            table.add(Request(f"the largest steps, {i}", [0] * length, params))
        while batch := scheduler.schedule():
            table.commit(batch, runner.launch(batch).wait())
    return num_pages


def make_table(config: EngineConfig, loaded: Loaded, num_pages: int, cache: PrefixCache) -> RequestTable:
    """A table for a cache of `num_pages`. No request may be longer than the whole of it."""
    limits, cache_tokens = loaded.limits, num_pages * loaded.page_size
    if cache_tokens < limits.context_length:
        logger.warning("the KV cache holds %d tokens, so that is the context length", cache_tokens)
        limits = replace(limits, context_length=cache_tokens)
    return RequestTable(limits, num_pages, loaded.page_size, config.max_rows, cache)
