"""Variations, tokenizer and training batches."""

from random import Random

import pytest
import torch
from jinja2 import Template
from tokenizers import Tokenizer

from minisgl.builtin import corpus
from minisgl.builtin.chats import END, START, TEMPLATE, Chats, train_tokenizer
from minisgl.builtin.corpus import Entry, normalise, owners
from minisgl.builtin.variations import vary, vary_safely

ENTRIES = [
    Entry("radix", ("What is a radix cache?", "Explain the radix cache."), "A cache of prefixes."),
    Entry("seed", ("What does the seed do?", "seed?"), "It makes an answer repeatable: `seed=1`."),
    Entry("port", ("How do I change the port?", "which port"), "Use `--port 8000`."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(corpus.load(), 2048, seed=0)


def test_variations_depend_on_the_seed_alone() -> None:
    questions = [question for entry in ENTRIES for question in entry.questions] * 20
    first, second = ([vary(question, rng) for question in questions] for rng in (Random(7), Random(7)))
    assert first == second
    assert len(set(first)) > len(set(questions)) * 5
    assert all(text and text == text.strip() for text in first)


def test_a_variation_is_never_another_entrys_question() -> None:
    owner, rng = owners(ENTRIES) | {normalise("define radix cache"): "held out"}, Random(0)
    for question, key in [(question, entry.key) for entry in ENTRIES for question in entry.questions] * 300:
        varied = normalise(vary_safely(question, owner, rng))
        assert owner.get(varied, key) == key


def test_the_tokenizer_round_trips_every_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in ("<|endoftext|>", START, END)] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 2048
    for entry in corpus.load():
        for text in (entry.answer, *entry.questions):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for text in ("größer, 你好 🙂", "a\n\tb  c\r\n", "x" * 300):  # what users type may be anything
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_tokenizer_is_reproducible(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(corpus.load(), 2048, seed=0).to_str() == tokenizer.to_str()


def test_batches_follow_from_seed_and_step(tokenizer: Tokenizer) -> None:
    def batches(seed: int) -> list[list[list[int]]]:
        chats = Chats(tokenizer, ENTRIES, [], answers=16, seed=seed)
        return [chats[step][0].tolist() for step in range(5)]

    assert batches(1) == batches(1) != batches(2)


def test_a_batch_is_what_the_template_writes_and_learns_answers_only(tokenizer: Tokenizer) -> None:
    answers = {entry.answer for entry in ENTRIES}
    template = Template(TEMPLATE, keep_trailing_newline=True)
    chats = Chats(tokenizer, ENTRIES, [], answers=16, seed=0)
    for step in range(20):
        tokens, before, targets = chats[step]
        learned = tokenizer.decode(targets.tolist(), skip_special_tokens=False).split(END)[:-1]
        assert set(learned) <= answers
        assert torch.equal(tokens.flatten()[before + 1], targets)
        for row in tokens.tolist():
            text = tokenizer.decode(row, skip_special_tokens=False).replace("<|endoftext|>", "")
            messages = []
            for part in text.removeprefix(START).removesuffix(END).split(f"{END}\n{START}"):
                role, content = part.split("\n", 1)
                messages.append({"role": role, "content": content})
            written = template.render(messages=messages).removesuffix("\n")
            assert written == text
            assert tokenizer.encode(written).ids == [i for i in row if i]  # the pieces join without a seam
