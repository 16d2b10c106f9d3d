"""Errors, as OpenAI writes them."""

import logging
from typing import Any

from minisgl.server.engine_client import EngineDied
from stages.interface import RequestRefused

logger = logging.getLogger(__name__)


_LONGEST = 2000  # characters of a sentence: it may quote what the client sent


class RequestFailed(Exception):
    """The engine gave up this request, and no other."""

    def __init__(self) -> None:
        super().__init__(
            "this request has no next token: the model's logits for it were NaN or infinite, "
            "or its bad_words left none"
        )


class ApiError(Exception):
    """What the client is told: an HTTP status, a sentence, the field at fault, a code for programs."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def context_overflow(context_length: int, what: str, param: str) -> ApiError:
    """It begins as OpenAI's does: litellm and LangChain recognise it by its words."""
    return ApiError(
        f"Input tokens exceed the configured limit of {context_length} tokens. {what}",
        param=param,
        code="context_length_exceeded",
    )


def too_large(what: str) -> ApiError:
    return ApiError(f"the request is too large: {what}", status=413, code="request_too_large")


def as_api_error(error: Exception) -> ApiError:
    """What to tell the client about any exception."""
    match error:
        case ApiError():
            return error
        case RequestRefused():
            return ApiError(str(error), param=error.param)
        case RequestFailed():
            return ApiError(str(error), status=500, code="invalid_logits")
        case EngineDied():
            return ApiError(str(error), status=503, code="engine_unavailable")
        case _:
            logger.error("unexpected error in a request", exc_info=error)
            return ApiError("the server failed unexpectedly; its log says how", status=500)
