"""Starting, stopping, dying: what is left behind, and what the user is told."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.running import START_S, RunningServer, alive, gone_within, launch

ENDLESS: dict[str, Any] = {
    "model": "tiny",
    "prompt": "a",
    "max_tokens": 500,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def tiny(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


def failed_start(tmp_path: Path, *arguments: str | Path) -> str:
    """stderr of a launch that must fail with status 1, without a traceback or a process left."""
    with launch(tmp_path / "logs", *arguments) as server:
        assert server.process.wait(60) == 1
        assert "Traceback" not in server.stderr
        assert server.stderr.splitlines()[-1].startswith("error: ")
        return server.stderr


def test_a_client_that_hangs_up_aborts_its_request(server: RunningServer) -> None:
    """The naive engine serves one request after the other: what is not aborted is waited for."""
    slow = {"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 8}
    for stream in (False, True):
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps({**slow, "stream": stream}))
        if stream:
            assert connection.getresponse().read(10)
        else:
            time.sleep(0.5)
        connection.close()
    start = time.monotonic()
    server.client.completions.create(model="tiny", prompt="b", max_tokens=1)
    assert time.monotonic() - start < 5, "sixteen answers of 500 tokens would take minutes"


async def test_life_and_death(tiny: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of answers: they end, the server ends, nothing is left."""
    with launch(tmp_path / "logs", tiny, "--model-name", "tiny") as server:
        server.wait_ready()
        pids = [server.process.pid, *server.descendants()]
        assert len(server.engine_pids()) == 1
        client = server.async_client
        stream = await client.completions.create(stream=True, **ENDLESS)
        await anext(aiter(stream))
        whole = asyncio.create_task(client.completions.create(**ENDLESS))
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await whole
        assert await asyncio.to_thread(server.process.wait, 15) == 0
        assert gone_within(pids, 3)
        assert "Traceback" not in server.stderr
        assert "leaked" not in server.stderr


def test_the_engine_is_killed(tiny: Path, tmp_path: Path) -> None:
    with launch(tmp_path / "logs", tiny, "--model-name", "tiny") as server:
        server.wait_ready()
        stream = server.client.completions.create(stream=True, **ENDLESS)
        next(stream)
        [engine] = server.engine_pids()
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="killed by SIGKILL"):
            list(stream)
        assert server.process.wait(15) == 1
        assert "error: the engine process was killed by SIGKILL" in server.stderr
        assert "Traceback" not in server.stderr


def test_the_server_is_killed(tiny: Path, tmp_path: Path) -> None:
    with launch(tmp_path / "logs", tiny) as server:
        server.wait_ready()
        pids = server.descendants()
        server.process.kill()
        assert gone_within(pids, 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", [0.0, 1.0])
def test_stopped_while_loading(tiny: Path, tmp_path: Path, number: int, wait: float) -> None:
    with launch(tmp_path / "logs", tiny) as server:
        server.wait_for_child()
        time.sleep(wait)
        pids = [server.process.pid, *server.descendants()]
        for pid in pids:  # as a terminal does
            if alive(pid):
                os.kill(pid, number)
        assert server.process.wait(15) == 0
        assert gone_within(pids, 3)
        assert "http://" not in server.stdout
        assert "Traceback" not in server.stderr


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stderr = failed_start(tmp_path, "/no/model/needed", "--port", str(port))
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in stderr


def test_a_port_that_another_takes_while_the_model_loads(tiny: Path, tmp_path: Path) -> None:
    with socket.socket() as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rival.bind(("127.0.0.1", 0))
        port = rival.getsockname()[1]
        with launch(tmp_path / "logs", tiny, "--port", str(port)) as server:
            server.wait_for_child()
            rival.listen()
            assert server.process.wait(START_S) == 1
            assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in server.stderr
            assert "Traceback" not in server.stderr


def test_bad_models(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    assert "/no/such/folder" in failed_start(tmp_path, "/no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "config.json" in failed_start(tmp_path, tmp_path / "empty")
