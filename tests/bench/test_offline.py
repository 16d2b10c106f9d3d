"""Every command of the tool on the CPU, with a tiny model; its numbers must add up."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.bench import limits, offline, shapes, workloads
from minisgl.bench.__main__ import main
from minisgl.bench.limits import Machine, Work, least_seconds
from minisgl.bench.shapes import SHAPES
from minisgl.bench.workloads import BATCHES, Batch, Draw
from stages import LATEST
from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.weights import tensor_shapes

H200 = Machine(flops=790e12, bandwidth=4.3e12)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workloads that take no time."""
    make = workloads._alike(5, prompt=20, output=6, shared=32)
    monkeypatch.setitem(BATCHES, "tiny", Batch("tiny", make, shared=32))
    monkeypatch.setitem(BATCHES, "tiny-in-turn", Batch("tiny in turn", make, shared=32, in_turn=True))


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    status = main(list(map(str, argv)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_offline(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "result.json"
    flags = [
        "--workload",
        "tiny",
        "--workload",
        "tiny-in-turn",
        "--repeats",
        "3",
        "--device",
        "cpu",
        "--prefill-budget",
        "300",
    ]
    status, out, _ = run(capsys, "offline", checkpoint("qwen3"), *flags, "--out", file)
    assert status == 0
    assert "tiny in turn" in out
    record = json.loads(file.read_text())
    assert set(record) == {"hardware", "versions", "commit", "command", "model", "engine", "results"}
    assert record["engine"]["prefill_budget"] == 300
    assert record["versions"]["torch"] == torch.__version__
    for result in record["results"]:
        assert result["tokens"] == 5 * 6
        assert sorted(result["all_seconds"])[1] == result["seconds"] > 0
        assert result["tokens_per_second"] == pytest.approx(30 / result["seconds"])
        assert result["first_seconds"] > 0
        assert "tp" not in result
        assert result["of_limit"] == pytest.approx(result["limit_seconds"] / result["seconds"])
        assert result["hit_rate"] == pytest.approx(4 * 32 / (5 * 52)), "no run knows the prompts of another"


def test_stages_and_their_chart(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ladder.json"
    flags = [
        "--workload",
        "tiny",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--page-size",
        "16",
        "--prefill-budget",
        "256",
    ]
    chart = tmp_path / "ladder.svg"
    status, _, _ = run(capsys, "stages", checkpoint("qwen3"), *flags, "--out", file, "--chart", chart)
    assert status == 0
    results = json.loads(file.read_text())["results"]
    assert [result["stage"] for result in results] == list(range(1, LATEST + 1))
    assert {result["tokens"] for result in results} == {30}
    assert [result["hit_rate"] > 0 for result in results] == [stage >= 3 for stage in range(1, LATEST + 1)]
    for palette in ("light", "dark"):
        svg = (tmp_path / f"ladder-{palette}.svg").read_text()
        assert svg.startswith("<?xml")
    light, dark = ((tmp_path / f"ladder-{name}.svg").read_text() for name in ("light", "dark"))
    assert light != dark


def test_a_failed_chart_loses_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--stages", "2", "--workload", "tiny", "--repeats", "1", "--device", "cpu"]
    file, chart = tmp_path / "ladder.json", tmp_path / "no" / "folder.svg"
    assert run(capsys, "stages", *flags, "--out", file, "--chart", chart)[0] == 1
    assert json.loads(file.read_text())["results"]


def test_stories_run(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With shorter prompts: what they measure must be there, and the engine must be idle afterwards."""
    from stages.stage4_chunked.engine import EngineConfig, build

    engine = build(
        EngineConfig(
            model=str(checkpoint("qwen3")), device="cpu", max_context=400, prefill_budget=64, max_rows=40
        )
    )
    draw, tokens = Draw(0, 300), Draw.tokens
    monkeypatch.setattr(Draw, "tokens", lambda self, count: tokens(self, min(count, 20 + count // 1000)))
    real = workloads.add
    monkeypatch.setattr(workloads, "add", lambda e, name, prompt, n: real(e, name, prompt, min(n, 200)))
    [talk] = workloads.chat(engine, draw)
    assert len(talk["first_token_seconds"]) == 8
    assert talk["prompt_tokens"] == sorted(talk["prompt_tokens"])
    [met] = workloads.gaps(engine, draw)
    assert 0 < met["gap_ms"]["p50"] <= met["gap_ms"]["p99"] <= met["gap_ms"]["max"]
    assert not engine.has_work
    assert engine.statistics.free_pages + engine.statistics.cached_pages == engine.statistics.pages


def test_the_offline_workload_is_mini_sglangs() -> None:
    load = BATCHES["offline"].make(Draw(7, 151_936))
    assert sum(output for _, output in load) == 133_966
    assert all(100 <= len(prompt) <= 1024 and 100 <= output <= 1024 for prompt, output in load)
    again = BATCHES["offline"].make(Draw(8, 151_936))
    assert [len(prompt) for prompt, _ in load] == [len(prompt) for prompt, _ in again]
    assert load[0][0] != again[0][0]


def shape(folder: Path, name: str) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return ModelConfig.load(folder)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen3-0.6b", 0.596), ("qwen3-14b", 14.77), ("qwen3-32b", 32.76), ("llama-3.1-8b", 8.03),
     ("llama-3.1-70b", 70.55), ("llama-3.2-1b", 1.236), ("qwen3-8b", 8.19)],
)  # fmt: skip
def test_shapes_are_those_of_the_models(tmp_path: Path, name: str, parameters: float) -> None:
    sizes = tensor_shapes(shape(tmp_path, name)).values()
    total = sum(torch.Size(size).numel() for size in sizes)
    assert total / 1e9 == pytest.approx(parameters, rel=0.003)


@pytest.mark.parametrize(
    ("name", "workload", "seconds"),
    [
        ("qwen3-0.6b", "offline", 133_966 / 36_200),
        ("qwen3-0.6b", "one", 512 / 3_480),
        ("qwen3-0.6b", "eight", 8 * 512 / 22_300),
        ("qwen3-0.6b", "thirty-two", 32 * 512 / 52_900),
        ("qwen3-0.6b", "prefill", 0.083),
        ("qwen3-0.6b", "long-prefill", 1.58),
        ("qwen3-0.6b", "shared", 0.51),
        ("qwen3-14b", "offline", 133_966 / 8_075),
        ("qwen3-14b", "one", 512 / 153),
        ("qwen3-14b", "prefill", 2.23),
        ("qwen3-14b", "shared", 1.6),
    ],
)
def test_limits_are_those_that_were_worked_out_by_hand(
    tmp_path: Path, name: str, workload: str, seconds: float
) -> None:
    batch = BATCHES[workload]
    work = batch.work(batch.make(Draw(0, 151_936)))
    assert least_seconds(shape(tmp_path, name), 2, H200, work) == pytest.approx(seconds, rel=0.04)


def test_a_limit_in_turn_reads_the_weights_more_often(tmp_path: Path) -> None:
    config, work = shape(tmp_path, "qwen3-0.6b"), [Work(10, 5)] * 3
    alone = least_seconds(config, 2, H200, work[:1])
    assert least_seconds(config, 2, H200, work, in_turn=True) == pytest.approx(3 * alone)
    assert least_seconds(config, 2, H200, work) < 1.2 * alone


def test_the_machine_is_measured() -> None:
    machine = limits.measure_machine(torch.device("cpu"), torch.float32)
    assert 1e9 < machine.flops < 1e14
    assert 1e8 < machine.bandwidth < 1e13


@pytest.fixture
def measure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """A command's file, for a small shape and the load `tiny`."""
    small = shapes._QWEN3 | shapes._sizes(64, 96, 2, 8) | {"vocab_size": 500, "head_dim": 16}
    monkeypatch.setitem(SHAPES, "qwen3-8b", small)
    monkeypatch.setattr(offline, "measure_machine", lambda *_: H200)
    flags = ["--shape", "qwen3-8b", "--workload", "tiny", "--repeats", "2", "--device", "cpu"]
    file = tmp_path / "x.json"

    def get(command: str, *more: str) -> dict[str, Any]:
        assert run(capsys, command, *flags, *more, "--out", file)[0] == 0
        record: dict[str, Any] = json.loads(file.read_text())
        return record

    return get


def test_a_shape_in_every_stage(measure: Callable[..., dict[str, Any]]) -> None:
    record = measure("stages", "--page-size", "16")
    assert record["model"] == "qwen3-8b's shape, random weights"
    assert record["engine"]["random_weights"] is True
    assert [result["stage"] for result in record["results"]] == list(range(1, LATEST + 1))


def test_ranks_share_the_limit(measure: Callable[..., dict[str, Any]]) -> None:
    [one], [two] = (measure("offline", "--tp", tp)["results"] for tp in ("1", "2"))
    assert two["tp"] == 2
    assert two["limit_seconds"] == pytest.approx(one["limit_seconds"] / 2)
    assert two["tokens"] == one["tokens"]
    left = ["pgrep", "-P", str(os.getpid()), "-f", "stage6_parallel.worker"]
    assert subprocess.run(left, check=False).returncode == 1, "no rank outlives its engine"


@pytest.mark.parametrize(("flag", "unmeasured"), [("--warm-up", 1), ("--no-warm-up", 0)])
def test_the_warm_up_does_not_count(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, flag: str, unmeasured: int
) -> None:
    ran: list[str] = []
    tiny = BATCHES["tiny"]

    def make(draw: Draw) -> workloads.Load:
        ran.append("tiny")
        return tiny.make(draw)

    def tell(*_: Any) -> Iterator[dict[str, Any]]:
        ran.append("tale")
        yield {"workload": "tale"}

    monkeypatch.setitem(BATCHES, "tiny", replace(tiny, make=make))
    monkeypatch.setitem(workloads.STORIES, "tale", tell)
    batch, *tales = measure("offline", "--stage", "4", "--workload", "tale", flag)["results"]
    assert ran == ["tiny"] * (unmeasured + 2) + ["tale"] * (unmeasured + 2)
    assert len(batch["all_seconds"]) == 2
    assert [tale["run"] for tale in tales] == [0, 1]
    assert [("first_seconds" in result) for result in (batch, *tales)] == [unmeasured == 1] * 3


def test_radix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "radix.json"
    assert run(capsys, "radix", "--prompts", "50", "--tokens", "64", "--out", file)[0] == 0
    [result] = json.loads(file.read_text())["results"]
    assert len(result["all_match_us"]) == 50
    assert 50 < result["cached_pages"] <= 1050 * 4


def write(path: Path, **result: Any) -> Path:
    base = {"workload": "w", "stage": 2, "seconds": 2.0, "all_seconds": [1.0, 2.0, 4.0]}
    path.write_text(json.dumps({"commit": path.stem, "results": [base | result]}))
    return path


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = write(tmp_path / "a.json", gap_ms={"p50": 4.0}), write(tmp_path / "b.json", seconds=1.0)
    status, out, _ = run(capsys, "compare", before, after)
    assert status == 0
    assert "commit: a -> b" in out
    [line] = [line for line in out.splitlines() if "seconds" in line]
    assert line.split()[-5:] == ["2", "1", "0.500", "150.0%,", "300.0%"]
    assert "p50" not in out, "only what both have"


def test_compare_shows_the_turns_of_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.json", first_token_seconds=[0.5, 0.25], prompt_tokens=[3, 5])
    _, out, _ = run(capsys, "compare", file, file)
    [line] = [line for line in out.splitlines() if "first_token_seconds.2" in line]
    assert line.split()[1:4] == ["0.25", "0.25", "1.000"]
    assert "all_" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["offline", "--workload", "shared", "--device", "cpu"],
            "leaves no room for an answer in the context of 2048",
        ),
        (["offline", "--repeats", "0"], "repeats must be at least 1"),
        (["offline", "no/such/model"], "there is no folder"),
        (["compare", "a.json", "b.json"], "a.json cannot be read"),
        (
            ["stages", "--stages", "1,9", "--device", "cpu", "--repeats", "1", "--workload", "tiny"],
            "no stage 9",
        ),
        (["stages", "--stages", "1,"], "--stages must be numbers such as 1,3"),
        (["radix", "--page-size", "0"], "one page of at least one token"),
        (["radix", "--prompts", "5", "--tokens", "15"], "one page of at least one token"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    status, _, err = run(capsys, *argv)
    assert status == 1
    [line] = [line for line in err.splitlines() if "error: " in line]
    assert message in line


def test_files_that_are_no_results_or_have_nothing_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text("[]")
    good, other = write(tmp_path / "a.json"), write(tmp_path / "b.json", stage=3)
    assert "not a result of this program" in run(capsys, "compare", tmp_path / "list.json", good)[2]
    (tmp_path / "numbers.json").write_text('{"results": [1]}')
    assert "not a result of this program" in run(capsys, "compare", good, tmp_path / "numbers.json")[2]
    (tmp_path / "binary.json").write_bytes(b"\xff")
    assert "binary.json cannot be read" in run(capsys, "compare", tmp_path / "binary.json", good)[2]
    assert "no measurement in common" in run(capsys, "compare", good, other)[2]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--help")[0] == 0
    assert run(capsys, "nonsense")[0] == 2
    for command in ("offline", "stages", "online", "radix", "compare", "weights"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert "usage: python -m minisgl.bench " + command in capsys.readouterr().out


def test_ablate_takes_out_a_part_at_a_time(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ablate.json"
    flags = ["--workload", "tiny", "--repeats", "1", "--device", "cpu", "--page-size", "16"]
    wanted = ["radix", "overlap", "chunks", "all-but-torch", "all-but-flashinfer"]
    without = [flag for name in wanted for flag in ("--without", name)]
    status, out, _ = run(capsys, "ablate", checkpoint("qwen3"), *flags, *without, "--out", file)
    assert status == 0
    results = {result["variant"]: result for result in json.loads(file.read_text())["results"]}
    assert [*results] == ["everything", "radix", "chunks", "overlap", "all-but-torch"]
    assert results["radix"]["hit_rate"] == 0 < results["everything"]["hit_rate"]
    assert "not measured: all-but-flashinfer: attention backend flashinfer needs" in out
    assert len([line for line in out.splitlines() if line.split()[:1] == ["everything"]]) == 2
