"""A server for the benchmark's client: it answers as it is told to, well or badly."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.server.running import PATIENCE_S

USAGE = {"prompt_tokens": 3, "total_tokens": 0}


class DummyServer:
    """Answers in the way that `mode` names; counts the requests in flight."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.url = ""
        self.in_flight = self.most_in_flight = 0
        self.bodies: list[dict[str, Any]] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.partition("Content-Length: ")[2].split()[0])
            self.bodies.append(json.loads(await reader.readexactly(length) or "{}"))
            await getattr(self, f"_{self.mode}")(reader, writer, self.bodies[-1].get("max_tokens", 0))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.in_flight -= 1
            writer.close()

    async def _well(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        """Two tokens in each event, which comes 10 ms after the one before."""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for _i in range(0, tokens, 2):
            await asyncio.sleep(0.01)
            writer.write(event({"choices": [{"text": "ab"}]}))
        writer.write(event({"choices": [], "usage": USAGE | {"completion_tokens": tokens}}))
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()

    async def _status(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        body = json.dumps({"error": {"message": "out of order"}}).encode()
        writer.write(b"HTTP/1.1 500 Oh\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async def _latin(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        """JSON but not UTF-8, and no length: the end of the connection ends it."""
        writer.write(b'HTTP/1.1 500 Oh\r\n\r\n{"error": "d\xe9sol\xe9"}')

    async def _cut(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        content = event({"choices": [{"text": "ab"}]})
        writer.write(b"%x\r\n%b\r\n" % (len(content), content))

    async def _silent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        await reader.read()

    async def _hangup(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        pass

    async def _garbage(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        writer.write(b"\x00\x01 how do you do\r\n\r\n")

    async def _malformed(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: {{{\n\n")

    async def _complaint(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + event({"error": {"message": "engine died"}}))


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


@contextmanager
def dummy(mode: str) -> Iterator[DummyServer]:
    """The server in a thread of its own."""
    server, ready, stop = DummyServer(mode), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await stop.wait()
        listening.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(PATIENCE_S)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        loop.close()
