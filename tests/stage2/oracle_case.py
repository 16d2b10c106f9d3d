"""What it takes to hold a stage's engine to stage 1's tokens, on time and one step late."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from stages.interface import Request, Statistics, TokenOutput
from stages.stage1_naive import engine as stage1
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.runner import Pending
from tests.checkpoints import VOCAB_SIZE
from tests.oracle import random_request, run_engine

CONTEXT = 64


class LateEngine:
    """The parts of an engine as stage 5 will drive them: a batch is committed after the next was launched."""

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
        self._under_way = (batch, self._runner.launch(batch)) if batch else None
        return self._table.commit(before[0], before[1].wait()) if before else []


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
