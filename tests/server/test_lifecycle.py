"""Starting, stopping, dying: what is left behind, and what the user is told."""

import asyncio
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.running import PATIENCE_S, RunningServer, alive, gone, launch

ONE_BY_ONE = ("--model-name", "tiny", "--max-rows", "1")
# Of a server that gives one answer after the other, this takes minutes: nobody need be quick to interrupt it.
ENDLESS: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 500, "n": 100}
IGNORE_EOS = {"extra_body": {"ignore_eos": True}}


@pytest.fixture
def tiny(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


def failed_start(tmp_path: Path, *arguments: str | Path) -> str:
    """stderr of a launch that must fail with status 1, without a traceback or a process left."""
    with launch(tmp_path / "logs", *arguments) as server:
        assert server.process.wait(PATIENCE_S) == 1
        assert "Traceback" not in server.stderr
        assert server.stderr.splitlines()[-1].startswith("error: ")
        return server.stderr


def until(server: RunningServer, reached: Callable[[int], bool]) -> None:
    """Wait for a number of requests in the engine."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached(server.metric("running") + server.metric("waiting")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_hangs_up_aborts_its_request(tiny: Path, tmp_path: Path) -> None:
    """Those of its choices that had not begun never begin."""
    with launch(tmp_path / "logs", tiny, *ONE_BY_ONE) as server:
        server.wait_ready()
        for stream in (False, True):
            connection = server.connect()
            body = {**ENDLESS, "ignore_eos": True, "stream": stream}
            connection.request("POST", "/v1/completions", json.dumps(body))
            until(server, lambda requests: requests > 0)
            if stream:
                assert connection.getresponse().read(10)
            connection.close()
            until(server, lambda requests: requests == 0)
        assert server.metric("prompt_tokens_total") < ENDLESS["n"]


async def test_life_and_death(tiny: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of answers: they end, the server ends, nothing is left."""
    with launch(tmp_path / "logs", tiny, *ONE_BY_ONE) as server:
        server.wait_ready()
        pids = [server.process.pid, *server.descendants()]
        assert len(server.engine_pids()) == 1
        client = server.async_client
        stream = await client.completions.create(stream=True, **ENDLESS, **IGNORE_EOS)
        await anext(aiter(stream))
        whole = asyncio.create_task(client.completions.create(**ENDLESS, **IGNORE_EOS))
        await asyncio.to_thread(until, server, lambda requests: requests > ENDLESS["n"])
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await whole
        assert await asyncio.to_thread(server.process.wait, PATIENCE_S) == 0
        assert gone(pids)
        assert "Traceback" not in server.stderr
        assert "leaked" not in server.stderr


def test_the_engine_is_killed(tiny: Path, tmp_path: Path) -> None:
    with launch(tmp_path / "logs", tiny, *ONE_BY_ONE) as server:
        server.wait_ready()
        stream = server.client.completions.create(stream=True, **ENDLESS, **IGNORE_EOS)
        next(stream)
        [engine] = server.engine_pids()
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="killed by SIGKILL"):
            list(stream)
        assert server.process.wait(PATIENCE_S) == 1
        assert "error: the engine process was killed by SIGKILL" in server.stderr
        assert "Traceback" not in server.stderr


def test_the_server_is_killed(tiny: Path, tmp_path: Path) -> None:
    with launch(tmp_path / "logs", tiny) as server:
        server.wait_ready()
        pids = server.descendants()
        server.process.kill()
        assert gone(pids)


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
        assert server.process.wait(PATIENCE_S) == 0
        assert gone(pids)
        assert "http://" not in server.stdout
        assert "Traceback" not in server.stderr


def test_sigterm_does_not_wait_for_a_thread(tiny: Path, tmp_path: Path) -> None:
    """This template takes days; so may a text, to tokenize."""
    model = shutil.copytree(tiny, tmp_path / "model")
    loop = "{% for i in range(99999) %}"
    (model / "chat_template.jinja").write_text(loop * 2 + "{% endfor %}" * 2)
    with launch(tmp_path / "logs", model, "--model-name", "tiny") as server:
        server.wait_ready()
        connection = server.connect()
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        time.sleep(0.5)  # for the template to begin; later is as good
        assert server.stop() == 0
        assert "Traceback" not in server.stderr
        connection.close()


def test_a_long_tmpdir(tiny: Path, tmp_path: Path) -> None:
    """The path of a socket may have about a hundred characters."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with launch(tmp_path / "logs", tiny, TMPDIR=str(folder)) as server:
        server.wait_ready()
        assert server.stop() == 0


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
            assert server.process.wait(PATIENCE_S) == 1
            assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in server.stderr
            assert "Traceback" not in server.stderr


def test_bad_models(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    assert "/no/such/folder" in failed_start(tmp_path, "/no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "config.json" in failed_start(tmp_path, tmp_path / "empty")
