"""uvicorn's protocol of a connection, with two things that it lacks."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD = 2**16  # bytes of a request's line and headers


class HttpProtocol(HttpToolsProtocol):
    """httptools' parser, which is quick; but clients that speak HTTP/1.0 get the other one, whose streams are
    not chunked, and a request whose head has no end is refused."""

    _head: int | None = 0  # bytes of the head that is being read; None: a body is
    _is_new = True

    def data_received(self, data: bytes) -> None:
        if self._is_new and b" HTTP/1.0\r\n" in data[:_MAX_HEAD].partition(b"\n")[0] + b"\n":
            self._hand_over(data)
            return
        self._is_new = False
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > _MAX_HEAD and not self.transport.is_closing():
                self.send_400_response(f"A request's head has over {_MAX_HEAD} bytes.")

    def on_message_begin(self) -> None:
        self._head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()

    def _hand_over(self, data: bytes) -> None:
        self.connections.discard(self)
        other = H11Protocol(self.config, self.server_state, self.app_state, asyncio.get_running_loop())
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        other.data_received(data)
