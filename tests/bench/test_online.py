import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minisgl.bench.__main__ import main
from minisgl.bench.traces import Synthetic, TokenSource, read_trace, replay
from tests.bench.dummy_server import dummy
from tests.server.running import PATIENCE_S, RunningServer, launch


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with launch(tmp_path_factory.mktemp("bench"), checkpoint("qwen3"), "--model-name", "tiny") as running:
        running.wait_ready()
        running.url += "/v1"
        yield running


def bench(*arguments: object) -> int:
    return main(["online", *map(str, arguments)])


def results(folder: Path, *arguments: object, status: int = 0) -> list[Any]:
    out = folder / "out.json"
    assert bench(*arguments, "--out", out) == status
    found: list[Any] = json.loads(out.read_text())["results"]
    return found


def test_numbers_add_up(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = server.metric("prompt_tokens_total")
    sizes = ("--vocab", 256, "--requests", 8, "--input-tokens", "8,40", "--output-tokens", "5,9")
    [result] = results(tmp_path, "--url", server.url, *sizes, "--limit-ttft", 1e-6, "--limit-itl", 1e6)
    each = result["per_request"]
    assert len(each) == result["requests"] == 8
    assert result["failed"] == 0
    assert [r["tokens"] for r in each] == [r["asked_tokens"] for r in each]
    assert result["input_tokens"] == server.metric("prompt_tokens_total") - before
    assert result["output_tokens"] == sum(r["tokens"] for r in each)
    assert all(5 <= r["tokens"] <= 9 and 8 <= r["prompt_tokens"] <= 40 for r in each)
    assert all(0 < r["ttft"] <= r["end"] - r["start"] <= result["duration_s"] for r in each)
    assert result["output_tokens_per_s"] == pytest.approx(result["output_tokens"] / result["duration_s"])
    assert result["ttft_ms"]["p99"] == pytest.approx(1000 * np.percentile([r["ttft"] for r in each], 99))
    assert result["goodput_requests_per_s"] == 0
    shown = capsys.readouterr().out
    assert re.search(r"time to first token, ms( +[\d,.]+){4}", shown)
    assert "errors: 0" in shown


def test_a_shared_prefix_is_cached(server: RunningServer, tmp_path: Path) -> None:
    sizes = (
        "--vocab",
        256,
        "--requests",
        3,
        "--input-tokens",
        8,
        "--output-tokens",
        2,
        "--concurrency",
        "1,1",
    )
    for result in results(tmp_path, "--url", server.url, *sizes, "--shared-prefix", 64):
        assert [r["prompt_tokens"] for r in result["per_request"]] == [72] * 3
        assert [r["cached_tokens"] for r in result["per_request"]] == [
            0,
            64,
            64,
        ]  # anew in each run of a sweep


def test_a_conversation_grows(server: RunningServer, tmp_path: Path) -> None:
    sizes = ("--requests", 2, "--turns", 3, "--input-tokens", 4, "--output-tokens", 4)
    [result] = results(tmp_path, "--url", server.url, *sizes)
    assert result["failed"] == 0
    for number in range(2):
        turns = [r for r in result["per_request"] if r["conversation"] == number]
        assert [r["turn"] for r in turns] == [0, 1, 2]
        lengths = [r["prompt_tokens"] for r in turns]
        assert lengths[0] < lengths[1] < lengths[2]
        assert all(later["start"] >= earlier["end"] for earlier, later in pairwise(turns))


def test_history_holds_the_answers(tmp_path: Path) -> None:
    with dummy("well") as server:
        results(
            tmp_path, "--url", server.url, "--model", "m", "--requests", 1, "--turns", 2, "--output-tokens", 4
        )
    first, second = (body["prompt"] for body in server.bodies)
    assert second.startswith(first + "abab ")


def test_latencies_and_the_sweep(tmp_path: Path) -> None:
    """The dummy sends 2 tokens every 10 ms: 5 ms for each token, 10 ms between chunks."""
    for most in (1, 3):
        with dummy("well") as server:
            sizes = ("--requests", 9, "--output-tokens", 20, "--concurrency", most)
            [result] = results(tmp_path, "--url", server.url, "--model", "m", *sizes, "--limit-itl", 1000)
        assert server.most_in_flight == most
        assert result["goodput_requests_per_s"] == pytest.approx(9 / result["duration_s"])
        after_the_first = result["latency_ms"]["mean"] - result["ttft_ms"]["mean"]
        assert result["chunk_gap_ms"]["mean"] == pytest.approx(after_the_first / 9)
        assert result["itl_ms"]["mean"] == pytest.approx(result["chunk_gap_ms"]["mean"] * 9 / 19, rel=0.01)
        assert result["latency_ms"]["mean"] > 99


def test_poisson_arrivals() -> None:
    workload = Synthetic(4000, 1, (1, 1), (1, 1), 0, rate=20.0)
    times = [c.arrival_s for c in workload.build(TokenSource(100, False, seed=1))]
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.1)  # exponential, not even
    assert times == [c.arrival_s for c in workload.build(TokenSource(100, False, seed=1))]
    assert times != [c.arrival_s for c in workload.build(TokenSource(100, False, seed=2))]
    together = Synthetic(5, 1, (1, 1), (1, 1), 0, rate=math.inf).build(TokenSource(100, False, 0))
    assert [c.arrival_s for c in together] == [0.0] * 5


