"""Errors, as OpenAI writes them."""

import logging
from typing import Any

from minisgl.server.engine_client import EngineDied
from stages.interface import RequestRefused

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """What the client is told: an HTTP status, a sentence, the field at fault, a code for programs."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """What to tell the client about any exception."""
    match error:
        case ApiError():
            return error
        case RequestRefused():
            return ApiError(str(error))
        case EngineDied():
            return ApiError(str(error), status=503, code="engine_unavailable")
        case _:
            logger.error("unexpected error in a request", exc_info=error)
            return ApiError("the server failed unexpectedly; its log says how", status=500)
