"""The model in the package: its size, its files, and its answers to a handful of questions."""

from random import Random

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from minisgl.builtin import PATH, corpus, outside
from minisgl.builtin.chats import answers_of
from minisgl.builtin.evaluate import AIMS, Answerer, Score, measure, ways_to_ask

SOME = 50  # questions of a kind
PINNED = {
    "What is a radix cache?": "radix-cache",
    "Why do we need pages?": "why-pages",
    "What is continuous batching?": "continuous-batching",
    "Can I run Mini-SGLang without a GPU?": "without-a-gpu",
    "Which port does the server use?": "port",
    "Who are you?": "who-are-you",
    "Hello": "hello",
}


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(PATH, "cpu")


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in PATH.iterdir()) <= 12_000_000


def test_transformers_reads_the_tokenizer_as_it_was_trained() -> None:
    ours, theirs = Tokenizer.from_file(str(PATH / "tokenizer.json")), AutoTokenizer.from_pretrained(PATH)
    for entry in corpus.load():
        for text in (entry.answer, *entry.questions):
            assert theirs.encode(text) == ours.encode(text).ids


def test_it_answers_the_pinned_questions(answerer: Answerer) -> None:
    answers = {entry.key: entry.answer for entry in corpus.load()}
    got = answerer([[{"role": "user", "content": question}] for question in PINNED])
    assert got == [answers[key] for key in PINNED.values()]


def test_it_answers_however_one_types(answerer: Answerer) -> None:
    answer = next(entry.answer for entry in corpus.load() if entry.key == "radix-cache")
    typed = ["what is a radix cache", "Hi, can you explain the radix cache please", "whats a radx cache??"]
    assert answerer([[{"role": "user", "content": text}] for text in typed]) == [answer] * 3


def test_a_second_question_in_a_chat_gets_its_own_answer(answerer: Answerer) -> None:
    answers = {entry.key: entry.answer for entry in corpus.load()}
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": answers["hello"]},
        {"role": "user", "content": "What is a radix cache?"},
    ]
    assert answerer([chat]) == [answers["radix-cache"]]


@pytest.fixture(scope="module")
def scores(answerer: Answerer) -> dict[str, Score]:
    """Of some questions of each kind: `python -m minisgl.builtin.evaluate` asks all."""
    entries = corpus.load()
    ways = ways_to_ask(entries, corpus.load_held_out(entries), outside.load())
    some = {
        way: Random(0).sample(ways[way], min(SOME, len(ways[way])))
        for way in ("as it stands", *AIMS)
        if way in ways
    }
    return measure(answerer, some, answers_of(entries))


# Aims that are not reached yet, and what a model must keep: with all questions these are 88.5%, 75.9% and
# 88.8%. One that reaches an aim fails here, too: take it out then.
NOT_YET = {"held out": 0.80, "held-out follow-up": 0.65, "held-out outside": 0.80}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.xfail(reason="an aim not reached yet", strict=True))
        if way in NOT_YET
        else way
        for way in AIMS
    ],
)
def test_it_reaches_what_it_aims_at(scores: dict[str, Score], way: str) -> None:
    assert scores[way].share >= AIMS[way]


def test_it_does_not_fall_back(scores: dict[str, Score]) -> None:
    assert all(scores[way].share >= least for way, least in NOT_YET.items())
    assert all(part.ended == part.asked for part in scores.values()), "an answer without an end"
