"""The official client drives a real server."""

import asyncio
import math
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.checkpoints import EOS
from tests.server.running import RunningServer, launch

A = ord("a") - ord("!")  # the token of "a": the tiny vocabulary begins with the visible ASCII from "!"
ASCII_ONLY = {str(token): -100 for token in range(94, 320)}  # each token has a text of its own
ASK: list[Any] = [{"role": "user", "content": "Tell me a story."}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
DRAWN: dict[str, Any] = {**GREEDY, "temperature": 1, "seed": 7}


def chat_text(client: OpenAI, **options: Any) -> tuple[str, str]:
    """Text and finish reason of one choice."""
    answer = client.chat.completions.create(messages=ASK, **options)
    return answer.choices[0].message.content or "", answer.choices[0].finish_reason


def streamed(client: OpenAI, **options: Any) -> tuple[dict[int, str], dict[int, str | None]]:
    """Text and finish reason of each choice, from a stream."""
    texts: dict[int, str] = {}
    finish: dict[int, str | None] = {}
    for chunk in client.chat.completions.create(messages=ASK, stream=True, **options):
        for choice in chunk.choices:
            assert finish.get(choice.index) is None, "nothing follows the finish reason"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            finish[choice.index] = choice.finish_reason
    return texts, finish


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, options: dict[str, Any]) -> None:
    text, finish = chat_text(client, max_tokens=40, **options)
    assert text
    assert finish == "length"
    assert streamed(client, max_tokens=40, **options) == ({0: text}, {0: "length"})


def test_seeds(client: OpenAI) -> None:
    texts = {
        seed: chat_text(client, max_tokens=20, **{**DRAWN, "seed": seed})[0] for seed in (1, 2, -(2**63))
    }
    assert len(set(texts.values())) == 3
    assert chat_text(client, max_tokens=20, **{**DRAWN, "seed": 1})[0] == texts[1]
    unseeded = {chat_text(client, max_tokens=20, **{**DRAWN, "seed": None})[0] for _ in range(3)}
    assert len(unseeded) == 3


def test_n_choices_are_the_seeds_that_follow(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=ASK, n=3, max_tokens=12, **DRAWN)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [chat_text(client, max_tokens=12, **{**DRAWN, "seed": 7 + i})[0] for i in range(3)]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    assert streamed(client, n=3, max_tokens=12, **DRAWN) == (
        dict(enumerate(texts)),
        dict.fromkeys(range(3), "length"),
    )


def test_usage(client: OpenAI) -> None:
    answer = client.completions.create(prompt="abcde", max_tokens=4, **GREEDY)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        5,
        4,
        9,
    )
    chunks = list(
        client.completions.create(
            prompt="abcde", max_tokens=4, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage
    without = list(client.completions.create(prompt="abcde", max_tokens=4, stream=True, **GREEDY))
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in without)


def test_cached_tokens_and_metrics(server: RunningServer, client: OpenAI) -> None:
    def metrics() -> dict[str, float]:
        connection = server.connect()
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("content-type")) == (
            200,
            "text/plain; version=0.0.4; charset=utf-8",
        )
        lines = [line.split() for line in answer.read().decode().splitlines()]
        assert {line[3] for line in lines if line[0] == "#"} == {"counter", "gauge"}
        connection.close()
        return {line[0].removeprefix("minisgl_"): float(line[1]) for line in lines if line[0] != "#"}

    def cached(n: int, prompts: list[list[int]]) -> tuple[int, int]:
        usage = client.completions.create(prompt=prompts, n=n, max_tokens=2, **GREEDY).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0

    before = metrics()
    one, two = [77, 1] * 25, [77, 2] * 25
    assert cached(1, [one]) == (50, 0)
    assert cached(1, [one]) == (50, 48), "whole pages of 16 tokens"
    assert cached(3, [one, two]) == (100, 48), "a prompt counts once, however many its choices"
    assert cached(1, [[*one[:32], 9]]) == (33, 32)
    after = metrics()
    gained = {name: after[name] - before[name] for name in after}
    assert gained["prompt_tokens_total"] == 50 + 50 + 3 * 100 + 33
    assert gained["cached_tokens_total"] == 0 + 48 + 3 * 48 + 2 * 48 + 32
    assert after["hit_rate"] == pytest.approx(after["cached_tokens_total"] / after["prompt_tokens_total"])
    assert after["running"] == after["waiting"] == 0
    assert after["free_pages"] + after["cached_pages"] == after["pages"]


def test_a_chat_stream_begins_with_the_role(client: OpenAI) -> None:
    first = next(iter(client.chat.completions.create(messages=ASK, stream=True, max_tokens=2, **GREEDY)))
    assert first.choices[0].delta.role == "assistant"
    assert first.object == "chat.completion.chunk"
    assert first.model == "tiny"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: OpenAI, stream: bool) -> None:
    whole, _ = chat_text(client, max_tokens=40, **GREEDY)
    stop = whole[10:14]  # one byte a token: it spans at least four
    before = whole[: whole.index(stop)]
    for stops in (stop, ["never said", stop, "nor this"]):
        options = {"max_tokens": 40, "stop": stops, **GREEDY}
        if stream:
            assert streamed(client, **options) == ({0: before}, {0: "stop"})
        else:
            assert chat_text(client, **options) == (before, "stop")


