"""Fixtures that tests of several packages share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.stage2_paged.request_table import RequestTable
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from threads, and one thread makes sums repeatable."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("qwen3")` is the folder of that family's tiny random model, written once."""
    written: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in written:
            written[family] = write_checkpoint(tmp_path_factory.mktemp(family), family)
        return written[family]

    return get


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
