"""Servers of two ranks: they serve, they stop, and when a rank dies or hangs all of it ends with a reason."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from stages.stage6_parallel.watch import SERVING, TICK_S
from tests.server.running import PATIENCE_S, RunningServer, alive, gone, launch

PAIR = ("--tp", "2", "--device", "cpu", "--num-pages", "100", "--max-rows", "1")
# Answers one after the other, for a minute: it must not end before a busy machine lets a test interrupt it.
LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "a",
    "max_tokens": 400,
    "n": 32,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def tiny(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


def ranks_of(server: RunningServer) -> tuple[int, int]:
    """The process of rank 0, which is the server's engine process, and that of rank 1."""
    [leader] = server.engine_pids()
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    [worker] = [int(pid) for pid in children if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return leader, worker


@contextmanager
def serving(folder: Path, *arguments: str | Path, tidy: bool = True) -> Iterator[RunningServer]:
    """A server that is ready; nothing may be left of it in the end, whatever happened to it.
    `tidy`: no process was killed that had something to give back, of which Python would tell."""
    with launch(folder, *arguments) as server:
        server.wait_ready()
        pids = [server.process.pid, *server.descendants()]
        port = int(server.url.rpartition(":")[2])
        try:
            yield server
            assert server.process.poll() is not None, "the test ends it"
            assert gone(pids)
            assert "Traceback" not in server.stderr
            assert not tidy or "leaked" not in server.stderr
            assert "destroy_process_group" not in server.stderr
            with socket.create_server(("127.0.0.1", port)):
                pass  # the port is free
        finally:
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)


def test_the_built_in_model_answers_until_a_rank_is_killed(tmp_path: Path) -> None:
    """Also after all of it was stopped and continued, as by Ctrl-Z and fg, for longer than the silence of one
    would be borne: nobody heard it. A rank that dies while nobody asks is noticed too."""
    chat: dict[str, Any] = {
        "model": "mini-sglang",
        "messages": [{"role": "user", "content": "What is a radix cache?"}],
        "temperature": 0.0,
        "max_tokens": 20,
    }
    with serving(tmp_path / "logs", *PAIR) as server:
        answers = [server.client.chat.completions.create(**chat) for _ in range(2)]
        text = answers[0].choices[0].message.content
        assert text is not None
        assert "radix" in text.lower()
        assert answers[1].choices[0].message.content == text
        with pytest.raises(openai.BadRequestError):
            server.client.chat.completions.create(**{**chat, "max_tokens": 10**6})
        assert server.client.chat.completions.create(**chat).choices[0].message.content == text
        leader, worker = ranks_of(server)
        for number, seconds in ((signal.SIGSTOP, SERVING * TICK_S + 1), (signal.SIGCONT, 1)):
            for pid in (server.process.pid, leader, worker):
                os.kill(pid, number)
            time.sleep(seconds)
        assert server.client.chat.completions.create(**chat).choices[0].message.content == text
        os.kill(worker, signal.SIGKILL)
        assert server.process.wait(PATIENCE_S) == 1
        assert server.stderr.splitlines()[-1] == "error: rank 1 was killed by SIGKILL"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_is_lost_in_the_middle_of_an_answer(tiny: Path, tmp_path: Path, number: int) -> None:
    said = "killed by SIGKILL" if number == signal.SIGKILL else "rank 1 is stopped"
    with serving(tmp_path / "logs", tiny, "--model-name", "tiny", *PAIR) as server:
        stream = server.client.completions.create(stream=True, **LONG)
        next(stream)
        _, worker = ranks_of(server)
        os.kill(worker, number)
        with pytest.raises(openai.APIError, match=said):
            list(stream)
        assert server.process.wait(PATIENCE_S) == 1
        assert said in server.stderr.splitlines()[-1]


def test_the_engine_process_is_stopped(tiny: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "logs", tiny, *PAIR) as server:
        os.kill(server.engine_pids()[0], signal.SIGSTOP)
        assert server.process.wait(PATIENCE_S) == 1
        assert "the engine process is stopped" in server.stderr.splitlines()[-1]


@pytest.mark.parametrize("victim", ["engine process", "server"])
def test_nothing_outlives_whoever_started_it(tiny: Path, tmp_path: Path, victim: str) -> None:
    """Rank 1 is a child of the engine process, and that of the server; none of them can say goodbye."""
    with serving(tmp_path / "logs", tiny, *PAIR, tidy=False) as server:
        leader, _ = ranks_of(server)
        os.kill(leader if victim == "engine process" else server.process.pid, signal.SIGKILL)
        status = server.process.wait(PATIENCE_S)
        assert status == (1 if victim == "engine process" else -signal.SIGKILL)
        if victim == "engine process":
            assert "error: the engine process was killed by SIGKILL" in server.stderr.splitlines()
    assert "nothing for" not in server.stderr, "a rank ends with its parent, not after a long silence"


def test_ctrl_c_in_the_middle_of_an_answer(tiny: Path, tmp_path: Path) -> None:
    """All processes get the signal, as from a terminal."""
    with serving(tmp_path / "logs", tiny, "--model-name", "tiny", *PAIR) as server:
        stream = server.client.completions.create(stream=True, **LONG)
        next(stream)
        for pid in [server.process.pid, *ranks_of(server)]:
            os.kill(pid, signal.SIGINT)
        with pytest.raises(openai.APIError):
            list(stream)
        assert server.process.wait(PATIENCE_S) == 0
        assert "error" not in server.stderr


@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun(tiny: Path, tmp_path: Path, machines: int) -> None:
    """Rank 0 serves; the others compute. A signal to torchrun ends them all. Two machines are two torchruns
    here, each with a rank that believes to be alone on its machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    processes = []
    for node in range(machines):
        place = [
            "--nnodes",
            "2",
            "--node-rank",
            str(node),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(port),
        ]
        where = (
            ["--standalone", "--nproc-per-node", "2"] if machines == 1 else [*place, "--nproc-per-node", "1"]
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "minisgl.launch"]
        command = [*torchrun, str(tiny), "--port", "0", "--model-name", "tiny", *PAIR]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        folder = tmp_path / str(node)
        folder.mkdir()
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            processes.append(subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment))
    servers = [RunningServer(process, tmp_path / str(node)) for node, process in enumerate(processes)]
    try:
        servers[0].wait_ready()
        pids = [pid for server in servers for pid in server.descendants()]
        assert len(servers[0].engine_pids()) == 1
        status, answer = servers[0].request(
            "POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "ignore_eos": True}
        )
        assert status == 200, json.dumps(answer)
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(PATIENCE_S)
        assert gone(pids)
    finally:
        left = [pid for server in servers for pid in [server.process.pid, *server.descendants()]]
        for pid in filter(alive, left):
            os.kill(pid, signal.SIGKILL)
