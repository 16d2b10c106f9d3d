"""What answers say besides their text: why they ended, their tokens, and log-probabilities of all kinds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file

from tests.checkpoints import EOS, write_checkpoint
from tests.server.running import RunningServer, launch

A = ord("a") - ord("!")
TEXT = {"model": "tiny", "prompt": "abc", "temperature": 0, "ignore_eos": True, "max_tokens": 6}


def complete(server: RunningServer, **fields: Any) -> Any:
    status, answer = server.request("POST", "/v1/completions", {**TEXT, **fields})
    assert status == 200, answer
    return answer


def stream(server: RunningServer, path: str, body: dict[str, Any]) -> list[Any]:
    connection = server.connect()
    connection.request("POST", path, json.dumps({**body, "stream": True}))
    lines = connection.getresponse().read().decode().split("\n\n")
    connection.close()
    assert lines[-2] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_the_stop_reason(server: RunningServer) -> None:
    def ended(**fields: Any) -> tuple[str, Any]:
        choice = complete(server, **fields)["choices"][0]
        return choice["finish_reason"], choice["stop_reason"]

    text = complete(server)["choices"][0]["text"]
    token = complete(server, return_token_ids=True)["choices"][0]["token_ids"][2]
    assert ended() == ("length", None)
    assert ended(stop=["nothing", text[2]]) == ("stop", text[2])
    assert ended(stop_token_ids=[token]) == ("stop", token)
    assert ended(ignore_eos=False, logit_bias={EOS: 100}) == ("stop", None)


def test_a_stream_is_the_answer_in_pieces(server: RunningServer) -> None:
    asked = {"echo": True, "logprobs": 1, "return_token_ids": True, "n": 2, "seed": 5, "temperature": 1}
    whole = complete(server, **asked)
    events = stream(server, "/v1/completions", {**TEXT, **asked})
    for expected in whole["choices"]:
        pieces = [e["choices"][0] for e in events if e["choices"][0]["index"] == expected["index"]]
        assert "".join(piece["text"] for piece in pieces) == expected["text"]
        assert expected["text"].startswith("abc")
        assert pieces[-1]["finish_reason"] == expected["finish_reason"]
        assert [i for piece in pieces for i in piece.get("token_ids", [])] == expected["token_ids"]
        assert pieces[0]["prompt_token_ids"] == expected["prompt_token_ids"] == [A, A + 1, A + 2]
        scored = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        for field, values in expected["logprobs"].items():
            assert [value for one in scored for value in one[field]] == values
        assert "".join(expected["logprobs"]["tokens"]) == expected["text"]


def test_usage_in_every_event(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chat = {**TEXT, "messages": [{"role": "user", "content": "abc"}], "stream_options": options}
    del chat["prompt"]
    *events, last = stream(server, "/v1/chat/completions", chat)
    counts = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
    assert counts == sorted(counts)
    assert last["choices"] == []
    assert counts[-1] == last["usage"]["completion_tokens"] == 6
    del options["continuous_usage_stats"]
    *events, last = stream(server, "/v1/chat/completions", chat)
    assert not any(event["usage"] for event in events)
    assert last["usage"]["completion_tokens"] == 6


def test_log_probabilities_of_a_prompt_are_those_of_an_answer(server: RunningServer) -> None:
    """What the model says of its own tokens it says of them as a prompt, too."""
    answer = complete(server, logprobs=2, return_token_ids=True)["choices"][0]
    prompt = [*answer["prompt_token_ids"], *answer["token_ids"]]
    read = complete(server, prompt=prompt, max_tokens=1, prompt_logprobs=2)["choices"][0]
    first, *scores = read["prompt_logprobs"]
    assert first is None
    for token, score, logprob in zip(
        answer["token_ids"], scores[2:], answer["logprobs"]["token_logprobs"], strict=True
    ):
        assert score[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert score[str(token)]["rank"] == 1
    status, refused = server.request(
        "POST", "/v1/completions", {**TEXT, "prompt_logprobs": 1, "stream": True}
    )
    assert (status, refused["error"]["param"]) == (400, "prompt_logprobs")


def test_the_openai_client_reads_it_all(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 0}
    choice = client.completions.create(**asked, echo=True, logprobs=2).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(math.isfinite(logprob) for logprob in (choice.logprobs.token_logprobs or [])[1:])


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which the token of "z" is NaN."""
    path = write_checkpoint(tmp_path_factory.mktemp("broken"), "qwen2", tie_word_embeddings=False)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][A + 25] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_a_request_without_numbers_ends_alone(broken: Path, tmp_path: Path) -> None:
    with launch(tmp_path, broken, "--model-name", "tiny") as server:
        server.wait_ready()
        good = complete(server)
        status, answer = server.request("POST", "/v1/completions", {**TEXT, "prompt": ["abc", "abz"]})
        assert (status, answer["error"]["code"]) == (500, "invalid_logits")
        assert "NaN" in answer["error"]["message"]
        body = {**TEXT, "prompt": "xyz", "stream": True}
        status, answer = server.request("POST", "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (500, "invalid_logits"), "no token came before it"
        again = complete(server)
        assert again["choices"] == good["choices"]
        assert "ends with an error" in server.stderr
