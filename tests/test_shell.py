"""The terminal chat, driven through a pseudo-terminal as a person drives it."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.server.running import PATIENCE_S


class Terminal:
    """`python -m minisgl.shell` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.screen = ""
        leader, follower = pty.openpty()
        self._leader = leader
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=follower,
            stdout=follower,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(follower)

    def type(self, line: str) -> None:
        os.write(self._leader, line.encode() + b"\r")

    def until(self, pattern: str) -> str:
        """Everything that appears until `pattern` does; what comes after is kept for the next call."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self.screen)):
            if not select.select([self._leader], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{pattern!r} did not appear in {self.screen!r}")
            self.screen += os.read(self._leader, 4096).decode(errors="replace").replace("\r", "")
        seen, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal("minisgl.shell", "--device", "cpu")
    yield opened
    opened.close()


def test_a_conversation(terminal: Terminal) -> None:
    terminal.until("you> ")
    terminal.type("What is a radix cache?")
    answer = " ".join(terminal.until("you> ").split())
    assert "A radix cache keeps the KV pages of earlier requests" in answer
    assert "evicted when memory is short." in answer
    terminal.type("/reset")
    terminal.until("a new conversation")
    terminal.type("/nonsense")
    terminal.until("/exit")
    terminal.type("/exit")
    assert terminal.process.wait(PATIENCE_S) == 0


def test_ctrl_c_stops_the_answer_but_not_the_shell(terminal: Terminal) -> None:
    terminal.until("you> ")
    stopped = False
    while not stopped:  # a busy machine may let an answer end before the signal is sent: ask again then
        terminal.type("/reset")
        terminal.until("a new conversation")
        terminal.type("What is a radix cache?")
        terminal.until("A radix")
        terminal.process.send_signal(signal.SIGINT)
        seen = terminal.until(r"\(stopped\)|when memory is short\.")
        stopped = seen.endswith("(stopped)")
        terminal.until("you> ")
    terminal.type("What is a radix cache?")
    assert "keyed by token ids" in terminal.until(r"when memory is short\.")
    terminal.until("you> ")
    terminal.type("/exit")
    assert terminal.process.wait(PATIENCE_S) == 0


def test_launch_has_a_shell_too() -> None:
    terminal = Terminal("minisgl.launch", "--shell", "--device", "cpu")
    try:
        terminal.until("you> ")
        terminal.type("/exit")
        assert terminal.process.wait(PATIENCE_S) == 0
    finally:
        terminal.close()


def test_a_model_that_is_not_there() -> None:
    command = [sys.executable, "-m", "minisgl.shell", "./nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: there is no folder ./nowhere")
