"""A small HTTP/1.1 client for streams: 3 to 4.5 µs of its CPU a token (`--self-test`, two shared cores).

One connection carries one request. httptools (which uvicorn brings) reads HTTP, msgspec reads the events into
structs, and both work in the callback that brings the bytes: no task wakes up for a token, only at the end.
"""

import asyncio
import os
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec
from msgspec import Struct

MAX_LINE = 1 << 20  # bytes of one event; more without a line break is not a stream of events
MAX_MESSAGE = 300  # characters of a server's complaint that are kept


class RequestFailed(Exception):
    """A request without a usable answer; the text is the reason that the report counts."""


class PromptDetails(Struct):
    cached_tokens: int | None = None


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class _Choice(Struct):
    text: str | None = None


class _Event(Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


@dataclass
class Answer:
    """What has come of a stream so far. Times are of `time.perf_counter`, in seconds."""

    chunk_times: "array[float]" = field(default_factory=lambda: array("d"))  # when each text chunk was read
    texts: list[str] = field(default_factory=list)
    usage: Usage | None = None


@dataclass(frozen=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    path: str  # of the base URL, without a slash at its end
    tls: bool

    @classmethod
    def from_url(cls, url: str) -> "Server":
        """The server of a base URL such as http://127.0.0.1:1919/v1.

        Raises:
            ValueError: it is no http or https URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url must look like http://127.0.0.1:1919/v1, but {url!r} was given")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/"), tls)

    async def stream(self, path: str, body: bytes, answer: Answer, timeout_s: float) -> None:
        """POST a body and read the streamed answer into `answer`, until it is complete.

        Raises:
            RequestFailed: no complete answer came; `answer` holds what came before.
        """
        await self._exchange(_Exchange(self._request("POST", path, body), answer), timeout_s)

    async def get(self, path: str, timeout_s: float) -> bytes:
        """The body of a GET request.

        Raises:
            RequestFailed: no complete answer came, or not with status 200.
        """
        exchange = _Exchange(self._request("GET", path, b""), None)
        await self._exchange(exchange, timeout_s)
        return exchange.body

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if key := os.environ.get("OPENAI_API_KEY"):
            lines.append(f"Authorization: Bearer {key}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def _exchange(self, exchange: "_Exchange", timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda: exchange, self.host, self.port, ssl=self.tls or None)
                await exchange.done
        except TimeoutError:
            raise RequestFailed(f"no complete answer within {timeout_s:g} s") from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RequestFailed(f"connection failed: {reason}") from None
        finally:
            exchange.close()


class _Exchange(asyncio.Protocol):
    """One request and its response. With an `answer`, status 200 brings a stream of events."""

    def __init__(self, request: bytes, answer: Answer | None) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.body = b""
        self._request = request
        self._answer = answer
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._take: Callable[[bytes], None] = self._take_body
        self._status = 0
        self._rest = b""  # the line that has begun
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are, but not by inheritance
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is not HTTP: {error}")
        except httptools.HttpParserUpgrade:
            self._fail("the answer is not HTTP/1.1")

    def connection_lost(self, error: Exception | None) -> None:
        if self._status == 0:
            self._fail("the server closed the connection before it answered")
        elif self._answer is None or self._status != 200:
            self.on_message_complete()  # a body without a length ends here
        else:
            self._fail("the stream was cut before its end")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._answer is not None and self._status == 200:
            self._take = self._take_events

    def on_body(self, data: bytes) -> None:
        if not self.done.done():
            self._take(data)

    def on_message_complete(self) -> None:
        if self._status != 200:
            self._fail(f"HTTP {self._status}: {_message(self.body)}")
        elif self._answer is not None:  # [DONE] has not been seen, or this would change nothing
            self._fail("the stream ended without [DONE]")
        else:
            self._succeed()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self.done.cancel()

    def _take_body(self, data: bytes) -> None:
        self.body += data
        if len(self.body) > MAX_LINE:
            self._fail(f"HTTP {self._status}: {_message(self.body)}")

    def _take_events(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take_event(line[5:].strip())
        if len(self._rest) > MAX_LINE:
            self._fail("the stream holds no events")

    def _take_event(self, content: bytes) -> None:
        assert self._answer is not None
        if content == b"[DONE]":
            self._succeed()
            return
        try:
            event = _decode_event(content)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._fail(f"malformed event: {error}")
            return
        if event.error is not None:
            self._fail(f"error in the stream: {_message(content)}")
        if event.choices:
            self._answer.chunk_times.append(self._now)
            self._answer.texts.append(event.choices[0].text or "")
        if event.usage is not None:
            self._answer.usage = event.usage

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(RequestFailed(reason))

    def _succeed(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


def _message(body: bytes) -> str:
    """The readable part of an error's body, of OpenAI's shape or any other, in one line."""
    try:
        found = msgspec.json.decode(body)
    except ValueError:  # no JSON, or no UTF-8
        found = body.decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return " ".join(str(found).split())[:MAX_MESSAGE] or "no message"
