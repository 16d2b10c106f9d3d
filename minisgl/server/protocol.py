"""uvicorn's protocol of a connection, with three things that it lacks."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD = 2**16  # bytes of a request's line and headers
_CRUMB, _MAX_CRUMBS = 64, 8192  # bytes of a tiny chunk, and how many of them a body may have


class HttpProtocol(HttpToolsProtocol):
    """httptools' parser, which is quick; but clients that speak HTTP/1.0 get the other one, whose streams are
    not chunked. A request whose head has no end, or whose body comes in crumbs, is refused."""

    _head: int | None = 0  # bytes of the head that is being read; None: a body is
    _is_new = True
    _crumbs = 0  # tiny chunks of the body that is being read

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
        self._head = self._crumbs = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._crumbs += len(body) < _CRUMB
        if self._crumbs > _MAX_CRUMBS:  # each costs as much as a large one; the parser answers with 400
            raise ValueError("the body comes in too many chunks of a few bytes")
        super().on_body(body)

    def _hand_over(self, data: bytes) -> None:
        self.connections.discard(self)
        other = H11Protocol(self.config, self.server_state, self.app_state, asyncio.get_running_loop())
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        other.data_received(data)
