"""A folder of random weights can be served like any other."""

from pathlib import Path

import pytest

from minisgl import LLM
from minisgl.bench import shapes
from minisgl.bench.__main__ import main
from stages.interface import SamplingParams
from stages.stage1_naive.tokenizer import Tokenizer

_TINY = shapes.SHAPES["qwen3-0.6b"] | {
    "vocab_size": 3000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_weights_makes_a_model_that_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", _TINY)
    assert main(["weights", "tiny", str(tmp_path / "new")]) == 0
    tokenizer = Tokenizer(tmp_path / "new")
    assert tokenizer.encode("a radix cache")
    assert tokenizer.chat([{"role": "user", "content": "hello"}])
    assert LLM(str(tmp_path / "new"), stage=1).generate("hello", SamplingParams(max_tokens=2, seed=0))[0].text


def test_weights_overwrites_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").touch()
    assert main(["weights", "qwen3-0.6b", str(tmp_path)]) == 1
    assert "holds a model already" in capsys.readouterr().err
