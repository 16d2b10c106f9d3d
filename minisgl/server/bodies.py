"""The bodies that clients send, field by field, and the reading of them.

msgspec holds the interpreter lock while it decodes, so a thread alone keeps no long decoding from the event
loop. What is large is therefore looked at before Python objects are made of it, and decoded in several calls:
each of those takes some tens of milliseconds for the worst 32 MB.
"""

import logging
import re
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from minisgl.server.errors import ApiError, context_overflow, too_large
from minisgl.server.fields import ADVICE, HARMLESS, NOTHING, UNSUPPORTED

logger = logging.getLogger(__name__)

MAX_REQUESTS = 2048  # choices of all prompts together: one call must not fill the engine's queue
MAX_MARKS = 4 * 2**20  # commas, brackets, quotes and backslashes of a body: each costs some 10 ns to skip
_MAX_VALUES = 50_000  # of any kind in messages or in prompts: each may be a dict, which costs 500 ns
_MAX_IDS = 2**20  # in one prompt
_MAX_OTHERS = 2**19  # bytes of all other fields
_PROMPT_FORMS = "prompt must be a text, a list of token ids, or a list of these"
_MAX_NAMES = 100  # of unknown fields in the log

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]  # the engine knows the vocabulary; this keeps 64 bits
Word = Annotated[str, Meta(min_length=1, max_length=1024)]
T = TypeVar("T")


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(Struct, kw_only=True):
    """The fields of both endpoints. A null is the same as a field that was not sent."""

    large: ClassVar[str]

    model: str
    n: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 and -1: off
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: Annotated[list[Word], Meta(max_length=1024)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None  # -1: to what the context has room for
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Usage in every chunk of a stream; as in vLLM, only if it is asked for at all."""
        options = self.stream_options
        return self.include_usage and options is not None and bool(options.continuous_usage_stats)


class ChatBody(Body, kw_only=True):
    large: ClassVar = "messages"  # the field that may be as large as a body may be

    messages: Raw  # see `messages_of`
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Body, kw_only=True):
    large: ClassVar = "prompt"

    prompt: Raw  # see `prompts_of`
    echo: bool | None = None
    logprobs: int | None = None


BodyT = TypeVar("BodyT", bound=Body)


class BodyReader:
    """Reads bodies, and names in the log what it does not know in them: each field once."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def read(self, raw: bytes | bytearray, body_type: type[BodyT]) -> BodyT:
        """The body of a request.

        Raises:
            ApiError: it is not JSON, or a field is missing, of the wrong type, or not supported.
        """
        if raw.startswith(b"\xef\xbb\xbf"):  # a byte order mark
            raw = raw[3:]
        large = body_type.large
        if len(raw) > _MAX_OTHERS:
            others = len(raw) - len(memoryview(getattr(_decode(raw, _Large), large)))
            if others > _MAX_OTHERS:
                raise too_large(f"the fields besides {large} have over {_MAX_OTHERS} bytes")
        content = {
            name: value if name == large else _whole(_decode(value, Any, name))
            for name, value in _decode(raw, dict[str, Raw]).items()
        }
        body = _convert(content, body_type)
        _refuse_unsupported(content, body_type)
        self._name_unknown(content.keys() - UNSUPPORTED.keys() - HARMLESS - _ALL_FIELDS)
        return body

    def _name_unknown(self, names: set[str]) -> None:
        for name in sorted(names - self._named)[: _MAX_NAMES - len(self._named)]:
            self._named.add(name)
            logger.warning("a request has the field %r, which is unknown and ignored", name[:60])


def messages_of(body: ChatBody) -> list[dict[str, Any]]:
    """The messages of a chat, as they came.

    Raises:
        ApiError: they are no list of objects, or hold too many values.
    """
    raw = bytes(memoryview(body.messages))
    _check_values(raw, "messages")
    messages: list[dict[str, Any]] = _typed(raw, list[dict[str, Any]], "messages")
    return messages


def prompts_of(body: CompletionBody, context_length: int) -> list[str | list[int]]:
    """The prompts of a completion, at most MAX_REQUESTS.

    Raises:
        ApiError: `prompt` is none of its four forms, or holds too many prompts or tokens.
    """
    raw = bytes(memoryview(body.prompt))
    if raw[:1] not in (b'"', b"["):  # not even decoded: a number may have millions of digits
        raise ApiError(_PROMPT_FORMS, param="prompt")
    if b'"' in raw or _values(raw) <= _MAX_VALUES:
        _check_values(raw, "prompt")
        prompt = _typed(raw, str | list[str | TokenId | list[TokenId]], "prompt")
        items = [prompt] if isinstance(prompt, str) else prompt
        ids = [item for item in items if isinstance(item, int)]
        prompts = [item for item in items if not isinstance(item, int)]
        if bool(ids) == bool(prompts):  # both or neither
            raise ApiError(_PROMPT_FORMS, param="prompt")
        prompts = prompts or [ids]
    else:
        prompts = _long_prompts(raw, context_length)
    if len(prompts) > MAX_REQUESTS:
        raise ApiError(f"prompt: a call may have {MAX_REQUESTS} prompts, not {len(prompts)}", param="prompt")
    return prompts


def longest_text(raw: Raw) -> int:
    """How many characters the longest text in this JSON has, at the least; 0 if there is none.

    That is found by counting: a character takes up to four bytes, or up to two escapes of six bytes each.
    """
    content = bytes(memoryview(raw))
    texts, escapes = content.count(b'"') // 2, content.count(b"\\")
    characters = max(0, len(content) - 6 * escapes) // 4 + escapes // 2
    return characters // texts if texts else 0


class _Large(Struct):
    messages: Raw = Raw(b"")
    prompt: Raw = Raw(b"")


def _long_prompts(raw: bytes, context_length: int) -> list[str | list[int]]:
    """One or many lists of very many token ids, decoded one after another."""
    param = "prompt"
    if raw.count(b"[") > 1:
        raw = raw.strip()[1:-1]  # `[1, 2], [3]`
    lists = raw.split(b"]", MAX_REQUESTS + 1)
    if len(lists) > MAX_REQUESTS + 1 or lists[-1].strip():
        raise ApiError(f"prompt may be up to {MAX_REQUESTS} lists of token ids, and no more", param=param)
    if max(piece.count(b",") for piece in lists) > _MAX_IDS:
        raise context_overflow(context_length, f"A prompt has over {_MAX_IDS} token ids.", param)
    return [_typed(piece.lstrip(b", \t\r\n") + b"]", list[TokenId], param) for piece in lists[:-1]]


def _check_values(raw: bytes, name: str) -> None:
    if (count := _values(raw)) > _MAX_VALUES:
        raise ApiError(f"{name} may hold {_MAX_VALUES} values, but has {count} or more", param=name)


def _values(raw: bytes) -> int:
    """How many values valid JSON may hold. Each follows a comma or begins a list or an object; those within
    texts are told apart only if it matters, and among far too many values only quotes are counted."""
    if (count := _openings(raw)) > _MAX_VALUES:
        unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
        count = unescaped.count(b'"') // 4  # a text and its key have as many
        if count <= _MAX_VALUES:
            count = _openings(b"".join(unescaped.split(b'"')[::2]))
    return count


def _openings(raw: bytes) -> int:
    return sum(map(raw.count, (b",", b"[", b"{"))) + 1


def _refuse_unsupported(content: dict[str, Any], body_type: type[Body]) -> None:
    elsewhere = _ALL_FIELDS - set(body_type.__struct_fields__)
    for name in content.keys() & (UNSUPPORTED.keys() | elsewhere):
        value = content[name]
        if value is not None and value not in UNSUPPORTED.get(name, NOTHING):
            advice = ADVICE.get(name, "it is a field of the other endpoint" if name in elsewhere else "")
            raise ApiError(
                f"{name} is not supported by this server{advice and ': ' + advice}",
                param=name,
                code="unsupported_parameter",
            )


def _whole(value: Any) -> Any:
    """With 4.0 as 4, also in a list: there is one kind of number in JSON."""
    if isinstance(value, list):
        return [int(one) if isinstance(one, float) and one.is_integer() else one for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _typed(raw: bytes, kind: Any, param: str) -> Any:
    try:
        return _decode(raw, kind, param)
    except ApiError as error:
        if "got `float`" not in str(error):
            raise
    value = _decode(raw, Any)
    return _convert(_whole([*map(_whole, value)] if isinstance(value, list) else value), kind, param)


def _decode(raw: bytes | bytearray | Raw, kind: type[T], param: str = "") -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from error


def _convert(value: Any, kind: type[T], param: str = "") -> T:
    try:
        return msgspec.convert(value, kind, str_keys=True)  # as JSON's keys, token ids are strings
    except msgspec.ValidationError as error:
        raise _field_error(str(error), param) from error


def _field_error(text: str, within: str = "") -> ApiError:
    """msgspec writes "Expected `int`, got `str` - at `$.stop[0]`" or "... missing required field `model`"."""
    where = re.search(r" - at (?:`key` in )?`\$\.?(.*)`$|required field `(\w+)`$", text)
    param = within + ((where[1] or where[2] or "") if where else "") or None
    what = text.partition(" - at ")[0]
    return ApiError(f"{param or 'the JSON body'}: {what}", param=param)


_ALL_FIELDS = frozenset((*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__))
