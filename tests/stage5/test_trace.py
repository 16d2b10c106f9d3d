"""A recorded engine says what it says otherwise, and the file tells what it did."""

import json
import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from stages.interface import Engine, Request, SamplingParams
from stages.stage5_overlap import trace
from stages.stage5_overlap.engine import EngineConfig, build
from stages.stage5_overlap.trace import trace_engine
from tests.checkpoints import write_checkpoint
from tests.oracle import assert_same_outputs, run_engine
from tests.stage2.oracle_case import PAGES, serve_sharing, settings

Rows = dict[tuple[str, str], list[dict[str, Any]]]
HOST = {("host", "scheduler"), ("host", "launches"), ("host", "host copies")}
ROUNDING = 5e-4  # microseconds


def make(path: Path, **more: Any) -> Engine:
    parts = {"page_size": 1, "num_pages": 240, "max_rows": 4, "prefill_budget": 7} | more
    return build(EngineConfig(**settings(path, attention="torch", **parts)))


def request(name: str, prompt: list[int], max_tokens: int, **more: Any) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more), seed=7)


REQUESTS = [request(f"request {n}", [(n + i) % 50 for i in range(n)], 3 + n % 5) for n in (1, 8, 15, 22, 30)]


def read(path: Path) -> Rows:
    """The events of each row by the names of its process and itself; checks what holds for every file."""
    events = json.loads(path.read_text())["traceEvents"]
    processes, threads, order = dict[int, str](), dict[tuple[int, int], str](), dict[tuple[int, int], int]()
    for event in events:
        if event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
        if event["name"] == "thread_sort_index":
            order[event["pid"], event["tid"]] = event["args"]["sort_index"]
    assert list(processes.values()) == ["host", "GPU", "requests"]
    assert order.keys() == threads.keys()
    timed = [event for event in events if event["ph"] != "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    assert all(event["ts"] >= 0 for event in timed)
    found: Rows = {(processes[pid], name): [] for (pid, _), name in threads.items()}
    for event in timed:
        found[processes[event["pid"]], threads[event["pid"], event["tid"]]].append(event)
    for row in found.values():
        spans = [event for event in row if event["ph"] == "X"]
        for one, after in pairwise(spans):
            assert one["ts"] + one["dur"] <= after["ts"] + ROUNDING, (one, after)
    return found


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["name"] == name]


def ends(events: list[dict[str, Any]]) -> list[str]:
    return [event["name"] for event in events if event["ph"] == "i"]


@pytest.mark.parametrize("steps", [40, 10_000])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("page_size", PAGES)
def test_tokens_are_the_same(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    preemptions: list[bool],
    page_size: int,
    overlap: bool,
    steps: int,
) -> None:
    """With preemptions, aborts and idle times; and when the record ends in the midst of it."""

    def engine(**more: Any) -> Engine:
        plain = make(checkpoint("qwen3"), max_rows=6, prefill_budget=9, overlap=overlap, **more)
        return trace_engine(plain, tmp_path / "trace.json", steps)

    serve_sharing(checkpoint("qwen3"), engine, page_size, random.Random(f"0 {page_size} {overlap}"))
    rows = read(tmp_path / "trace.json")
    assert preemptions
    if steps == 40:
        assert len(named(rows["host", "host copies"], "wait for tokens")) == steps
    else:
        assert any(len(named(row, "waiting")) > 1 for row in rows.values()), "a preempted request waits again"
        assert any("abort" in ends(row) for row in rows.values())


