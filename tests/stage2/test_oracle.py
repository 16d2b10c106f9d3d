"""Stage 2 says what stage 1 says, token for token: any page size, too little memory, late commits."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.interface import Engine, Request, SamplingParams, TokenOutput
from stages.stage1_naive import engine as stage1
from stages.stage2_paged.assembly import cap_context, load, make_runner
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.engine import EngineConfig, build
from stages.stage2_paged.prefix_cache import NoPrefixCache
from stages.stage2_paged.request_table import RequestTable
from stages.stage2_paged.runner import Pending
from stages.stage2_paged.scheduler import Scheduler
from tests.checkpoints import VOCAB_SIZE
from tests.oracle import assert_same_outputs, random_request, run_arriving, run_engine

CONTEXT = 64
ROUNDS = int(os.environ.get("STAGE2_ROUNDS", "1"))  # more by hand
# page size: so few pages that requests run out of them, and prompt lengths around a page's end
TIGHT = {1: (70, range(1, 36)), 16: (5, [1, 15, 16, 17, 31, 32, 33]), 64: (1, [1, 20, 40]), 256: (1, [1, 40])}


class LateEngine:
    """The parts of stage 2 as stage 5 will drive them: a batch is committed after the next was launched."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.num_pages
        loaded = load(config)
        limits = cap_context(loaded.limits, config.num_pages * loaded.page_size)
        self.context_length = limits.context_length
        self._table = RequestTable(
            limits, config.num_pages, loaded.page_size, config.max_rows, NoPrefixCache()
        )
        self._scheduler = Scheduler(self._table, config.max_batch_tokens)
        self._runner = make_runner(config, loaded, config.num_pages)
        self._under_way: tuple[Batch, Pending] | None = None
        self.add, self.abort = self._table.add, self._table.abort

    @property
    def has_work(self) -> bool:
        return self._table.has_work or self._under_way is not None

    def step(self) -> list[TokenOutput]:
        batch = self._scheduler.schedule()
        before = self._under_way
        self._under_way = (batch, self._runner.launch(batch)) if batch else None
        return self._table.commit(before[0], before[1].wait()) if before else []


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one at each preemption; whether a token was in flight."""
    found: list[bool] = []
    preempt = RequestTable.preempt

    def counted(table: RequestTable, sequence: Any) -> None:
        found.append(sequence.in_flight)
        preempt(table, sequence)

    monkeypatch.setattr(RequestTable, "preempt", counted)
    return found


def settings(path: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(path), "device": "cpu", "dtype": "float64", "max_context": CONTEXT, **more}


def config(path: Path, **more: Any) -> EngineConfig:
    return EngineConfig(**settings(path, attention="torch", **more))


def requests_for(rng: random.Random, lengths: Any, count: int, room: int) -> list[Request]:
    found: list[Request] = []
    while len(found) < count:
        request = random_request(rng, str(len(found)), list(lengths), VOCAB_SIZE)
        if len(request.prompt) + (request.params.max_tokens or 0) <= room:
            found.append(request)
    return found


def oracle(path: Path, requests: list[Request]) -> dict[str, list[TokenOutput]]:
    return run_engine(stage1.build(stage1.EngineConfig(**settings(path))), requests)


ENGINES: dict[str, Callable[[EngineConfig], Engine]] = {"at once": build, "late": LateEngine}


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("family", ["qwen3", "llama3-rope"])
@pytest.mark.parametrize("page_size", TIGHT)
def test_tokens_are_those_of_stage_1(
    checkpoint: Callable[[str], Path], preemptions: list[bool], page_size: int, family: str, seed: int
) -> None:
    pages, lengths = TIGHT[page_size]
    rng = random.Random(f"{seed} {page_size} {family}")
    requests = requests_for(rng, lengths, 24 if page_size == 16 else 14, min(CONTEXT, pages * page_size))
    expected = oracle(checkpoint(family), requests)
    for name, make in ENGINES.items():
        preemptions.clear()
        made = make(
            config(checkpoint(family), page_size=page_size, num_pages=pages, max_rows=5, max_batch_tokens=40)
        )
        outputs = run_arriving(made, requests, rng)
        for request in requests:
            assert_same_outputs(expected[request.id], outputs[request.id])
        if page_size <= 16:  # one page holds a whole request: there is nothing to preempt for
            assert preemptions, f"{name}: this load was to be too much"
            assert any(preemptions) == (name == "late")


@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
def test_much_room_and_one_row_say_the_same(checkpoint: Callable[[str], Path], make: Any) -> None:
    rng = random.Random(1)
    requests = requests_for(rng, range(1, 40), 10, CONTEXT)
    wide = make(config(checkpoint("qwen3"), page_size=16, num_pages=100))
    narrow = make(config(checkpoint("qwen3"), page_size=64, num_pages=2, max_rows=1, max_batch_tokens=1))
    expected = run_engine(wide, requests)
    alone = run_arriving(narrow, requests, rng)
    for request in requests:
        assert_same_outputs(expected[request.id], alone[request.id])


def test_a_request_without_max_tokens_is_capped_by_the_cache(checkpoint: Callable[[str], Path]) -> None:
    engine = build(config(checkpoint("qwen3"), page_size=16, num_pages=2))
    assert engine.context_length == 32
    endless = SamplingParams(temperature=0.0, ignore_eos=True)
    outputs = run_engine(engine, [Request("a", [1] * 5, endless), Request("b", [2] * 31, endless)])
    assert [len(outputs[name]) for name in "ab"] == [27, 1]
    assert outputs["a"][-1].finish_reason == "length"
    with pytest.raises(ValueError, match="31 tokens and max_tokens 2 together exceed the context of 32"):
        engine.add(Request("c", [1] * 31, SamplingParams(max_tokens=2)))
    assert not engine.has_work


def test_whole_numbers_may_bias(checkpoint: Callable[[str], Path]) -> None:
    engine = build(config(checkpoint("qwen3"), page_size=16, num_pages=2))
    params = SamplingParams(temperature=0.0, max_tokens=2, logit_bias={5: 100})
    outputs = run_engine(engine, [Request("a", [1], params)])
    assert [output.token_id for output in outputs["a"]] == [5, 5]
