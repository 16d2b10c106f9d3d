"""From the body of an API call to requests of the engine: the checks, and the tokenizing.

What is here takes as long as its input is large: it runs in a thread, beside the event loop.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from uuid import uuid4

from msgspec import Raw

from minisgl.requests import make_request, sampling_params
from minisgl.server.bodies import (
    MAX_REQUESTS,
    Body,
    ChatBody,
    CompletionBody,
    longest_text,
    messages_of,
    prompts_of,
)
from minisgl.server.errors import ApiError, context_overflow
from minisgl.server.text import TextOptions
from stages.interface import Request, SamplingParams
from stages.stage1_naive.tokenizer import Message, Tokenizer

MAX_CHOICES = 128  # of a prompt
MAX_STOPS = 64
MAX_PROMPT_SCORES = 2**19  # log-probabilities of prompts' tokens in one call
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat goes on until it ends
# A template is a program: only the model's own may run here. The others are what the server itself gives.
_FIXED_KWARGS = {
    "chat_template", "conversation", "messages", "tokenize", "self",
    "add_generation_prompt", "continue_final_message",
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """The model that answers."""

    name: str
    tokenizer: Tokenizer
    context_length: int  # tokens
    defaults: Mapping[str, float]  # of `SamplingParams`, where a request leaves them out

    def check_length(self, characters: int, param: str) -> None:
        """Refuse a text that can have no room, whatever its tokens are, before it is tokenized for long."""
        if characters > self.context_length * self.tokenizer.longest_token:
            raise context_overflow(self.context_length, f"A text has {characters} characters or more.", param)


@dataclass(frozen=True)
class Call:
    """One API call in the engine's terms: choice i of the answer comes from `requests[i]`."""

    id: str
    created: int  # seconds since 1970
    body: Body
    requests: Sequence[Request]
    text: TextOptions
    prompt_tokens: int  # of all prompts together
    names: Mapping[str, str]  # the body's names of the engine's fields where they differ, for errors
    echo: bool = False  # the prompt stands before the answer
    no_output: bool = False  # nothing stands behind it; the engine is asked for one token all the same


