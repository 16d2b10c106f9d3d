"""`build` with a process for each rank, called as a program of the user's would."""

import gc
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stages.interface import Engine, EngineFailed, Request, RequestRefused, SamplingParams
from stages.stage6_parallel import engine as stage6
from stages.stage6_parallel.engine import EngineConfig, build
from stages.stage6_parallel.launcher import Place
from tests.oracle import assert_same_outputs, run_arriving, run_engine, tokens_of
from tests.stage2.oracle_case import oracle, settings, sharing

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def make(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Engine]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = settings(checkpoint("qwen3"), tp=2, num_pages=40, page_size=16, max_rows=6, prefill_budget=12)
    return lambda: build(EngineConfig(**config))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    yield
    gc.collect()
    assert not dist.is_initialized()


def children() -> str:
    command = ["pgrep", "-P", str(os.getpid()), "-f", "stage6_parallel.worker"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_it_serves_and_goes_when_it_is_forgotten(
    make: Callable[[], Engine], checkpoint: Callable[[str], Path]
) -> None:
    rng = random.Random(0)
    requests = sharing(rng, 10, 60)
    expected = oracle(checkpoint("qwen3"), requests)
    engine = make()
    with pytest.raises(RequestRefused):
        engine.add(Request("too long", [1] * 100, PARAMS))
    engine.add(Request("a range", range(5), PARAMS))
    engine.abort("a range")
    engine.abort("unknown")
    outputs = run_arriving(engine, requests, rng)
    for request in requests:
        assert_same_outputs(expected[request.id], outputs[request.id])
    with pytest.raises(ValueError, match=r"torch\.distributed is in use"):
        make()
    assert run_engine(engine, [Request("still", [1, 2], PARAMS)])
    assert children()
    del engine
    gc.collect()
    assert not children()


def test_it_can_be_closed_and_built_again(make: Callable[[], Engine]) -> None:
    requests = [Request("a", [1, 2, 3], PARAMS)]
    said = []
    for _ in range(2):
        engine = make()
        said.append(tokens_of(run_engine(engine, requests)["a"]))
        engine.close()
        assert not children()
        assert not dist.is_initialized()
        engine.close()
    assert said[0] == said[1]


def test_ranks_that_disagree_end(make: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong digest from rank 0; the other rank cannot know who is wrong."""
    engine = make()
    monkeypatch.setattr(stage6, "digest", lambda *_: b"something else")
    with pytest.raises(EngineFailed, match="the ranks disagree about the last step"):
        run_engine(engine, [Request("a", [1, 2, 3], PARAMS)])
    with pytest.raises(EngineFailed, match="the ranks disagree"):
        engine.add(Request("b", [1], PARAMS))
    engine.abort("a")  # whoever cleans up is not bothered
    assert engine.has_work, "or nobody would ever hear of it"
    assert not children()


def test_a_step_that_is_interrupted_ends_the_engine(
    make: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank waits for what this one skipped."""
    engine: Any = make()
    engine.add(Request("a", [1, 2, 3], PARAMS))

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(EngineFailed, match="rank 0 left a step in the middle: KeyboardInterrupt"):
        engine.step()


@pytest.mark.parametrize(
    ("action", "kind", "message"),
    [
        ("raise ValueError('no room for rank 1')", ValueError, "^no room for rank 1$"),
        ("{}['x']", EngineFailed, "^rank 1 failed: KeyError: 'x'$"),
        ("os.kill(os.getpid(), 9)", EngineFailed, "^rank 1 was killed by SIGKILL$"),
    ],
)
def test_a_rank_that_cannot_load(
    make: Callable[[], Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    kind: type[Exception],
    message: str,
) -> None:
    """Rank 0 waits for it in a collective meanwhile."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import stages.stage6_parallel.engine as engine\n"
        "    def load(*_):\n"
        f"        {action}\n"
        "    engine.load = load\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(kind, match=message):
        make()
    assert not children()


def test_gpus_are_dealt_out_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Place(rank=1, size=2, local_rank=1, local_size=2, host="localhost", store=dist.HashStore())
    for gpus, device in ((0, ("cpu", False)), (1, ("cuda:0", False)), (4, ("cuda:1", True))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert second.device("auto") == device
        assert second.device("cpu") == ("cpu", False)
        assert second.device("cuda:3") == ("cuda:3", False)
