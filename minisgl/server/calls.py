"""From the body of an API call to requests of the engine: the checks, and the tokenizing."""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from uuid import uuid4

from minisgl.server.bodies import Body, ChatBody, CompletionBody, Prompt
from minisgl.server.errors import ApiError
from stages.interface import Request, SamplingParams
from stages.stage1_naive.tokenizer import Message, Tokenizer

MAX_CHOICES = 128  # of a prompt
MAX_REQUESTS = 2048  # choices of all prompts together: one call must not fill the engine's queue
MAX_STOPS = 4
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat goes on until it ends
# A template is a program: only the model's own may run here. The others are what the server itself gives.
_FIXED_KWARGS = {"chat_template", "conversation", "messages", "tokenize", "add_generation_prompt", "self"}


@dataclass(frozen=True)
class Call:
    """One API call in the engine's terms: choice i of the answer comes from `requests[i]`."""

    id: str
    created: int  # seconds since 1970
    body: Body
    requests: Sequence[Request]
    stop: Sequence[str]
    prompt_tokens: int  # of all prompts together


async def chat_call(body: ChatBody, tokenizer: Tokenizer, context_length: int) -> Call:
    """Check a chat and tokenize it.

    Raises:
        ApiError: it cannot be served as it is.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    names = {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    params = _sampling_params(body, logprobs, max_tokens, names)
    kwargs = body.chat_template_kwargs or {}
    if fixed := _FIXED_KWARGS & kwargs.keys():
        raise ApiError(
            f"chat_template_kwargs: {', '.join(sorted(fixed))} cannot be set", param="chat_template_kwargs"
        )
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    if not messages:
        raise ApiError("messages must hold at least one message", param="messages")
    try:  # in a thread: a long prompt must not stall the answers of others
        prompt = await asyncio.to_thread(tokenizer.chat, messages, **kwargs)
    except (ValueError, TypeError) as error:
        raise ApiError(str(error), param="messages") from error
    _room(prompt, params, context_length, "messages")
    return _call("chatcmpl", body, [(prompt, params)])


async def completion_call(body: CompletionBody, tokenizer: Tokenizer, context_length: int) -> Call:
    """Check a completion and tokenize its prompts.

    Raises:
        ApiError: it cannot be served as it is.
    """
    params = _sampling_params(body, body.logprobs, body.max_tokens, {})
    prompts = []
    try:
        if any(isinstance(item, str) for item in body.prompt):  # a thread, as above; not worth one for ids
            tokenized = await asyncio.to_thread(_tokenize, body.prompt, tokenizer)
        else:
            tokenized = _tokenize(body.prompt, tokenizer)
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from error
    for prompt in tokenized:
        room = _room(prompt, params, context_length, "prompt")
        max_tokens = params.max_tokens or min(COMPLETION_TOKENS, room)
        prompts.append((prompt, replace(params, max_tokens=max_tokens)))
    return _call("cmpl", body, prompts)


def _call(kind: str, body: Body, prompts: Sequence[tuple[list[int], SamplingParams]]) -> Call:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_CHOICES:
        raise ApiError(f"n must be from 1 to {MAX_CHOICES}, but {n} was given", param="n")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > MAX_STOPS or "" in stop:
        raise ApiError(f"stop must be a text or at most {MAX_STOPS}, none of them empty", param="stop")
    if len(prompts) * n > MAX_REQUESTS:
        raise ApiError(
            f"a call may ask for {MAX_REQUESTS} choices, but {len(prompts)} prompts with {n} each are more",
            param="prompt",
        )
    call_id = f"{kind}-{uuid4().hex}"
    requests = [
        Request(f"{call_id}-{number}-{choice}", prompt, params, _seed(params.seed, choice))
        for number, (prompt, params) in enumerate(prompts)
        for choice in range(n)
    ]
    prompt_tokens = sum(len(prompt) for prompt, _ in prompts)
    return Call(call_id, int(time.time()), body, requests, stop, prompt_tokens)


def _seed(seed: int | None, choice: int) -> int:
    """Another for each choice, in 64 bits with a sign; the first choice is the one that n=1 gives."""
    return secrets.randbits(63) if seed is None else (seed + choice + 2**63) % 2**64 - 2**63


def _sampling_params(
    body: Body, logprobs: int | None, max_tokens: int | None, names: Mapping[str, str]
) -> SamplingParams:
    """A field of one name means the same in the body and in the engine, but for the three named here. `names`
    are the body's where they differ, for errors."""
    values = {field.name: getattr(body, field.name) for field in fields(SamplingParams)}
    values |= {"logprobs": logprobs, "max_tokens": max_tokens, "top_k": 0 if body.top_k == -1 else body.top_k}
    try:
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})
    except ValueError as error:  # it begins with the field's name
        name, _, what = str(error).partition(" ")
        name = names.get(name, name)
        raise ApiError(f"{name} {what}", param=name) from error


def _room(prompt: Sequence[int], params: SamplingParams, context_length: int, param: str) -> int:
    """How many tokens may follow `prompt`. What else an engine may refuse it says itself."""
    if not prompt:
        raise ApiError(f"{param}: the prompt has no tokens; at least one is needed", param=param)
    room = context_length - len(prompt)
    if room < (params.max_tokens or 1):
        wanted = f" and {params.max_tokens} more were asked for" if params.max_tokens else ""
        raise ApiError(
            f"the model's context holds {context_length} tokens, prompt and answer together, "
            f"but the prompt has {len(prompt)}{wanted}",
            param=param,
            code="context_length_exceeded",
        )
    return room


def _tokenize(prompt: Prompt, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each prompt."""
    ids: list[int] = []
    prompts: list[list[int]] = []
    for item in [prompt] if isinstance(prompt, str) else prompt:
        if isinstance(item, int):
            ids.append(item)
        else:
            prompts.append(tokenizer.encode(item) if isinstance(item, str) else item)
    if bool(ids) == bool(prompts):  # both or neither
        raise ApiError("prompt must be a text, a list of token ids, or a list of these", param="prompt")
    return prompts or [ids]


def _message(message: dict[str, Any], param: str) -> Message:
    """With one text as its content. What else is in a message goes to the chat template as it is."""
    if not isinstance(message.get("role"), str):
        raise ApiError(f"{param} needs a role, for example 'user'", param=f"{param}.role")
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        content = ""
    elif isinstance(content, list):
        content = "\n".join(_part(part, f"{param}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ApiError(f"{param} needs content: a text, or a list of text parts", param=f"{param}.content")
    return {**message, "content": content}


def _part(part: Any, param: str) -> str:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind != "text" or not isinstance(text, str):
        raise ApiError(f'{param} is not supported; parts are {{"type": "text", "text": "..."}}', param=param)
    return text