@pytest.mark.parametrize("overlap", [True, False])
def test_every_request_has_its_row(checkpoint: Callable[[str], Path], tmp_path: Path, overlap: bool) -> None:
    expected = run_engine(make(checkpoint("qwen3"), overlap=overlap), REQUESTS)
    engine = trace_engine(make(checkpoint("qwen3"), overlap=overlap), tmp_path / "trace.json")
    outputs = run_engine(engine, REQUESTS)
    rows = read(tmp_path / "trace.json")
    assert set(rows) == HOST | {("requests", each.id) for each in REQUESTS}
    assert engine.statistics.cached_tokens == engine.statistics.preemptions == 0
    for each in REQUESTS:
        assert_same_outputs(expected[each.id], outputs[each.id])
        row = rows["requests", each.id]
        spans = [event for event in row if event["ph"] == "X"]
        assert spans[0]["name"] == "waiting"
        assert len(named(row, "waiting")) == 1
        kept = [span for span in spans[1:] if not span["args"]["dropped"]]
        prefill, decode = named(kept, "prefill"), named(kept, "decode")
        assert kept == prefill + decode
        assert sum(span["args"]["tokens"] for span in prefill) == len(each.prompt)
        assert len(prefill) >= len(each.prompt) / 7
        assert len(decode) == len(outputs[each.id]) - 1  # the first token is the prompt's
        starts = [span["args"]["start"] for span in kept]
        lengths = [span["args"]["tokens"] for span in kept]
        assert starts == [sum(lengths[:i]) for i in range(len(lengths))]
        assert ends(row) == ["length"]
    launches = named(rows["host", "launches"], "launch")
    copies = rows["host", "host copies"]
    assert len(named(copies, "upload of inputs")) == len(named(copies, "wait for tokens")) == len(launches)
    assert len(named(rows["host", "scheduler"], "commit")) == len(launches)
    assert len(named(rows["host", "scheduler"], "schedule")) >= len(launches)
    requests = [event for each in REQUESTS for event in rows["requests", each.id]]
    computed = named(requests, "prefill") + named(requests, "decode")
    assert sum(launch["args"]["tokens"] for launch in launches) == sum(e["args"]["tokens"] for e in computed)
    assert sum(e["args"]["decode rows"] + e["args"]["prefill rows"] for e in launches) == len(computed)
    assert not any(launch["args"]["graph"] for launch in launches)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_batch_with_a_mask_is_sampled_by_itself(
    checkpoint: Callable[[str], Path], tmp_path: Path, overlap: bool
) -> None:
    """Behind the commit of the batch before, if there is overlap."""
    expected = run_engine(make(checkpoint("qwen3")), [request("it", [1, 2, 3], 6, min_tokens=4)])["it"]
    engine = trace_engine(make(checkpoint("qwen3"), overlap=overlap), tmp_path / "trace.json")
    assert_same_outputs(expected, run_engine(engine, [request("it", [1, 2, 3], 6, min_tokens=4)])["it"])
    rows = read(tmp_path / "trace.json")
    launches, samples = (named(rows["host", "launches"], name) for name in ("launch", "sample"))
    assert (len(launches), len(samples)) == (6, 4)
    assert len(named(rows["host", "host copies"], "wait for tokens")) == 6
    commits = named(rows["host", "scheduler"], "commit")
    for i, (launch, sample) in enumerate(zip(launches, samples, strict=False)):
        between = [commit for commit in commits if launch["ts"] < commit["ts"] < sample["ts"]]
        assert len(between) == (overlap and i > 0)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_row_launched_for_a_request_that_had_ended(
    checkpoint: Callable[[str], Path], tmp_path: Path, overlap: bool
) -> None:
    free = run_engine(make(checkpoint("qwen3")), [request("it", [1, 2, 3], 6)])["it"]
    stop = free[2].token_id
    kept = next(i for i, output in enumerate(free) if output.token_id == stop) + 1
    engine = trace_engine(make(checkpoint("qwen3"), overlap=overlap), tmp_path / "trace.json")
    run_engine(engine, [request("it", [1, 2, 3], 6, stop_token_ids=[stop])])
    row = read(tmp_path / "trace.json")["requests", "it"]
    assert ends(row) == ["stop"]
    assert [span["args"]["dropped"] for span in named(row, "decode")] == [False] * (kept - 1) + [
        True
    ] * overlap


