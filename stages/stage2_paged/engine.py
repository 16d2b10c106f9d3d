"""Stage 2, assembled: pages, a table of requests, a scheduler, and kernels that read pages."""

from stages.interface import Engine, Request, Statistics, TokenOutput
from stages.stage2_paged.assembly import EngineConfig, load, make_runner, make_table, measure_pages
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable
from stages.stage2_paged.runner import Runner
from stages.stage2_paged.scheduler import AnyScheduler, Scheduler

__all__ = ["EngineConfig", "PagedEngine", "build"]


def build(config: EngineConfig) -> Engine:
    """Load the model, measure the room for pages, and assemble the engine.

    Raises:
        ValueError: the model or the configuration cannot be served; the message says why.
    """
    loaded = load(config)
    num_pages = measure_pages(config, loaded, Scheduler)
    table = make_table(config, loaded, num_pages, NoPrefixCache())
    scheduler = Scheduler(table, config.prefill_budget)
    runner = make_runner(config, loaded, num_pages)
    return PagedEngine(table, scheduler, runner)


class PagedEngine:
    """Schedule a batch, run it, commit its tokens, and again."""

    def __init__(self, table: RequestTable, scheduler: AnyScheduler, runner: Runner) -> None:
        self._table = table
        self._scheduler = scheduler
        self._runner = runner

    @property
    def context_length(self) -> int:
        return self._table.limits.context_length

    @property
    def has_work(self) -> bool:
        return self._table.has_work

    @property
    def statistics(self) -> Statistics:
        return self._table.statistics

    def add(self, request: Request) -> None:
        self._table.add(request)

    def abort(self, request_id: str) -> None:
        self._table.abort(request_id)

    def step(self) -> list[TokenOutput]:
        batch = self._scheduler.schedule()
        return self._table.commit(batch, self._runner.launch(batch).wait()) if batch else []

    def close(self) -> None:
        self._runner.close()