def test_requests_start_at_their_times(tmp_path: Path) -> None:
    with dummy("well") as server:
        sizes = ("--requests", 20, "--rate", 50, "--output-tokens", 2)
        [result] = results(tmp_path, "--url", server.url, "--model", "m", *sizes)
    arrivals = [r["arrival"] for r in result["per_request"]]
    assert max(arrivals) > 0.1
    late = sorted(r["start"] - r["arrival"] for r in result["per_request"])
    assert late[0] > -0.005, "nobody starts early, but for what a timer rounds"
    assert late[len(late) // 2] < 10, "most are on time, as a busy machine sees it"


TRACES = {
    "own": (16, '{"arrival_ms": %d, "input_tokens": 40, "output_tokens": 3, "prefix": [7, %d]}', 1000),
    "mooncake": (
        512,
        '{"timestamp": %d, "input_length": 600, "output_length": 3, "hash_ids": [7, %d]}',
        1000,
    ),
    "bailian": (
        16,
        '{"chat_id": 1, "parent_chat_id": -1, "timestamp": %d, "input_length": 30, "output_length": 3, '
        '"type": "text", "turn": 1, "hash_ids": [7, %d]}',
        1,
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces(name: str, tmp_path: Path) -> None:
    block, line, second = TRACES[name]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([line % (3 * second, 8), "", line % (second, 9), line % (9 * second, 8)]))
    requests = read_trace(path, limit=2)
    assert [(r.arrival_s, r.output_tokens) for r in requests] == [(1.0, 3), (3.0, 3)]
    source = TokenSource(1000, False, seed=0)
    a, b, c = (x.turns[0].prompt() for x in replay(read_trace(path), 2.0, source))
    assert [x.arrival_s for x in replay(requests, 2.0, source)] == [0.0, 1.0]
    assert len(a) == len(b) == requests[0].input_tokens
    assert a[:block] == b[:block] == c[:block]
    assert a[block : 2 * block] != b[block : 2 * block] == c[block : 2 * block]
    assert b[2 * block :] != c[2 * block :] or len(b) <= 2 * block


@pytest.mark.parametrize(
    "bad", ["{", "3", '{"x": 1}', '{"timestamp": 1, "input_length": 0, "output_length": 1}']
)
def test_a_bad_line_is_named(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival_ms": 0, "input_tokens": 4, "output_tokens": 1}\n' + bad)
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 2: "):
        read_trace(path)
    assert bench("--trace", path) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_trace_is_replayed(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(TRACES["own"][1] % (300 * i, i) + "\n" for i in range(3)))
    [result] = results(tmp_path, "--url", server.url, "--vocab", 256, "--trace", path, "--trace-speed", 1.5)
    assert [r["arrival"] for r in result["per_request"]] == pytest.approx([0, 0.2, 0.4])
    assert [r["prompt_tokens"] for r in result["per_request"]] == [40] * 3
    assert [r["cached_tokens"] for r in result["per_request"]] == [0, 16, 16]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("status", "HTTP 500: out of order"),
        ("latin", 'HTTP 500: {"error": "d\ufffdsol\ufffd"}'),
        ("cut", "the stream was cut before its end"),
        ("silent", "no complete answer within 0.3 s"),
        ("hangup", "the server closed the connection before it answered"),
        ("garbage", "the answer is not HTTP"),
        ("malformed", "malformed event"),
        ("complaint", "error in the stream: engine died"),
    ],
)
def test_failures_are_counted(
    mode: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patience = 0.3 if mode == "silent" else PATIENCE_S  # the other failures are noticed without it
    with dummy(mode) as server:
        arguments = ("--url", server.url, "--model", "m", "--requests", 4, "--timeout", patience)
        [result] = results(tmp_path, *arguments, status=1)
    assert result["failed"] == result["requests"] == 4
    [(found, count)] = result["errors"].items()
    assert found.startswith(reason)
    assert count == 4
    shown = capsys.readouterr()
    assert f"4 x {reason}" in shown.out
    assert shown.err == "error: no request was answered\n"


def test_a_refused_connection(capsys: pytest.CaptureFixture[str]) -> None:
    with dummy("well") as gone:
        pass
    assert bench("--url", gone.url, "--model", "m", "--requests", 2) == 1
    assert "2 x connection failed: " in capsys.readouterr().out
    assert bench("--url", gone.url) == 1
    assert capsys.readouterr().err.startswith(
        "error: the server's models cannot be listed: connection failed"
    )
    assert bench("--url", "localhost:1") == 1


def test_ctrl_c_reports_what_was_measured(tmp_path: Path) -> None:
    code = "import sys, tests.bench.test_online as t; sys.exit(t.bench(*sys.argv[1:]))"
    with dummy("well") as server:
        sizes = ["--requests", "2000", "--concurrency", "1", "--output-tokens", "20"]  # minutes
        arguments = ["--url", server.url, "--model", "m", *sizes]
        with subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
        ) as child:
            while len(server.bodies) < 3 and child.poll() is None:
                time.sleep(0.02)
            child.send_signal(signal.SIGINT)
            shown, _ = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 130
    found = re.search(r"in flight: (\d+) requests in", shown)
    assert found
    assert 2 <= int(found[1]) < 2000


def test_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--self-test") == 0
    found = re.search(r"took ([\d,]+) tokens/s", capsys.readouterr().out)
    assert found
    assert int(found[1].replace(",", "")) > 10_000
