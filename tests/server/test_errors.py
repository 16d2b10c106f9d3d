"""Everything a client can do wrong, and what it is told."""

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.server.running import RunningServer

CHAT: dict[str, Any] = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "tiny", "max_tokens": 2, "prompt": "hi"}


def post(server: RunningServer, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    """Status, and the error of the answer, whose form is checked."""
    status, answer = server.request("POST", f"/v1/{path}", body)
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return status, error


def image() -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (image(), "messages[0].content[0]"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [320]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": "bad"}, "bad_words"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"stop_token_ids": [320]}, "stop_token_ids"),
        ({"stop_token_ids": [4.5]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [7] * 1025}, "stop_token_ids"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_chat_refuses(server: RunningServer, change: dict[str, Any], param: str | None, stream: bool) -> None:
    status, error = post(server, "chat/completions", {**CHAT, "stream": stream, **change})
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    named = (param or next(iter(change))).partition("[")[0].partition(".")[0]
    assert named in error["message"], "the sentence names the field"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": [0.5]}, "prompt[0]"),
        ({"prompt": {}}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
        ({"prompt": [[5]] * 17, "n": 128}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
    ids=str,
)
def test_completions_refuse(server: RunningServer, change: dict[str, Any], param: str | None) -> None:
    status, error = post(server, "completions", {**TEXT, **change})
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": }',
        b"\xff",
        b'{"model": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b"[" * 9999,
    ],
)
def test_bad_json(server: RunningServer, body: bytes) -> None:
    status, error = post(server, "completions", body)
    assert status == 400
    assert "JSON" in error["message"]


@pytest.mark.parametrize("body", [[], 3, "x", None])
def test_json_that_is_no_object(server: RunningServer, body: Any) -> None:
    assert post(server, "completions", body)[0] == 400


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_a_missing_field_is_named(server: RunningServer, field: str) -> None:
    status, error = post(server, "completions", {k: v for k, v in TEXT.items() if k != field})
    assert (status, error["param"]) == (400, field)


@pytest.mark.parametrize("name", ["gpt-4", "default", "", "Tiny"])
def test_unknown_model(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=name, messages=CHAT["messages"])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("length", "max_tokens"), [(512, None), (600, None), (512, 1), (500, 13), (1, 512)], ids=str
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_too_long(client: OpenAI, length: int, max_tokens: int | None, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * length, max_tokens=max_tokens, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert str(length) in caught.value.message
    assert caught.value.body["message"].startswith("Input tokens exceed the configured limit of 512 tokens")  # type: ignore[index]


def test_the_context_can_be_filled_to_the_last_token(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=[5] * 510, max_tokens=2, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512


def test_unknown_route_and_wrong_method(server: RunningServer) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
    ):
        answered, answer = server.request(method, path)
        assert answered == status
        assert path in answer["error"]["message"]
    connection = server.connect()
    connection.request("DELETE", "/health")
    assert set(connection.getresponse().headers["Allow"].split(", ")) == {"GET", "HEAD"}
    connection.close()


def test_health(server: RunningServer) -> None:
    assert server.request("GET", "/health") == (200, {"status": "ok"})
