from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.checkpoints import write_checkpoint
from tests.server.running import RunningServer, launch

CONTEXT = 2**17  # of `large`, as large models have: what a request may hold grows with it


@pytest.fixture(scope="session")
def server(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server for all tests that leave it as they found it; its model is called `tiny`."""
    folder = tmp_path_factory.mktemp("server")
    with launch(folder, checkpoint("qwen3"), "--model-name", "tiny") as running:
        running.wait_ready()
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with server.client as client:
        yield client


@pytest.fixture
def async_client(server: RunningServer) -> AsyncOpenAI:
    return server.async_client


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of a model with a long context, also called `tiny`."""
    folder = tmp_path_factory.mktemp("large")
    model = write_checkpoint(folder / "model", "qwen3", max_position_embeddings=CONTEXT)
    with launch(folder, model, "--model-name", "tiny") as running:
        running.wait_ready()
        yield running