def test_the_first_stop_string_counts_for_each_choice(client: OpenAI) -> None:
    whole, _ = streamed(client, n=2, max_tokens=30, **DRAWN)
    stop = whole[1][5:8]
    texts, finish = streamed(client, n=2, max_tokens=30, stop=[stop], **DRAWN)
    for i in (0, 1):
        assert texts[i] == whole[i].partition(stop)[0]
        assert finish[i] == ("stop" if stop in whole[i] else "length")


def test_a_stop_token_is_counted_and_not_shown(client: OpenAI) -> None:
    logit_bias = {str(EOS): 100}
    ended = client.completions.create(
        model="tiny", prompt="abc", max_tokens=8, temperature=0, logit_bias=logit_bias
    )
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage is not None
    assert ended.usage.completion_tokens == 1
    ignored = client.completions.create(prompt="abc", max_tokens=8, logit_bias=logit_bias, **GREEDY)
    assert ignored.choices[0].finish_reason == "length"
    assert ignored.usage is not None
    assert ignored.usage.completion_tokens == 8
    also = client.completions.create(
        model="tiny", prompt="abc", max_tokens=8, temperature=0, logit_bias={str(A): 100},
        extra_body={"stop_token_ids": [A]},
    )  # fmt: skip
    assert (also.choices[0].text, also.choices[0].finish_reason) == ("", "stop")


def test_sampling_parameters_reach_the_engine(client: OpenAI) -> None:
    greedy, _ = chat_text(client, max_tokens=20, **GREEDY)
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        body = {"ignore_eos": True, **extra}
        assert chat_text(client, max_tokens=20, model="tiny", seed=3, extra_body=body)[0] == greedy
    assert chat_text(client, max_tokens=20, top_p=1e-9, **DRAWN)[0] == greedy
    off = {"ignore_eos": True, "top_k": -1}
    assert chat_text(client, max_tokens=20, **DRAWN) == chat_text(
        client, max_tokens=20, **{**DRAWN, "extra_body": off}
    )
    assert chat_text(client, max_tokens=5, logit_bias={str(A): 100}, **GREEDY)[0] == "aaaaa"
    penalised = chat_text(client, max_tokens=40, frequency_penalty=2, presence_penalty=2, **GREEDY)[0]
    assert penalised != chat_text(client, max_tokens=40, **GREEDY)[0]


def test_max_completion_tokens_and_defaults(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=ASK, max_completion_tokens=3, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert client.completions.create(prompt="abc", **GREEDY).usage.completion_tokens == 16  # type: ignore[union-attr]
    long: Any = [{"role": "user", "content": "x" * 480}]
    full = client.chat.completions.create(messages=long, **GREEDY)  # until the context is full
    assert full.usage is not None
    assert full.usage.total_tokens == 512
    assert full.choices[0].finish_reason == "length"
    short = client.completions.create(prompt=[A] * 510, **GREEDY)  # less room than the default wants
    assert short.usage is not None
    assert short.usage.completion_tokens == 2


def test_chat_logprobs(client: OpenAI) -> None:
    options = {"logit_bias": ASCII_ONLY, **GREEDY}
    answer = client.chat.completions.create(
        messages=ASK, max_tokens=12, logprobs=True, top_logprobs=20, **options
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(token.token for token in content) == choice.message.content
    assert b"".join(bytes(token.bytes or []) for token in content).decode() == choice.message.content
    for token in content:
        ranked = [top.logprob for top in token.top_logprobs]
        assert len(ranked) == 20
        assert ranked == sorted(ranked, reverse=True)
        assert sum(map(math.exp, ranked)) <= 1 + 1e-5
        assert all(token.logprob == top.logprob for top in token.top_logprobs if top.bytes == token.bytes)
    chunks = client.chat.completions.create(
        messages=ASK, max_tokens=12, logprobs=True, top_logprobs=20, stream=True, **options
    )
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in parts if part for token in part.content or []] == content
    none_asked = client.chat.completions.create(messages=ASK, max_tokens=3, **options)
    assert none_asked.choices[0].logprobs is None
    chosen = client.chat.completions.create(messages=ASK, max_tokens=3, logprobs=True, **options)
    assert chosen.choices[0].logprobs is not None
    assert [token.top_logprobs for token in chosen.choices[0].logprobs.content or []] == [[], [], []]


def test_greedy_takes_the_most_probable(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=ASK, max_tokens=12, logprobs=True, top_logprobs=1, **GREEDY
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == 12
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)


def test_completion_logprobs(client: OpenAI) -> None:
    whole = client.completions.create(prompt="ab", max_tokens=10, logprobs=2, logit_bias=ASCII_ONLY, **GREEDY)
    choice = whole.choices[0]
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    for offset, token in zip(choice.logprobs.text_offset or [], choice.logprobs.tokens or [], strict=True):
        assert choice.text[offset : offset + len(token)] == token
    for token, chosen, top in zip(
        choice.logprobs.tokens or [],
        choice.logprobs.token_logprobs or [],
        choice.logprobs.top_logprobs or [],
        strict=True,
    ):
        assert top[token] == chosen
        assert len(top) in (2, 3)
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(
            prompt="ab", max_tokens=10, logprobs=2, logit_bias=ASCII_ONLY, stream=True, **GREEDY
        )
    ]
    assert [t for part in parts if part for t in part.tokens or []] == choice.logprobs.tokens
    assert [o for part in parts if part for o in part.text_offset or []] == choice.logprobs.text_offset


