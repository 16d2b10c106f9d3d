"""What it takes to hold a stage's engine to stage 1's tokens, on time and one step late."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from stages.interface import Engine, Request, Statistics, TokenOutput
from stages.stage1_naive import engine as stage1
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.runner import Pending
from tests.checkpoints import VOCAB_SIZE
from tests.oracle import assert_same_outputs, random_request, run_arriving, run_engine

CONTEXT = 64
PAGES = {1: 70, 16: 5}  # so few that requests run out of them and prefixes are evicted


class LateEngine:
    """The parts of an engine as stage 5 will drive them: a batch is committed after the next was launched, or
    with a mask, after its forward was."""

    def __init__(self, engine: Any) -> None:
        self._table, self._scheduler, self._runner = engine._table, engine._scheduler, engine._runner
        self._under_way: tuple[Batch, Pending] | None = None
        self.context_length: int = engine.context_length
        self.add, self.abort = engine.add, engine.abort

    @property
    def has_work(self) -> bool:
        return self._table.has_work or self._under_way is not None

    @property
    def statistics(self) -> Statistics:
        return cast(Statistics, self._table.statistics)

    def step(self) -> list[TokenOutput]:
        batch = self._scheduler.schedule()
        before = self._under_way
        computed = self._runner.forward(batch) if batch else None
        pending = self._runner.sample(computed) if batch and not batch.masked else None
        outputs = self._table.commit(before[0], before[1].wait()) if before else []
        self._under_way = (batch, pending or self._runner.sample(computed)) if batch else None
        return outputs


def settings(path: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(path), "device": "cpu", "dtype": "float64", "max_context": CONTEXT, **more}


def requests_for(rng: random.Random, lengths: Any, count: int, room: int) -> list[Request]:
    found: list[Request] = []
    while len(found) < count:
        request = random_request(rng, str(len(found)), list(lengths), VOCAB_SIZE)
        if len(request.prompt) + (request.params.max_tokens or 0) <= room:
            found.append(request)
    return found


def sharing(rng: random.Random, count: int, room: int) -> list[Request]:
    """Random requests of which most begin as another does, for any number of tokens."""
    stems = [rng.choices(range(VOCAB_SIZE), k=40) for _ in range(3)]
    requests = requests_for(rng, range(1, 45), count, room)
    for i, request in enumerate(requests):
        shared = rng.choice(stems)[: rng.randint(len(request.prompt) // 2, len(request.prompt) - 1)]
        requests[i] = replace(request, prompt=[*shared, *request.prompt[len(shared) :]])
    return requests


def oracle(path: Path, requests: list[Request]) -> dict[str, list[TokenOutput]]:
    return run_engine(stage1.build(stage1.EngineConfig(**settings(path))), requests)


def serve_sharing(path: Path, make: Callable[..., Engine], page_size: int, rng: random.Random) -> Statistics:
    """Requests that share prefixes, arriving at random at an engine with too few pages: stage 1's tokens."""
    pages = PAGES[page_size]
    requests = sharing(rng, 30, min(CONTEXT, pages * page_size))
    expected = oracle(path, requests)
    engine = make(page_size=page_size, num_pages=pages)
    outputs = run_arriving(engine, requests, rng)
    for request in requests:
        assert_same_outputs(expected[request.id], outputs[request.id])
    counted = engine.statistics
    assert counted.free_pages + counted.cached_pages == counted.pages, "nobody owns a page any more"
    return counted