def chat_call(body: ChatBody, served: Served) -> Call:
    """Check a chat and tokenize it.

    Raises:
        ApiError: it cannot be served as it is.
    """
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    names = {"prompt": "messages", "bad_words_ids": "bad_words", "logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    params = _sampling_params(body, served, names, logprobs=logprobs, max_tokens=max_tokens)
    text = _rendered(body, served)
    prompt = served.tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
    prompt, _ = _fitted(prompt, body, params, served, "messages")
    return _call("chatcmpl", body, served, [(prompt, params)], names)


def completion_call(body: CompletionBody, served: Served) -> Call:
    """Check a completion and tokenize its prompts.

    Raises:
        ApiError: it cannot be served as it is.
    """
    no_output = bool(body.echo) and body.max_tokens == 0
    max_tokens = 1 if no_output else body.max_tokens
    prompt_logprobs = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    names = {"bad_words_ids": "bad_words"}
    if prompt_logprobs is not body.prompt_logprobs:
        names["prompt_logprobs"] = "logprobs"
    params = _sampling_params(
        body, served, names, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs, max_tokens=max_tokens
    )
    prompts = []
    default, special = max(COMPLETION_TOKENS, params.min_tokens), body.add_special_tokens is not False
    served.check_length(longest_text(body.prompt), "prompt")
    for prompt in prompts_of(body, served.context_length):
        try:
            ids = _encode(prompt, served, special) if isinstance(prompt, str) else prompt
        except ValueError as error:
            raise ApiError(str(error), param="prompt") from error
        ids, room = _fitted(ids, body, params, served, "prompt")
        prompts.append((ids, replace(params, max_tokens=params.max_tokens or min(default, room))))
    call = _call("cmpl", body, served, prompts, names)
    return replace(call, echo=bool(body.echo), no_output=no_output)


def _call(
    kind: str,
    body: Body,
    served: Served,
    prompts: Sequence[tuple[Sequence[int], SamplingParams]],
    names: Mapping[str, str],
) -> Call:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_CHOICES:
        raise ApiError(f"n must be from 1 to {MAX_CHOICES}, but {n} was given", param="n")
    if len(prompts) * n > MAX_REQUESTS:
        raise ApiError(
            f"a call may ask for {MAX_REQUESTS} choices, but {len(prompts)} prompts with {n} each are more",
            param="prompt",
        )
    scored = prompts[0][1].prompt_logprobs
    if scored is not None and n * sum(len(p) for p, _ in prompts) * (scored + 1) > MAX_PROMPT_SCORES:
        name = names.get("prompt_logprobs", "prompt_logprobs")
        raise ApiError(
            f"{name}: a call may ask for {MAX_PROMPT_SCORES} log-probabilities of prompts' tokens, "
            "its choices and their alternatives together",
            param=name,
        )
    setattr(body, body.large, Raw(b"null"))  # it may have megabytes, and is not needed any more
    call_id = f"{kind}-{uuid4().hex}"
    requests = [
        make_request(f"{call_id}-{number}-{choice}", prompt, params, served.tokenizer, choice)
        for number, (prompt, params) in enumerate(prompts)
        for choice in range(n)
    ]
    prompt_tokens = sum(len(prompt) for prompt, _ in prompts)
    return Call(call_id, int(time.time()), body, requests, _text_options(body), prompt_tokens, names)


def _text_options(body: Body) -> TextOptions:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > MAX_STOPS or "" in stop:
        raise ApiError(f"stop must be a text or at most {MAX_STOPS}, none of them empty", param="stop")
    return TextOptions(
        stop=stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _sampling_params(
    body: Body, served: Served, names: Mapping[str, str], **changed: int | None
) -> SamplingParams:
    """A field of one name means the same in the body and in the engine, but for those set here. `names` are
    the body's where they differ, for errors."""
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options needs stream to be true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError("prompt_logprobs needs stream to be false", param="prompt_logprobs")
    values: dict[str, Any] = {one.name: getattr(body, one.name, None) for one in fields(SamplingParams)}
    values |= changed | {"top_k": 0 if body.top_k == -1 else body.top_k}
    if body.allowed_token_ids:
        values["allowed_token_ids"] = sorted(set(body.allowed_token_ids))
    if body.bad_words:
        values["bad_words_ids"] = served.tokenizer.bad_words_ids(body.bad_words)
    try:
        return sampling_params(served.defaults, values)
    except ValueError as error:  # it begins with the field's name
        name, _, what = str(error).partition(" ")
        name = names.get(name, name)
        raise ApiError(f"{name} {what}", param=name) from error


def _rendered(body: ChatBody, served: Served) -> str:
    """The text that the model's template makes of a chat."""
    kwargs = body.chat_template_kwargs or {}
    if fixed := _FIXED_KWARGS & kwargs.keys():
        raise ApiError(
            f"chat_template_kwargs: {', '.join(sorted(fixed))} cannot be set", param="chat_template_kwargs"
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError(
            "continue_final_message and add_generation_prompt cannot both be true",
            param="continue_final_message",
        )
    served.check_length(longest_text(body.messages), "messages")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(messages_of(body))]
    if not messages:
        raise ApiError("messages must hold at least one message", param="messages")
    served.check_length(sum(len(message["content"]) for message in messages), "messages")
    begin = body.add_generation_prompt
    try:
        text = served.tokenizer.render(
            messages,
            add_generation_prompt=not body.continue_final_message if begin is None else begin,
            continue_final_message=bool(body.continue_final_message),
            **kwargs,
        )
    except (ValueError, TypeError) as error:
        raise ApiError(str(error), param="messages") from error
    served.check_length(len(text), "messages")
    return text


def _encode(text: str, served: Served, add_special_tokens: bool) -> list[int]:
    served.check_length(len(text), "prompt")
    return served.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _fitted(
    prompt: list[int], body: Body, params: SamplingParams, served: Served, param: str
) -> tuple[list[int], int]:
    """The prompt, cut at its beginning if that was asked for, and how many tokens may follow it. What else
    an engine may refuse it says itself."""
    limit = served.context_length
    keep = body.truncate_prompt_tokens
    if keep == 0:
        raise ApiError("truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens")
    if keep == -1:
        keep = max(1, limit - (params.max_tokens or COMPLETION_TOKENS))
    if keep is not None:
        prompt = prompt[-keep:]
    if not prompt:
        raise ApiError(f"{param}: the prompt has no tokens; at least one is needed", param=param)
    room = limit - len(prompt)
    if room < (params.max_tokens or 1):
        wanted = f", and {params.max_tokens} more were asked for" if params.max_tokens else ""
        raise context_overflow(
            limit, f"They hold prompt and answer together, but the prompt has {len(prompt)}{wanted}.", param
        )
    return prompt, room


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