@pytest.mark.parametrize("overlap", [True, False])
def test_the_record_ends_and_leaves_nothing_behind(
    checkpoint: Callable[[str], Path], tmp_path: Path, overlap: bool
) -> None:
    plain: Any = make(checkpoint("qwen3"), overlap=overlap)
    parts = [plain, plain._scheduler, plain._table, plain._runner, plain._runner._slots]
    before = [set(vars(part)) for part in parts]
    engine = trace_engine(plain, tmp_path / "trace.json", steps=4)
    assert [set(vars(part)) for part in parts] != before
    for each in REQUESTS:
        engine.add(each)
    for _ in range(4 + overlap):  # with overlap, a batch is committed one step late
        assert json.loads((tmp_path / "trace.json").read_text()) == {"traceEvents": []}
        engine.step()
    assert [set(vars(part)) for part in parts] == before
    if overlap:
        assert "wait" not in vars(plain._under_way[1])
    text = (tmp_path / "trace.json").read_text()
    rows = read(tmp_path / "trace.json")
    assert len(named(rows["host", "host copies"], "wait for tokens")) == 4
    assert len(named(rows["host", "scheduler"], "commit")) == 4
    assert len(named(rows["host", "launches"], "launch")) == 4 + overlap
    engine.add(request("later", [1, 2], 3))
    while engine.has_work:
        engine.step()
    assert (tmp_path / "trace.json").read_text() == text


@pytest.mark.parametrize("overlap", [True, False])
def test_the_file_grows_when_more_work_comes(
    checkpoint: Callable[[str], Path], tmp_path: Path, overlap: bool
) -> None:
    engine = trace_engine(make(checkpoint("qwen3"), overlap=overlap), tmp_path / "trace.json")
    run_engine(engine, [request("again", [1, 2], 3)])
    assert set(read(tmp_path / "trace.json")) == HOST | {("requests", "again")}
    engine.step()  # nothing to do
    run_engine(engine, [request("second", [3, 4], 3)])
    assert ends(read(tmp_path / "trace.json")["requests", "second"]) == ["length"]
    engine.add(request("gone", [5], 9))
    engine.step()
    engine.abort("gone")
    engine.abort("nobody")
    while engine.has_work:
        engine.step()
    row = read(tmp_path / "trace.json")["requests", "gone"]
    assert [event["name"] for event in row if event["ph"] == "X"] == ["waiting", "prefill"]
    assert ends(row) == ["abort"]


def test_a_row_for_each_request_that_has_the_same_name(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The second comes while the first one's row is in flight."""
    engine = trace_engine(make(checkpoint("qwen3")), tmp_path / "trace.json")
    engine.add(request("it", [1, 2, 3], 9))
    engine.step()
    engine.abort("it")
    run_engine(engine, [request("it", [4, 5], 2)])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    threads = [e["tid"] for e in events if e["name"] == "thread_name" and e["args"]["name"] == "it"]
    assert threads == sorted(set(threads))
    assert [ends([e for e in events if e["tid"] == tid]) for tid in threads] == [["abort"], ["length"]]


@pytest.mark.parametrize(
    ("name", "why"), [("missing/trace.json", "No such file or directory"), ("", "Is a directory")]
)
def test_a_path_that_cannot_be_written_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, why: str
) -> None:
    engine: Any = make(checkpoint("qwen3"))
    before = set(vars(engine))
    with pytest.raises(ValueError, match=f"the trace cannot be written to .*: {why}"):
        trace_engine(engine, tmp_path / name)
    assert set(vars(engine)) == before


