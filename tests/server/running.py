"""A real server in a process of its own, for the tests to talk to."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openai import AsyncOpenAI, OpenAI

PATIENCE_S = 300  # a deadline only tells a hang from a busy machine: minutes, and whoever waits looks often


@dataclass
class RunningServer:
    process: "subprocess.Popen[bytes]"
    folder: Path  # holds what it wrote to stdout and stderr
    url: str = ""

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S)

    @property
    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S)

    def request(
        self, method: str, path: str, body: Any = None, timeout: float = PATIENCE_S
    ) -> tuple[int, Any]:
        """Status and decoded JSON of one bare HTTP request; `body` is bytes, or becomes JSON."""
        connection = self.connect(timeout)
        try:
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def connect(self, timeout: float = PATIENCE_S) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout)

    def bare(self, *pieces: bytes, to_end: bool = False) -> bytes:
        """What is answered to a request as it stands, or how that begins. The server may cease to listen."""
        address = urlsplit(self.url)
        received = b""
        with socket.create_connection((address.hostname, address.port), PATIENCE_S) as connection:
            with suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)
            with suppress(ConnectionError):
                while (to_end or not received) and (data := connection.recv(4096)):
                    received += data
        return received

    def wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"at (http://\S+)/v1", self.stdout)):
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.05)
        self.url = found[1]

    def wait_for_child(self) -> None:
        """Wait until the engine process exists."""
        while not self.engine_pids():
            assert self.process.poll() is None, self.stderr
            time.sleep(0.02)

    def descendants(self) -> list[int]:
        return _descendants(self.process.pid)

    def engine_pids(self) -> list[int]:
        return [pid for pid in self.descendants() if b"spawn_main" in _command(pid)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def metric(self, name: str) -> int:
        """A number of /metrics."""
        connection = self.connect()
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        found = re.search(rf"^minisgl_{name} (\d+)$", text, re.MULTILINE)
        assert found, text
        return int(found[1])


@contextmanager
def launch(folder: Path, *arguments: str | Path, **variables: str) -> Iterator[RunningServer]:
    """`python -m minisgl.launch` on a free port, killed at the end if it still runs. `variables` are of its
    environment."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "minisgl.launch", "--port", "0", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
    server = RunningServer(process, folder)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    """Wait until all of them have ended; whether they have."""
    deadline = time.monotonic() + PATIENCE_S
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [below for child in children for below in _descendants(child)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
