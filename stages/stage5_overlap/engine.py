"""Stage 5, assembled: stage 4's engine, one batch ahead of its own tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from stages.interface import Engine, TokenOutput
from stages.stage1_naive.attention import QKV
from stages.stage1_naive.model import Ops
from stages.stage1_naive.sampling import sample
from stages.stage2_paged.assembly import Loaded, load, make_parts, make_table, measure_pages
from stages.stage2_paged.attention.choice import make_backend
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.engine import PagedEngine
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable
from stages.stage2_paged.runner import ModelRunner, Pending, Runner
from stages.stage2_paged.sampler import Draw
from stages.stage2_paged.scheduler import AnyScheduler
from stages.stage3_radix.prefix_cache import RadixPrefixCache
from stages.stage4_chunked import engine as stage4
from stages.stage4_chunked.scheduler import ChunkedScheduler
from stages.stage5_overlap.fused import (
    KERNELS,
    FusedAttention,
    choose_kernels,
    has_dependent_launch,
    make_ops,
    plain_preparation,
)
from stages.stage5_overlap.graph_runner import GraphRunner, VocabularyShare, graph_sizes
from stages.stage5_overlap.trace import trace_engine


@dataclass(frozen=True, kw_only=True)
class EngineConfig(stage4.EngineConfig):
    """As before; with a larger budget, as launches no longer wait for Python."""

    prefill_budget: Annotated[
        int, "tokens that a step computes: one for each running request, the rest of prompts"
    ] = 16_384
    radix: Annotated[bool, "keep what was computed, for prompts that begin alike"] = True
    overlap: Annotated[bool, "launch the next batch before the tokens of this one are read"] = True
    graphs: Annotated[bool, "replay decode steps as CUDA graphs"] = True
    fused: Annotated[
        str, f"kernels: all, none, or some of {','.join(KERNELS)}; --fused=-NAMES for all but these"
    ] = "all"
    trace: Annotated[str | None, "write what the first steps did there, for https://ui.perfetto.dev"] = None


def build(config: EngineConfig) -> Engine:
    """Load the model, measure the room for pages, capture the graphs, and assemble the engine.

    Raises:
        ValueError: the model or the configuration cannot be served; the message says why.
    """
    return assemble(config, load(config))


def assemble(
    config: EngineConfig,
    loaded: Loaded,
    wrap: Callable[[Ops], Ops] | None = None,
    agree: Callable[[int], int] = lambda num_pages: num_pages,
    share: VocabularyShare | None = None,
) -> Engine:
    """The engine of a loaded model. `wrap` may put more around its operations, and `agree` lower the number
    of pages that was measured; `share` is what the model has of the vocabulary, if not all."""
    fused = choose_kernels(config.fused, loaded.model.config, loaded.device, loaded.dtype)
    ops = make_ops(fused)
    if wrap is not None:
        ops, fused = wrap(ops), fused - {"layer"}  # whose kernels leave no place between product and sum
    loaded = replace(loaded, model=replace(loaded.model, ops=ops))
    make = partial(make_runner, fused=fused, share=share)
    longest = stage4.longest_prompt(config, loaded)
    measured = measure_pages(config, loaded, ChunkedScheduler, make, longest)  # graphs take memory, too
    num_pages = agree(measured)
    cache = RadixPrefixCache(loaded.page_size) if config.radix else NoPrefixCache()
    table = make_table(config, loaded, num_pages, cache)
    scheduler = ChunkedScheduler(table, config.prefill_budget)
    runner = make(config, loaded, num_pages)
    kind = OverlapEngine if config.overlap else PagedEngine
    engine = kind(table, scheduler, runner)
    return trace_engine(engine, Path(config.trace)) if config.trace else engine


def make_runner(
    config: EngineConfig,
    loaded: Loaded,
    num_pages: int,
    fused: frozenset[str],
    share: VocabularyShare | None = None,
) -> Runner:
    """A cache of `num_pages`, all that computes with it, and graphs where there can be."""
    model, pdl = loaded.model, has_dependent_launch()
    draw: Draw = sample
    if "sampling" in fused:
        from stages.stage5_overlap.kernels import sampling

        draw = partial(sampling.sample, pdl=pdl)
    parts = make_parts(config, loaded, num_pages, draw)
    prepare, decode = plain_preparation(parts.cache, QKV(model.config, parts.rope)), None
    if "prepare" in fused:
        from stages.stage5_overlap.kernels.preparation import Preparation

        prepare = Preparation(parts.cache, model.config, parts.rope, pdl)
    if "decode" in fused:
        from stages.stage5_overlap.kernels.attention import DecodeAttention

        decode = DecodeAttention(parts.cache, model.config, parts.rope, config.max_rows, pdl)
    backends = [
        make_backend(name, is_decode, parts.cache, model.config)
        for name, is_decode in zip(loaded.attention, (False, True), strict=True)
        if decode is None or not is_decode
    ]
    attention = FusedAttention(prepare, backends[0], decode or backends[1])
    eager = ModelRunner(model, attention, parts.sampler, parts.slots)
    if decode is None or not config.graphs:
        return eager
    sizes = graph_sizes(config.max_rows)
    return GraphRunner(eager, model, decode, parts.sampler, parts.slots, sizes, fused, share)


class OverlapEngine(PagedEngine):
    """Schedule and launch a batch, then commit the one before: while Python works, so does the GPU.

    A request is found to have ended one step late, and its row of the batch under way is dropped when that is
    committed. Nothing else changes: the scheduler never asks what the newest token is. But a mask may, so a
    batch with one waits in its middle: its forward is launched, the batch before is committed, and then its
    draw is launched.
    """

    def __init__(self, table: RequestTable, scheduler: AnyScheduler, runner: Runner) -> None:
        super().__init__(table, scheduler, runner)
        self._under_way: tuple[Batch, Pending] | None = None

    @property
    def has_work(self) -> bool:
        return super().has_work or self._under_way is not None

    def step(self) -> list[TokenOutput]:
        batch, before = self._scheduler.schedule(), self._under_way
        if batch and batch.masked:
            computed = self._runner.forward(batch)
            outputs = self._table.commit(before[0], before[1].wait()) if before else []
            self._under_way = batch, self._runner.sample(computed)
            return outputs
        self._under_way = (batch, self._runner.launch(batch)) if batch else None
        return self._table.commit(before[0], before[1].wait()) if before else []
