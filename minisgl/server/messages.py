"""What the API process and the engine process say to each other, as MessagePack over ZeroMQ."""

from collections.abc import Callable

import msgspec
from msgspec import Struct

from stages.interface import Request, Statistics, TokenOutput


class Add(Struct, tag=True):
    """To the engine: serve this request."""

    request: Request


class Abort(Struct, tag=True):
    """To the engine: nobody waits for this request any more."""

    request_id: str


class Ready(Struct, tag=True):
    """From the engine: the model is loaded. `context_length` is in tokens."""

    context_length: int


class Outputs(Struct, tag=True):
    """From the engine: the tokens of one step, of all requests, and how the engine stands after it."""

    tokens: list[TokenOutput]
    statistics: Statistics


class Refused(Struct, tag=True):
    """From the engine: this request can never be served."""

    request_id: str
    reason: str
    param: str | None  # the field of the request at fault


class Alive(Struct, tag=True):
    """From the engine, every second: its process runs."""


class Died(Struct, tag=True):
    """From the engine, its last words."""

    reason: str


ToEngine = Add | Abort
FromEngine = Ready | Outputs | Refused | Alive | Died

encode = msgspec.msgpack.encode
decode_to_engine: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode
