"""Small steps have one thread, which waits for nobody."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.stage1_naive.config import ModelConfig
from stages.stage1_naive.model import Ops
from stages.stage1_naive.threads import fitting_threads
from stages.stage1_naive.weights import load_model, random_reader
from tests.checkpoints import write_checkpoint


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config, cpu = ModelConfig.load(write_checkpoint(tmp_path, "qwen3")), torch.device("cpu")
    model = load_model(config, Ops(), random_reader(config, cpu, torch.float32), torch.float32, cpu)
    torch.set_num_threads(2)
    yield model
    torch.set_num_threads(1)


def threads_in(model: Any, tokens: int) -> int:
    with fitting_threads(model, tokens):
        return torch.get_num_threads()


def test_the_size_of_the_products_decides(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_in(model, 1) == 1
    assert torch.get_num_threads() == 2  # what the rest of the process has is its own affair
    assert threads_in(model, 100_000) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_in(model, 1) == 2
