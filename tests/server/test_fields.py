"""Every field of a request is heeded, or refused by its name, or known to ask for nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.server.bodies import (
    Body,
    BodyReader,
    ChatBody,
    CompletionBody,
    _openings,
    _values,
    longest_text,
    messages_of,
    prompts_of,
)  # fmt: skip
from minisgl.server.errors import ApiError
from minisgl.server.fields import HARMLESS, UNSUPPORTED
from tests.checkpoints import EOS
from tests.server.running import RunningServer, launch

A = ord("a") - ord("!")  # the token of "a": the tiny vocabulary begins with the visible ASCII from "!"
GREEDY = {"model": "tiny", "temperature": 0, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": []}
TEXT = {"model": "tiny", "prompt": "a"}


def read(body: Any, kind: type[Body] = CompletionBody) -> Any:
    return BodyReader().read(json.dumps(body).encode(), kind)


@pytest.mark.parametrize(("body", "kind"), [(CHAT, ChatBody), (TEXT, CompletionBody)], ids=["chat", "text"])
def test_unsupported_fields(body: dict[str, Any], kind: type[Body]) -> None:
    for name, nothing in UNSUPPORTED.items():
        for value in (None, *nothing):
            read({**body, name: value}, kind)
        with pytest.raises(ApiError, match=name) as caught:
            read({**body, name: "something"}, kind)
        error = caught.value
        assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    read({**body, **dict.fromkeys(HARMLESS, "x")}, kind)


@pytest.mark.parametrize(
    "field",
    [
        {"enable_thinking": False}, {"include_reasoning": False}, {"thinking_token_budget": 0},
        {"store": True}, {"length_penalty": 2}, {"priority": 3}, {"guided_json": {}}, {"documents": [{}]},
        {"spaces_between_special_tokens": False}, {"response_format": {"type": "json_object"}},
        {"reasoning_effort": "none"}, {"verbosity": "low"}, {"truncation_side": "right"},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_ask_for_something(field: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=next(iter(field))):
        read({**TEXT, **field})


def test_no_field_is_in_two_tables() -> None:
    fields = {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}
    assert len(fields | UNSUPPORTED.keys() | HARMLESS) == len(fields) + len(UNSUPPORTED) + len(HARMLESS)


def test_unknown_fields_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = BodyReader()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reader.read(json.dumps({**TEXT, "n\new": 1, "user": "me", "x" * 999: 2}).encode(), CompletionBody)
        assert [record.args for record in caplog.records] == [("n\new",), ("x" * 60,)]
        assert r"'n\new'" in caplog.text
        reader.read(json.dumps({**TEXT, **dict.fromkeys(map(str, range(500)))}).encode(), CompletionBody)
    assert len(caplog.records) == 100


def test_whole_floats_are_whole_numbers() -> None:
    body = read({**TEXT, "max_tokens": 4.0, "stop_token_ids": [4.0, 5], "seed": -1.0, "top_p": 1.0})
    assert (body.max_tokens, body.stop_token_ids, body.seed) == (4, [4, 5], -1)
    assert all(isinstance(number, int) for number in (body.max_tokens, *body.stop_token_ids, body.seed))
    for prompt, ids in (([4.0, 5], [[4, 5]]), ([[4.0], [5, 6e0]], [[4], [5, 6]])):
        assert prompts_of(read({**TEXT, "prompt": prompt}), 10) == ids


def test_a_byte_order_mark_is_skipped() -> None:
    assert BodyReader().read(b"\xef\xbb\xbf" + json.dumps(TEXT).encode(), CompletionBody).model == "tiny"


@pytest.mark.parametrize("space", ["", " "])
def test_long_prompts_are_read_as_short_ones_are(space: str) -> None:
    lists = [[i % 97] * (i % 5) for i in range(1, 1001)] + [list(range(60_000))]
    separators = ("," + space, ":" + space)
    for prompt, expected in ((lists, lists), (lists[-1], [lists[-1]])):
        raw = json.dumps({**TEXT, "prompt": prompt}, separators=separators).encode()
        assert prompts_of(BodyReader().read(raw, CompletionBody), 10) == expected
    for wrong in ([*lists, 5], [*lists, ["a"]], [*lists, [None]], [*lists, [[1]]], [[1]] * 60_000):
        with pytest.raises(ApiError, match=r"prompt|JSON"):
            prompts_of(read({**TEXT, "prompt": wrong}), 10)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.sampled_from('a,[{"\\é😀\n')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('k,[{"\\')), inner),
)


@given(JSON, st.booleans())
def test_values_are_counted_without_those_in_texts(value: Any, ascii: bool) -> None:
    def size(one: Any) -> int:
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        return 1 + sum(map(size, inner))

    def longest(one: Any) -> int:
        inner = [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else ()
        return max([len(one) if isinstance(one, str) else 0, *map(longest, inner)])

    raw = json.dumps(value, ensure_ascii=ascii, separators=(",", ":")).encode()
    outside = b"".join(raw.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    assert size(value) <= _openings(outside) <= 2 * size(value), "an empty list counts as two"
    text = msgspec.Raw(json.dumps(longest_of := "a\n😀,[" * 9, ensure_ascii=ascii).encode())
    assert longest_text(text) <= len(longest_of)


def test_too_many_values() -> None:
    texts = json.dumps([{"role": "user", "content": ",[{" * 100_000}])
    assert _values(texts.encode()) == 4
    junk: list[Any] = [{}] * 60_000
    for messages in (junk, [{"role": "user", "content": "a", "x": junk}]):
        with pytest.raises(ApiError, match="messages may hold 50000 values"):
            messages_of(read({"model": "tiny", "messages": messages}, ChatBody))


def test_many_bytes_of_other_fields() -> None:
    with pytest.raises(ApiError, match="too large") as caught:
        read({**TEXT, "unknown": "x" * 2**20})
    assert caught.value.status == 413
    assert read({**TEXT, "prompt": "x" * 2**20}).model == "tiny"


def complete(server: RunningServer, **fields: Any) -> Any:
    status, answer = server.request("POST", "/v1/completions", {**GREEDY, "prompt": "abc", **fields})
    assert status == 200, answer
    return answer


def said(server: RunningServer, **fields: Any) -> str:
    text: str = complete(server, **fields)["choices"][0]["text"]
    return text


def test_min_tokens(server: RunningServer) -> None:
    ended = {"ignore_eos": False, "logit_bias": {str(EOS): 100}, "max_tokens": 30}
    assert complete(server, **ended)["usage"]["completion_tokens"] == 1
    assert complete(server, min_tokens=25, **ended)["usage"]["completion_tokens"] == 26
    assert complete(server, min_tokens=25, **ended | {"max_tokens": None})["usage"]["completion_tokens"] == 25


def test_allowed_token_ids_and_bad_words(server: RunningServer) -> None:
    assert set(said(server, allowed_token_ids=[A, A + 1.0, A], max_tokens=20, temperature=1)) <= {"a", "b"}
    assert said(server, logit_bias={A: 100}, max_tokens=4) == "aaaa"
    assert "aa" not in said(server, logit_bias={A: 100}, bad_words=["aa"], max_tokens=9)


def test_stop_strings_and_special_tokens_can_be_shown(server: RunningServer) -> None:
    whole = said(server, max_tokens=20)
    stop = whole[4:6]
    end = whole.index(stop) + len(stop)
    assert said(server, max_tokens=20, stop=stop, include_stop_str_in_output=True) == whole[:end]
    assert (
        said(server, max_tokens=20, stop=[stop, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 2])
        == whole[: end - len(stop)]
    )
    special = {"logit_bias": {str(EOS + 1): 100}, "max_tokens": 2}
    assert said(server, **special) == ""
    assert said(server, skip_special_tokens=False, **special) == "<|mark|><|mark|>"


def test_truncated_prompts(server: RunningServer) -> None:
    cut = complete(server, prompt=["abcdefgh", [1, 2, A, A + 1]], truncate_prompt_tokens=2, max_tokens=6)
    assert cut["usage"]["prompt_tokens"] == 4
    assert [choice["text"] for choice in cut["choices"]] == [
        said(server, prompt=prompt, max_tokens=6) for prompt in ("gh", "ab")
    ]
    for max_tokens, room in ((None, 16), (5, 5)):
        fitted = complete(server, prompt="x" * 900, truncate_prompt_tokens=-1, max_tokens=max_tokens)
        usage = fitted["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (512 - room, room)


def test_echo(server: RunningServer) -> None:
    text = said(server, max_tokens=5)
    assert said(server, max_tokens=5, echo=True) == f"abc{text}"
    scored = complete(server, max_tokens=0, echo=True, logprobs=2)["choices"][0]
    assert scored["text"] == "abc"
    assert scored["logprobs"]["tokens"] == ["a", "b", "c"]
    assert scored["logprobs"]["token_logprobs"][0] is None
    assert all(number < 0 for number in scored["logprobs"]["token_logprobs"][1:])


def test_prompt_logprobs_and_token_ids(server: RunningServer) -> None:
    choice = complete(server, max_tokens=3, prompt_logprobs=1, return_token_ids=True)["choices"][0]
    assert len(choice["prompt_logprobs"]) == 3
    assert choice["prompt_token_ids"] == [A, A + 1, A + 2]
    assert len(choice["token_ids"]) == 3


def test_a_message_is_continued(server: RunningServer) -> None:
    def tokens(**fields: Any) -> int:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Sure,"}]
        body = {**GREEDY, "messages": messages, "max_tokens": 1, **fields}
        status, answer = server.request("POST", "/v1/chat/completions", body)
        assert status == 200, answer
        count: int = answer["usage"]["prompt_tokens"]
        return count

    plain, bare = tokens(), tokens(add_generation_prompt=False)
    continued = tokens(continue_final_message=True)
    assert continued == tokens(continue_final_message=True, add_generation_prompt=False)
    assert continued < bare < plain, "the end of the message is left out; and nobody's turn begins"


def test_values_of_fields(server: RunningServer) -> None:
    greedy = said(server, max_tokens=8)
    assert said(server, max_tokens=8.0, temperature=1, top_p=0) == greedy
    assert said(server, max_tokens=8, stream_options=None, best_of=1, tool_choice="required") == greedy
    chat = {**GREEDY, "messages": [{"role": "user", "content": "a"}], "logprobs": False, "top_logprobs": 0}
    assert server.request("POST", "/v1/chat/completions", {**chat, "max_tokens": 2})[0] == 200


def test_what_a_request_leaves_out_is_as_the_model_says(
    checkpoint: Callable[[str], Path], tmp_path: Path, server: RunningServer
) -> None:
    """The model asks for the most probable token; `tiny` does not."""
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint("qwen3").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "generation_config.json").read_text()) | {"top_k": 1, "temperature": 0.5}
    (model / "generation_config.json").write_text(json.dumps(settings))
    greedy = said(server, max_tokens=12)
    drawn = {"temperature": 1, "top_k": 0, "max_tokens": 12, "seed": 5}
    with launch(tmp_path / "logs", model, "--model-name", "tiny") as own:
        own.wait_ready()
        assert said(own, temperature=None, max_tokens=12) == greedy
        assert said(own, **drawn) == said(server, **drawn) != greedy
    with launch(tmp_path / "logs", model, "--model-name", "tiny", "--sampling-defaults", "openai") as own:
        own.wait_ready()
        assert said(own, temperature=None, max_tokens=12, seed=5) == said(server, **drawn)
