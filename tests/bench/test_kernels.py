"""`kernels`: its table anywhere; its calls on a GPU, or with TRITON_INTERPRET=1; its times on a GPU."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.bench import kernels
from minisgl.bench.__main__ import main
from minisgl.bench.limits import Machine
from minisgl.bench.shapes import SHAPES
from stages.stage1_naive.config import ModelConfig

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set before anything imports Triton
MEASURED = Path(__file__).parents[2] / "benchmarks/results/stage5-kernels-h200.json"


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-0.6b"]))
    return ModelConfig.load(tmp_path)


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["kernels", *argv]) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.skipif(CUDA, reason="it is for a machine without a GPU")
def test_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(capsys) == "error: the fused kernels can only be measured on a CUDA GPU, with Triton"


@pytest.mark.parametrize("rows", ["", "0", "1,", "1,x", "-3"])
def test_rows_that_are_none(capsys: pytest.CaptureFixture[str], rows: str) -> None:
    assert "--rows must be numbers such as 1,8,256" in fail(capsys, f"--rows={rows}")


def test_the_table_and_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int]] = []

    def cases(_: ModelConfig, rows: list[int], __: Any) -> list[kernels.Case]:
        calls = [lambda i, name=name: seen.append((name, i)) for name in ("ours", "pytorch")]
        return [("add", f"{n} x 5", 3000 * n, [(0,), (1,)], *calls) for n in rows]

    monkeypatch.setattr(kernels, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(kernels, "measure_machine", lambda *_: Machine(flops=1e12, bandwidth=1e9))
    monkeypatch.setattr(kernels, "cases", cases)
    file = tmp_path / "new" / "kernels.json"
    assert main(["kernels", "--rows", "1,20", "--out", str(file)]) == 0
    record, known = json.loads(file.read_text()), json.loads(MEASURED.read_text())
    assert record["copy_bandwidth"] == 1e9
    assert {"hardware", "versions", "commit", "command"} <= set(record)
    assert [set(result) for result in record["results"]] == [set(known["results"][0])] * 2
    assert [(r["size"], r["ceiling_us"]) for r in record["results"]] == [("1 x 5", 3.0), ("20 x 5", 60.0)]
    assert set(seen) == {("ours", 0), ("ours", 1), ("pytorch", 0), ("pytorch", 1)}
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_sizes_are_those_that_were_measured_before(config: ModelConfig) -> None:
    pytest.importorskip("triton")
    randn = partial(torch.randn, device="meta", dtype=torch.bfloat16)
    moved = {case[:2]: case[2] for case in kernels.cases(config, [], randn)}
    known = json.loads(MEASURED.read_text())
    for r in known["results"]:
        ceiling = 1e6 * moved[r["kernel"], r["size"]] / known["copy_bandwidth"]
        assert ceiling == pytest.approx(r["ceiling_us"], rel=0.02, abs=0.01)
    assert {size for kernel, size in moved if kernel == "decode attention"} >= {"1 x 430 tokens"}
    few = {case[1] for case in kernels.cases(config, [2, 300], randn)}
    assert few >= {"2 x 1,024", "300 tokens", "2 x 151,936", "2 x 430 tokens"}
    assert "300 x 430 tokens" not in few


@pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_ours_and_pytorch_do_the_same(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, qk_norm: bool, rows: int
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "_copies", lambda *_, **__: range(2))
    small = replace(
        config, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=300, qk_norm=qk_norm,
    )  # fmt: skip
    dtype, close = (torch.bfloat16, 0.06) if CUDA else (torch.float32, 1e-4)
    torch.manual_seed(0)
    randn = partial(torch.randn, device="cuda" if CUDA else "cpu", dtype=dtype)
    for kernel, _, _, inputs, ours, pytorch in kernels.cases(small, [rows], randn):
        assert len(inputs) == 2
        if "sampling" in kernel and not CUDA:
            continue  # its logarithm is CUDA's own
        for own in inputs:
            expected, result = pytorch(*own), ours(*own)  # ours may overwrite what it was given
            if "sampling" in kernel:
                expected, result = (x.tokens for x in (expected, result))
            torch.testing.assert_close(result, expected, rtol=0.02, atol=close)


@pytest.mark.gpu
def test_every_kernel_has_its_time(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    assert main(["kernels", "--rows", "1,3", "--out", str(file)]) == 0
    record = json.loads(file.read_text())
    names = {r["kernel"] for r in json.loads(MEASURED.read_text())["results"]} | {"decode attention"}
    assert {(r["kernel"], r["size"].split()[0]) for r in record["results"]} == {
        (name, rows) for name in names for rows in ("1", "3")
    }
    assert all(0 < r["ours_us"] < 1000 and r["pytorch_us"] > 0 for r in record["results"])