def test_logprobs_end_where_the_text_ends(client: OpenAI) -> None:
    options = {"prompt": "ab", "max_tokens": 20, "logprobs": 0, "logit_bias": ASCII_ONLY, **GREEDY}
    text = client.completions.create(**options).choices[0].text
    choice = client.completions.create(stop=text[9:12], **options).choices[0]
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text == text[: text.index(text[9:12])]


def test_the_four_forms_of_a_prompt(client: OpenAI) -> None:
    options = {"max_tokens": 6, **GREEDY}
    one, two = (
        client.completions.create(prompt=prompt, **options).choices[0].text for prompt in ("one", "two")
    )
    ids = client.completions.create(prompt=[ord(c) - 33 for c in "one"], **options)
    assert ids.choices[0].text == one
    many = client.completions.create(
        prompt=["one", "two"], n=2, **{**DRAWN, "temperature": 0, "max_tokens": 6}
    )
    assert [choice.text for choice in many.choices] == [one, one, two, two]
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (6, 24)
    lists = client.completions.create(prompt=[[ord(c) - 33 for c in "two"], [5]], **options)
    assert lists.choices[0].text == two


def test_chat_content_in_parts_and_template_kwargs(client: OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    plain: Any = [{"role": "user", "content": "a\nb"}]
    answers = [
        client.chat.completions.create(
            messages=messages, max_tokens=6, model="tiny", temperature=0,
            extra_body={"ignore_eos": True, "chat_template_kwargs": {"enable_thinking": False}},
        ).choices[0].message.content
        for messages in (parts, plain)
    ]  # fmt: skip
    assert answers[0] == answers[1]


def test_what_asks_for_nothing_is_accepted(client: OpenAI) -> None:
    body = {
        "ignore_eos": True,
        "best_of": 1,
        "echo": False,
        "user": "me",
        "unheard_of": {"x": 1},
        "suffix": None,
    }
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=2, temperature=0, extra_body=body)
    assert answer.usage is not None
    chat: Any = {"tools": [], "response_format": {"type": "text"}, "store": False, "stop": None, "n": None}
    client.chat.completions.create(model="tiny", messages=ASK, max_tokens=2, extra_body=chat)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


async def test_sixteen_at_once_are_each_as_alone(client: OpenAI, async_client: AsyncOpenAI) -> None:
    prompts = [f"question number {i}" for i in range(16)]

    async def ask(prompt: str, seed: int) -> str:
        pieces = await async_client.completions.create(
            prompt=prompt, max_tokens=24, stream=True, **{**DRAWN, "seed": seed}
        )
        return "".join([piece.choices[0].text async for piece in pieces])

    together = await asyncio.gather(*(ask(prompt, i) for i, prompt in enumerate(prompts)))
    for i, prompt in enumerate(prompts):
        alone = client.completions.create(prompt=prompt, max_tokens=24, **{**DRAWN, "seed": i})
        assert alone.choices[0].text == together[i]


def test_choices_of_a_stream_come_interleaved(client: OpenAI) -> None:
    chunks = client.completions.create(prompt="a", n=3, max_tokens=40, stream=True, **DRAWN)
    order = [index for index, _ in groupby(chunk.choices[0].index for chunk in chunks)]
    assert set(order) == {0, 1, 2}
    assert len(order) > 6, "one after the other there would be three runs"


def test_stage_1_still_serves(checkpoint: Callable[[str], Path], tmp_path: Path, client: OpenAI) -> None:
    """And says what the newest stage says."""
    options = {"prompt": "abc", "n": 2, "max_tokens": 8, **DRAWN}
    with launch(tmp_path, checkpoint("qwen3"), "--model-name", "tiny", "--stage", "1") as first:
        first.wait_ready()
        with first.client as naive:
            texts = [choice.text for choice in naive.completions.create(**options).choices]
    assert texts == [choice.text for choice in client.completions.create(**options).choices]
