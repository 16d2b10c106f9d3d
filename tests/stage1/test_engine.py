"""The naive engine: order, ends, refusals, and texts that depend on their own request alone."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.interface import Engine, EngineConfig, Request, RequestRefused, SamplingParams, TokenOutput
from stages.stage1_naive.engine import build
from tests.checkpoints import EOS, FAMILIES, VOCAB_SIZE
from tests.oracle import run_engine, tokens_of

CONTEXT = 40
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


@pytest.fixture
def engine(checkpoint: Callable[[str], Path]) -> Engine:
    return build(EngineConfig(model=str(checkpoint("qwen3")), device="cpu", max_context=CONTEXT))


def request(name: str = "a", prompt: list[int] | None = None, seed: int = 0, **settings: object) -> Request:
    make: Callable[..., SamplingParams] = SamplingParams
    return Request(name, prompt or [1, 2, 3], make(**{"ignore_eos": True, **settings}), seed=seed)


def run(engine: Engine, *requests: Request) -> list[list[TokenOutput]]:
    return list(run_engine(engine, requests).values())


def test_an_empty_engine_rests(engine: Engine) -> None:
    assert not engine.has_work
    assert engine.step() == []
    assert engine.context_length == CONTEXT


def test_requests_are_served_in_order_of_arrival(engine: Engine) -> None:
    for name, length in (("b", 3), ("a", 2), ("c", 1)):
        engine.add(request(name, max_tokens=length))
    served = []
    while engine.has_work:
        served += [output.request_id for output in engine.step()]
    assert served == ["b", "b", "b", "a", "a", "c"]
    assert engine.step() == []


def test_an_id_may_come_again_once_it_is_done(engine: Engine) -> None:
    first, second = (run(engine, request("a", max_tokens=2)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("aborted", ["a", "b", "c"], ids=["running", "queued", "last"])
def test_abort(engine: Engine, aborted: str) -> None:
    for name in "abc":
        engine.add(request(name, max_tokens=3))
    engine.step()
    engine.abort(aborted)
    engine.abort(aborted)  # twice is as good as once
    left = []
    while engine.has_work:
        left += [output.request_id for output in engine.step()]
    assert left == [name for name in "aabbbccc" if name != aborted]


def test_abort_of_the_unknown_and_the_finished(engine: Engine) -> None:
    engine.abort("nobody")
    run(engine, request("a", max_tokens=1))
    engine.abort("a")
    assert not engine.has_work


def test_an_aborted_id_is_free(engine: Engine) -> None:
    engine.add(request("a", max_tokens=3))
    engine.step()
    engine.abort("a")
    assert len(run(engine, request("a", max_tokens=3))[0]) == 3


def test_max_tokens_ends_with_length(engine: Engine) -> None:
    (outputs,) = run(engine, request(max_tokens=4))
    assert [output.finish_reason for output in outputs] == [None, None, None, "length"]
    assert all(output.logprobs is None for output in outputs)


@pytest.mark.parametrize("length", [1, 30, CONTEXT - 1])
def test_a_full_context_ends_with_length(engine: Engine, length: int) -> None:
    (outputs,) = run(engine, Request("a", [7] * length, ENDLESS))
    assert len(outputs) == CONTEXT - length
    assert outputs[-1].finish_reason == "length"
    assert {output.finish_reason for output in outputs[:-1]} <= {None}


def test_the_models_own_context_is_the_default(checkpoint: Callable[[str], Path]) -> None:
    engine = build(EngineConfig(model=str(checkpoint("llama3-rope")), device="cpu"))
    assert engine.context_length == 512
    (outputs,) = run(engine, Request("a", [7] * 510, ENDLESS))
    assert len(outputs) == 2


def forced(*tokens: int) -> dict[int, float]:
    """A bias under which only these tokens can come."""
    return {token: -100.0 for token in range(VOCAB_SIZE) if token not in tokens}


def test_the_models_stop_token_ends_with_stop(engine: Engine) -> None:
    (outputs,) = run(engine, request(logit_bias=forced(EOS), ignore_eos=False))
    assert [(output.token_id, output.finish_reason) for output in outputs] == [(EOS, "stop")]


def test_ignore_eos_runs_on(engine: Engine) -> None:
    (outputs,) = run(engine, request(logit_bias=forced(EOS), max_tokens=5))
    assert tokens_of(outputs) == [EOS] * 5
    assert outputs[-1].finish_reason == "length"


def test_stop_token_ids_end_with_stop(engine: Engine) -> None:
    (free,) = run(engine, request(temperature=0.0, max_tokens=12))
    stop = tokens_of(free)[5]
    (outputs,) = run(engine, request(temperature=0.0, max_tokens=12, stop_token_ids=[9, stop]))
    first = tokens_of(free).index(stop)
    assert tokens_of(outputs) == tokens_of(free)[: first + 1]
    assert outputs[-1].finish_reason == "stop"


def test_ignore_eos_keeps_the_requests_own_stop_tokens(engine: Engine) -> None:
    (outputs,) = run(engine, request(logit_bias=forced(EOS), stop_token_ids=[EOS]))
    assert [(output.token_id, output.finish_reason) for output in outputs] == [(EOS, "stop")]


def test_a_stop_token_at_the_very_end_is_a_stop(engine: Engine) -> None:
    (outputs,) = run(engine, request(logit_bias=forced(EOS), ignore_eos=False, max_tokens=1))
    assert outputs[-1].finish_reason == "stop"


GOOD = request("good", max_tokens=2)
REFUSALS: dict[str, tuple[Request, str]] = {
    "no prompt": (Request("x", [], SamplingParams()), "no tokens"),
    "prompt fills the context": (Request("x", [1] * CONTEXT, SamplingParams()), "40 tokens, which leaves no"),
    "prompt exceeds it": (Request("x", [1] * 1000, SamplingParams()), "1000 tokens"),
    "max_tokens exceeds it": (request("x", [1] * 30, max_tokens=11), "30 tokens and max_tokens 11 .*of 40"),
    "unknown token": (request("x", [1, VOCAB_SIZE]), f"the prompt .*{VOCAB_SIZE}; .*0 to {VOCAB_SIZE - 1}"),
    "negative token": (request("x", [-1, 1]), "the prompt .* id -1"),
    "bias of an unknown token": (request("x", logit_bias={VOCAB_SIZE: 1.0}), "logit_bias .*320"),
    "bias of a negative token": (request("x", logit_bias={-1: 1.0}), "logit_bias .* -1"),
    "stop at an unknown token": (request("x", stop_token_ids=[5, VOCAB_SIZE]), "stop_token_ids .*320"),
    "taken id": (dataclasses.replace(GOOD, params=ENDLESS), "'good' is being served"),
    "seed of 65 bits": (request("x", seed=2**63), "seed"),
    "an unknown token allowed": (request("x", allowed_token_ids=[1, VOCAB_SIZE]), "allowed_token_ids .*320"),
    "bad words of one": (request("x", bad_words_ids=[[1], [2, -3]]), "bad_words_ids .* -3"),
    "more least than most": (request("x", min_tokens=3, max_tokens=2), "min_tokens .* most max_tokens 2"),
    "nothing allowed": (
        request("x", allowed_token_ids=[4], bad_words_ids=[[4]]),
        "allowed_token_ids, .*no tok",
    ),
    "all words bad": (
        request("x", bad_words_ids=[[t] for t in range(VOCAB_SIZE)]),
        "bad_words_ids .*no token",
    ),
    "only an end, too early": (request("x", allowed_token_ids=[EOS], min_tokens=1), "min_tokens .*no token"),
}
PARAMS = {
    "no prompt": "prompt", "prompt fills the context": "prompt", "prompt exceeds it": "prompt",
    "max_tokens exceeds it": "max_tokens", "unknown token": "prompt", "negative token": "prompt",
    "taken id": None, "seed of 65 bits": "seed", "bias of an unknown token": "logit_bias",
    "stop at an unknown token": "stop_token_ids", "an unknown token allowed": "allowed_token_ids",
    "bad words of one": "bad_words_ids", "more least than most": "min_tokens",
    "nothing allowed": "allowed_token_ids", "all words bad": "bad_words_ids",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_is_not_queued(engine: Engine, case: str) -> None:
    wrong, message = REFUSALS[case]
    engine.add(GOOD)
    with pytest.raises(RequestRefused, match=message) as caught:
        engine.add(wrong)
    assert caught.value.param == PARAMS.get(case, caught.value.param)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["good", "good"]


@pytest.mark.parametrize("ends", ["eos", "ignored eos", "own"])
def test_no_end_before_min_tokens(engine: Engine, ends: str) -> None:
    """Every stop token is forbidden until then, however probable, and nothing else is."""
    own = {"stop_token_ids": [EOS]} if ends == "own" else {}
    wanted = request(
        logit_bias={EOS: 100.0}, min_tokens=4, max_tokens=7, ignore_eos=ends != "eos", temperature=0.0, **own
    )
    (outputs,) = run(engine, wanted)
    (free,) = run(engine, request(logit_bias={EOS: -100.0}, max_tokens=4, temperature=0.0))
    tokens = tokens_of(outputs)
    assert tokens[:4] == tokens_of(free)
    assert tokens[4:] == [EOS] * (3 if ends == "ignored eos" else 1)
    assert outputs[-1].finish_reason == ("length" if ends == "ignored eos" else "stop")


def test_only_allowed_tokens_come(engine: Engine) -> None:
    (outputs,) = run(engine, request(allowed_token_ids=[5, 300, 31, 32], max_tokens=30, temperature=3.0))
    assert set(tokens_of(outputs)) == {5, 300, 31, 32}
    (one,) = run(engine, request(allowed_token_ids=[EOS, 7], max_tokens=3, min_tokens=3, ignore_eos=False))
    assert tokens_of(one) == [7, 7, 7]


def test_bad_words_do_not_come(engine: Engine) -> None:
    words = [[0], [1, 2], [3, 4, 3], [5, 5, 5, 5]]
    (outputs,) = run(
        engine,
        request(
            prompt=[1],
            allowed_token_ids=range(6),
            bad_words_ids=words,
            max_tokens=39,
            temperature=9.0,
            seed=2,
        ),
    )
    text = [f"{token}" for token in tokens_of(outputs)]
    assert len(text) == 39
    assert not any("".join(map(str, word)) in "".join(text) for word in words)
    assert {"55", "43"} <= {a + b for a, b in itertools.pairwise(text)}, "parts of them may"
    (after_prompt,) = run(
        engine, request(prompt=[1], allowed_token_ids=[2], bad_words_ids=words, max_tokens=1)
    )
    assert tokens_of(after_prompt) == [2], "the prompt is no part of the answer"


@pytest.mark.parametrize("count", [0, 3])
def test_scores_of_the_prompt_are_those_of_the_next_token(engine: Engine, count: int) -> None:
    """As if each of its tokens had been drawn."""
    prompt = [1, 7, 300, 7, 9]
    first, second = run(engine, request(prompt=prompt, max_tokens=2, prompt_logprobs=count))[0]
    assert second.prompt_logprobs is None
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == len(prompt) - 1
    for n, score in enumerate(first.prompt_logprobs, start=1):
        forced = request(prompt=prompt[:n], allowed_token_ids=[prompt[n]], logprobs=count, max_tokens=1)
        ((drawn,),) = run(engine, forced)
        assert drawn.logprobs is not None
        assert score.chosen == pytest.approx(drawn.logprobs.chosen, abs=1e-5)
        assert [token for token, _ in score.top] == [token for token, _ in drawn.logprobs.top]
        assert len(score.top) == count
    ((alone,),) = run(engine, request(prompt=[4], max_tokens=1, prompt_logprobs=count))
    assert alone.prompt_logprobs == []


def test_the_longest_that_fits_is_served(engine: Engine) -> None:
    (outputs,) = run(engine, request("a", [1] * 30, max_tokens=10))
    assert len(outputs) == 10


def test_seeds_reproduce_and_tell_apart(engine: Engine) -> None:
    def text(seed: int) -> list[int]:
        return tokens_of(run(engine, request(seed=seed, max_tokens=12, temperature=2.0))[0])

    seeds = [0, 1, 2, -1, 2**63 - 1, -(2**63), 2**32]
    texts = [text(seed) for seed in seeds]
    assert texts == [text(seed) for seed in seeds]
    assert len(set(map(tuple, texts))) == len(seeds)


def test_a_text_depends_on_its_own_request_alone(engine: Engine, checkpoint: Callable[[str], Path]) -> None:
    requests = [
        request("greedy", [5] * 9, temperature=0.0, max_tokens=9),
        request("seeded", [8, 1], seed=11, max_tokens=12, logprobs=3),
        request("penalised", [3, 3, 4], seed=5, max_tokens=8, frequency_penalty=1.5, repetition_penalty=1.4),
        request("filtered", [300], seed=5, max_tokens=10, top_k=5, top_p=0.9, min_p=0.01),
    ]
    together = run_engine(engine, requests)
    backwards = run_engine(engine, [dataclasses.replace(GOOD, id="first"), *reversed(requests)])
    fresh = build(EngineConfig(model=str(checkpoint("qwen3")), device="cpu", max_context=CONTEXT))
    for one in requests:
        alone = run_engine(fresh, [one])[one.id]
        assert together[one.id] == alone
        assert backwards[one.id] == alone


def test_generated_tokens_are_penalised(engine: Engine) -> None:
    (free,) = run(engine, request(temperature=0.0, max_tokens=20, logit_bias=forced(1, 2)))
    (held,) = run(
        engine, request(temperature=0.0, max_tokens=20, logit_bias=forced(1, 2), frequency_penalty=2.0)
    )
    assert abs(tokens_of(held).count(1) - 10) <= abs(tokens_of(free).count(1) - 10)
    assert tokens_of(held) != tokens_of(free)
    assert set(tokens_of(held)) == {1, 2}


def test_logprobs_are_those_of_the_whole_sequence(engine: Engine) -> None:
    """Reading prompt and output again as one prompt must give the same distribution for the next token."""
    (outputs,) = run(engine, request(max_tokens=6, logprobs=5, seed=3))
    for n, output in enumerate(outputs):
        prefix = [1, 2, 3, *tokens_of(outputs[:n])]
        ((again,),) = run(engine, request(prompt=prefix, max_tokens=1, logprobs=5, seed=3))
        assert again.token_id == output.token_id  # the noise belongs to the position
        assert again.logprobs == output.logprobs


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_dtype_runs_on_the_cpu(checkpoint: Callable[[str], Path], family: str, dtype: str) -> None:
    engine = build(EngineConfig(model=str(checkpoint(family)), device="cpu", dtype=dtype))
    (outputs,) = run(engine, request(max_tokens=3, logprobs=2, top_p=0.9, presence_penalty=0.5))
    assert len(outputs) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_context": 513}, "max_context must be from 2 to the model's 512"),
        ({"max_context": 1}, "max_context"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"device": "tpu9"}, "device tpu9"),
        ({"model": "/nowhere"}, "no folder /nowhere"),
    ],
)
def test_what_cannot_be_built(
    checkpoint: Callable[[str], Path], settings: dict[str, object], message: str
) -> None:
    make: Callable[..., EngineConfig] = EngineConfig
    with pytest.raises(ValueError, match=message):
        build(make(**{"model": str(checkpoint("qwen3")), "device": "cpu", **settings}))


def test_steps_leave_no_gradients(engine: Engine) -> None:
    run(engine, request(max_tokens=1))
    assert torch.is_grad_enabled()
