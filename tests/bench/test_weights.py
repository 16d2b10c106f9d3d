"""A folder of a known shape can be served with random weights."""

from pathlib import Path

import pytest

from minisgl import LLM
from minisgl.bench import shapes
from minisgl.bench.__main__ import main
from stages import LATEST
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


@pytest.mark.parametrize("stage", [1, LATEST])
def test_weights_makes_a_model_that_can_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", _TINY)
    folder = tmp_path / "a new one"
    assert main(["weights", "tiny", str(folder)]) == 0
    assert capsys.readouterr().out.endswith(f"python -m minisgl.launch '{folder}' --random-weights\n")
    assert not list(folder.glob("*.safetensors*"))
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("a radix cache")
    assert tokenizer.chat([{"role": "user", "content": "hello"}])
    llm = LLM(str(folder), stage=stage, device="cpu", random_weights=True)
    assert llm.generate("hello", SamplingParams(max_tokens=2, seed=0))[0].text
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        LLM(str(folder), stage=stage, device="cpu")


def test_weights_overwrites_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").touch()
    assert main(["weights", "qwen3-0.6b", str(tmp_path)]) == 1
    assert "holds a model already" in capsys.readouterr().err
