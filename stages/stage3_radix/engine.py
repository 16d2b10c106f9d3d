"""Stage 3, assembled: stage 2's engine, with a prefix cache that remembers."""

from stages.interface import Engine
from stages.stage2_paged.assembly import EngineConfig, load, make_runner, make_table, measure_pages
from stages.stage2_paged.engine import PagedEngine
from stages.stage2_paged.scheduler import Scheduler
from stages.stage3_radix.prefix_cache import RadixPrefixCache

__all__ = ["EngineConfig", "build"]


def build(config: EngineConfig) -> Engine:
    """Load the model, measure the room for pages, and assemble the engine.

    Raises:
        ValueError: the model or the configuration cannot be served; the message says why.
    """
    loaded = load(config)
    num_pages = measure_pages(config, loaded, Scheduler)
    table = make_table(config, loaded, num_pages, RadixPrefixCache(loaded.page_size))
    scheduler = Scheduler(table, config.prefill_budget)
    runner = make_runner(config, loaded, num_pages)
    return PagedEngine(table, scheduler, runner)
