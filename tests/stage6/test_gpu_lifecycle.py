"""A server on two GPUs whose rank dies or stops while they compute."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.server.running import PATIENCE_S
from tests.stage6.test_lifecycle import LONG, ranks_of, serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("flags", [(), ("--no-one-shot",)])
def test_a_rank_is_lost_under_load(tmp_path: Path, number: int, flags: tuple[str, ...]) -> None:
    """The other waits in a kernel then, of NCCL's or of ours, and cannot leave it by itself."""
    said = "killed by SIGKILL" if number == signal.SIGKILL else "rank 1 is stopped"
    model = write_checkpoint(tmp_path / "model", "qwen3", head_dim=64)
    arguments = ("--tp", "2", "--model-name", "tiny", "--num-pages", "500", "--max-rows", "8", *flags)
    with serving(tmp_path / "logs", model, *arguments) as server, ThreadPoolExecutor(4) as pool:

        def ask() -> str:
            """One answer after the other, until there is none; why."""
            while True:
                try:
                    list(server.client.completions.create(stream=True, **LONG))
                except openai.APIError as error:
                    return str(error)

        asking = [pool.submit(ask) for _ in range(4)]
        time.sleep(2)
        assert not any(one.done() for one in asking)
        _, worker = ranks_of(server)
        os.kill(worker, number)
        assert server.process.wait(PATIENCE_S) == 1
        assert any(said in one.result(PATIENCE_S) for one in asking)
        assert said in server.stderr.splitlines()[-1]
