"""The bodies that clients send, field by field, and the reading of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Struct

from minisgl.server.errors import ApiError

# OpenAI's fields that this server does not have, with the values that ask for nothing. Any other value
# would need another answer than the one given, so it is an error. Further unknown fields are ignored.
UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}


TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # the engine knows the vocabulary; this keeps 64 bits
Prompt = str | list[str | TokenId | list[TokenId]]


class StreamOptions(Struct):
    include_usage: bool = False


class Body(Struct, kw_only=True):
    """The fields of both endpoints. A null is the same as a field that was not sent."""

    model: str
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 and -1: off
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(Body, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Body, kw_only=True):
    prompt: Prompt
    logprobs: int | None = None


BodyT = TypeVar("BodyT", bound=Body)


def parse(raw: bytes, body_type: type[BodyT]) -> BodyT:
    """The body of a request.

    Raises:
        ApiError: it is not JSON, or a field is missing, of the wrong type, or not supported.
    """
    try:
        content = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from error
    try:
        body = msgspec.convert(content, body_type, str_keys=True)  # as JSON's keys, token ids are strings
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from error
    for name, harmless in UNSUPPORTED.items():
        value = content.get(name)
        if value is not None and value not in harmless:
            raise ApiError(
                f"{name} is not supported by this server", param=name, code="unsupported_parameter"
            )
    return body


def _field_error(text: str) -> ApiError:
    """msgspec writes "Expected `int`, got `str` - at `$.stop[0]`" or "... missing required field `model`"."""
    where = re.search(r" - at (?:`key` in )?`\$\.?(.*)`$|required field `(\w+)`$", text)
    param = (where[1] or where[2] or None) if where else None
    what = text.partition(" - at ")[0]
    return ApiError(f"{param or 'the body'}: {what}", param=param)
