"""A server that only pretends: it streams tokens as fast as it can, to find out how many a client takes.

`python -m minisgl.bench.dummy` prints its port and serves until it is killed. It is a process of its own, so
that it takes no time from the client's interpreter. Like an engine it sends a token to every stream at each
step, one event and one write each, in the shape that this project's server uses.
"""

import asyncio
from typing import cast

import httptools
import msgspec
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = {"id": f"cmpl-{'0' * 32}", "object": "text_completion", "created": 1_750_000_000, "model": "dummy"}
_CHOICE = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}


class _Stream(asyncio.Protocol):
    """One request, whatever it asks for, and the tokens that are still to come."""

    def __init__(self, streams: "set[_Stream]") -> None:
        self._streams = streams
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._writable = True
        self._total = self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are, but not by inheritance

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self._total = self._left = msgspec.json.decode(self._body)["max_tokens"]
        self._transport.write(_HEAD)
        self._streams.add(self)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True

    def connection_lost(self, error: Exception | None) -> None:
        self._streams.discard(self)

    def step(self) -> None:
        if not self._writable:
            return
        if self._left:
            self._left -= 1
            self._transport.write(_TOKEN)
            return
        usage = {"prompt_tokens": 1, "completion_tokens": self._total, "total_tokens": self._total + 1}
        end = _event(_EVENT | {"choices": [], "usage": usage}) + _chunk(b"data: [DONE]\n\n") + _chunk(b"")
        self._transport.write(end)
        self._transport.close()
        self._streams.discard(self)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(content: object) -> bytes:
    return _chunk(b"data: " + msgspec.json.encode(content) + b"\n\n")


_TOKEN = _event(_EVENT | {"choices": [_CHOICE], "usage": None})


async def serve() -> None:
    """Serve on a free port, and print it."""
    streams: set[_Stream] = set()
    server = await asyncio.get_running_loop().create_server(lambda: _Stream(streams), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    while True:
        for stream in list(streams):
            stream.step()
        await asyncio.sleep(0 if streams else 0.001)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
