"""Stage 4, assembled: stage 3's engine, with a scheduler that cuts prompts into chunks."""

from dataclasses import dataclass
from typing import Annotated

from stages.interface import Engine
from stages.stage2_paged import assembly
from stages.stage2_paged.assembly import Loaded, load, make_runner, make_table, measure_pages
from stages.stage2_paged.engine import PagedEngine
from stages.stage3_radix.prefix_cache import RadixPrefixCache
from stages.stage4_chunked.scheduler import ChunkedScheduler


@dataclass(frozen=True, kw_only=True)
class EngineConfig(assembly.EngineConfig):
    """As before, but the budget is for all tokens of a step, and no prompt exceeds it."""

    prefill_budget: Annotated[
        int, "tokens that a step computes: one for each running request, the rest of prompts"
    ] = 2048


def build(config: EngineConfig) -> Engine:
    """Load the model, measure the room for pages, and assemble the engine.

    Raises:
        ValueError: the model or the configuration cannot be served; the message says why.
    """
    loaded = load(config)
    num_pages = measure_pages(config, loaded, ChunkedScheduler, longest=longest_prompt(config, loaded))
    table = make_table(config, loaded, num_pages, RadixPrefixCache(loaded.page_size))
    scheduler = ChunkedScheduler(table, config.prefill_budget)
    runner = make_runner(config, loaded, num_pages)
    return PagedEngine(table, scheduler, runner)


def longest_prompt(config: EngineConfig, loaded: Loaded) -> int | None:
    """A prompt whose chunks take as much memory as those of a longer one. None with the `torch` backend: its
    mask grows with all that lies before a chunk."""
    return None if loaded.attention[0] == "torch" else 2 * config.prefill_budget