def test_serving_goes_on_when_the_file_can_no_longer_be_written(
    checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    engine = trace_engine(make(checkpoint("qwen3")), tmp_path / "folder" / "trace.json")
    (tmp_path / "folder" / "trace.json").unlink()
    (tmp_path / "folder").rmdir()
    assert len(run_engine(engine, [request("it", [1, 2], 3)])["it"]) == 3
    assert "No such file or directory" in caplog.text


def test_the_profiler_has_the_clock_of_the_host_spans(tmp_path: Path) -> None:
    marks = []
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for i in range(3):
            start = time.time_ns()
            with record_function(f"mark {i}"):
                time.sleep(0.01)
            marks.append((start, time.time_ns()))
    recorded.export_chrome_trace(str(tmp_path / "cpu.json"))
    exported = json.loads((tmp_path / "cpu.json").read_text())
    for i, (start, end) in enumerate(marks):
        (event,) = (e for e in exported["traceEvents"] if e.get("name") == f"mark {i}" and e["ph"] == "X")
        begin = exported.get("baseTimeNanoseconds", 0) + event["ts"] * 1000
        assert start - 50_000 <= begin <= begin + event["dur"] * 1000 <= end + 50_000


class FakeProfile:
    """What PyTorch's profiler is with a GPU. Kernels of a stream overlap, as dependent launches let them."""

    BASE = 1_700_000_000_000_000_000

    def __init__(self, activities: list[ProfilerActivity]) -> None:
        assert activities == [ProfilerActivity.CUDA]

    def start(self) -> None:
        self._start = time.time_ns()

    def stop(self) -> None:
        assert time.time_ns() - self._start > 100_000

    def export_chrome_trace(self, path: str) -> None:
        event = {"ph": "X", "pid": 0, "args": {"grid": [1, 1, 1], "bytes": 8, "correlation": 3}}
        ts = (self._start - self.BASE) / 1000
        kernels = [
            {**event, "cat": "kernel", "name": "late", "tid": 7, "ts": ts + 30, "dur": 10.0},
            {**event, "cat": "kernel", "name": "first", "tid": 7, "ts": ts + 10, "dur": 25.5},
            {**event, "cat": "gpu_memcpy", "name": "copy", "tid": 20, "ts": ts + 20, "dur": 5},
            {**event, "cat": "cuda_runtime", "name": "cudaGraphLaunch", "tid": 123, "ts": ts, "dur": 5},
            {**event, "cat": "gpu_user_annotation", "name": "mark", "tid": 7, "ts": ts, "dur": 90},
            {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "python"}},
        ]
        Path(path).write_text(json.dumps({"traceEvents": kernels, "baseTimeNanoseconds": self.BASE}))


def test_a_gpu_has_a_row_for_each_stream(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = trace_engine(make(checkpoint("qwen3")), tmp_path / "trace.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trace, "profile", FakeProfile)
    for name in ("one", "two"):
        run_engine(engine, [request(name, [1, 2], 3)])
    rows = read(tmp_path / "trace.json")
    assert {row for process, row in rows if process == "GPU"} == {"stream 7", "stream 20"}
    kernels = rows["GPU", "stream 7"]
    assert [event["name"] for event in kernels] == ["first", "late"] * 2
    assert [event["name"] for event in rows["GPU", "stream 20"]] == ["copy"] * 2
    assert all(event["args"] == {"grid": [1, 1, 1], "bytes": 8} for event in kernels)
    assert kernels[1]["ts"] == pytest.approx(kernels[0]["ts"] + 25.5, abs=1)
    assert kernels[1]["dur"] == pytest.approx(4.5, abs=1)
    schedules = named(rows["host", "scheduler"], "schedule")
    for kernel in kernels[::2]:
        assert any(0 < schedule["ts"] - kernel["ts"] + 10 < 5000 for schedule in schedules)


@pytest.mark.gpu
def test_kernels_lie_between_launch_and_wait(tmp_path: Path) -> None:
    """Those of graphs too, captured before the profiler began; and each time it begins."""
    model = write_checkpoint(tmp_path, "qwen3", head_dim=64, initializer_range=0.1)
    config = EngineConfig(model=str(model), device="cuda", dtype="bfloat16", num_pages=200, max_rows=8)
    engine = trace_engine(build(config), tmp_path / "trace.json")
    seen = 0
    for name in ("one", "two"):
        run_engine(engine, [request(name, list(range(20)), 10)])
        rows = read(tmp_path / "trace.json")
        kernels = [e for (process, _), row in rows.items() if process == "GPU" for e in row]
        assert len(kernels) > seen + 20
        seen = len(kernels)
        launches = named(rows["host", "launches"], "launch")
        waits = named(rows["host", "host copies"], "wait for tokens")
        assert len(launches) == len(waits) >= 10
        for launch, wait in zip(launches, waits, strict=True):
            begin, end = launch["ts"] - 50, wait["ts"] + wait["dur"] + 50
            assert sum(begin <= e["ts"] <= end for e in kernels) > 2, "every step has kernels"
    start = rows["host", "launches"][0]["ts"]
    end = max(e["ts"] + e["dur"] for e in named(rows["host", "host copies"], "wait for tokens"))
    assert all(start - 50 <= e["ts"] <= e["ts"] + e["dur"] <= end + 50 for e in kernels)
    assert any(launch["args"]["graph"] for launch in rows["host", "launches"])
