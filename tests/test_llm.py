"""`minisgl.LLM` as a script uses it."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from minisgl import LLM, SamplingParams
from stages.interface import EngineFailed, TokenOutput
from tests.vocabularies import KINDS, save

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> LLM:
    return LLM(str(checkpoint("qwen3")))


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["one", "two and a half", "three"]
    together = llm.generate(prompts, GREEDY, progress=False)
    alone = [llm.generate(prompt, GREEDY, progress=False)[0] for prompt in prompts]
    assert together == alone
    assert [llm.tokenizer.decode(completion.prompt_token_ids) for completion in together] == prompts


def test_texts_token_ids_and_chats_may_stand_side_by_side(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    chat = [{"role": "user", "content": "hello"}]
    text, tokens, answer = llm.generate(["hello", ids, chat], GREEDY, progress=False)
    assert text == tokens
    assert answer.prompt_token_ids == llm.tokenizer.chat(chat)
    assert text.text == llm.tokenizer.decode(text.token_ids)


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True, seed=1, logprobs=n) for n in (1, 5)]
    short, long = llm.generate(["a", "a"], params, progress=False)
    assert (len(short.token_ids), len(long.token_ids)) == (1, 5)
    assert short.finish_reason == long.finish_reason == "length"
    assert [len(one.top) for one in long.logprobs] == [5] * 5
    assert short.token_ids == long.token_ids[:1]


def test_without_a_seed_every_prompt_draws_another(llm: LLM) -> None:
    hot = SamplingParams(temperature=2.0, max_tokens=16, ignore_eos=True)
    first, second = llm.generate(["a", "a"], hot, progress=False)
    assert first.token_ids != second.token_ids


def test_a_refused_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ValueError, match="exceed the context of 512"):
        llm.generate(["fine", "not"], [GREEDY, SamplingParams(max_tokens=10_000)], progress=False)
    assert llm.generate([], progress=False) == []
    assert len(llm.generate(["fine"], GREEDY, progress=False)) == 1


def test_mistakes_are_named(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 prompts were given, but params for 1"):
        llm.generate(["a", "b"], [GREEDY], progress=False)
    with pytest.raises(ValueError, match="1 prompts were given, but params for 0"):
        llm.generate(["a"], [], progress=False)
    with pytest.raises(ValueError, match="a prompt is a text, a list of token ids or a list of messages"):
        llm.generate([["a", "b"]], GREEDY, progress=False)  # type: ignore[list-item]
    for wrong in (1, None, {"role": "user", "content": "a"}, [{"content": "a"}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="a prompt is a text, a list of token ids or a list of messages"):
            llm.generate([wrong], GREEDY, progress=False)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="prompts are a text, or a list of prompts"):
        llm.generate({"role": "user", "content": "a"}, GREEDY, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        llm.generate([[]], GREEDY, progress=False)
    with pytest.raises(ValueError, match="no folder"):
        LLM("./nowhere")
    with pytest.raises(ValueError, match=r"is not a model folder, with config\.json"):
        LLM(str(Path(__file__).parent))
    with pytest.raises(ValueError, match="stage 6 cannot have these options"):
        LLM(wings=2)


def test_the_built_in_model_answers() -> None:
    (answer,) = LLM().generate(
        [[{"role": "user", "content": "What is a radix cache?"}]], GREEDY, progress=False
    )
    assert answer.text.startswith("A radix cache keeps the KV pages")


def test_progress_is_shown_when_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err


def test_ctrl_c_waits_for_the_end_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else pages that were promised to the cache, and not yet computed, would answer the next request."""
    prompt = "a prompt of several pages " * 8
    before = llm.generate(prompt, GREEDY, progress=False)
    step, begun, ended = llm._engine.step, 0, 0

    def interrupted() -> list[TokenOutput]:
        nonlocal begun, ended
        begun += 1
        signal.raise_signal(signal.SIGINT)
        outputs = step()
        ended += 1
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("another " + prompt, GREEDY, progress=False)
    assert begun == ended == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not llm._engine.statistics.running
    assert llm.generate(prompt, GREEDY, progress=False) == before


def test_after_a_step_that_failed_nothing_is_generated(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(checkpoint("qwen3")))

    def failing() -> list[TokenOutput]:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "step", failing)
        with pytest.raises(MemoryError):
            llm.generate("a", GREEDY, progress=False)
    with pytest.raises(EngineFailed, match=r"a step failed before \(MemoryError.*: make a new LLM"):
        llm.generate("a", GREEDY, progress=False)


def test_the_models_own_sampling_is_the_default(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))
    settings = {"eos_token_id": 256, "temperature": 0.6, "top_k": 1, "do_sample": True}
    (copied / "generation_config.json").write_text(json.dumps(settings))
    llm = LLM(str(copied))
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=1)
    greedy = llm.generate("a", GREEDY, progress=False)[0].token_ids
    assert llm.generate("a", {"max_tokens": 12}, progress=False)[0].token_ids == greedy
    assert llm.generate("a", [{"max_tokens": 12, "temperature": 3.0}], progress=False)[0].token_ids == greedy
    drawn = SamplingParams(temperature=3.0, max_tokens=12, ignore_eos=True)  # says everything: no top_k
    assert llm.generate("a", drawn, progress=False)[0].token_ids != greedy
    with pytest.raises(ValueError, match="max_token"):
        llm.generate("a", {"max_token": 12}, progress=False)


def test_the_text_goes_on_after_the_prompts(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The space of a first word is part of the answer, with tokenizers that drop a text's own first space."""
    copied = Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))
    save(KINDS["sentencepiece"](), copied)
    llm = LLM(str(copied))
    word = llm.tokenizer.encode("true", add_special_tokens=False)
    params = {"max_tokens": len(word), "allowed_token_ids": word[:1], "ignore_eos": True}
    answer = llm.generate("Paris is", params, progress=False)[0]
    whole = llm.tokenizer.decode([*answer.prompt_token_ids, *answer.token_ids])
    assert whole == llm.tokenizer.decode(answer.prompt_token_ids) + answer.text
    assert answer.text.startswith(" ")


def test_the_tokenizers_end_ends_an_answer(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((copied / name).read_text()) | {"eos_token_id": 300}
        (copied / name).write_text(json.dumps(settings))
    llm = LLM(str(copied))
    only_the_end = {"max_tokens": 5, "allowed_token_ids": [256]}
    assert llm.generate("a", only_the_end, progress=False)[0].finish_reason == "stop"
    going_on = {**only_the_end, "ignore_eos": True}
    assert llm.generate("a", going_on, progress=False)[0].finish_reason == "length"
