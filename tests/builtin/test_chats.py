"""Variations, tokenizer and training batches."""

from collections import Counter
from random import Random

import pytest
import torch
from jinja2 import Template
from tokenizers import Tokenizer

from minisgl.builtin import chats as chats_module
from minisgl.builtin import corpus
from minisgl.builtin.chats import (
    ASKED_NEXT,
    END,
    NOTHING_MORE,
    START,
    TEMPLATE,
    Chats,
    answers_of,
    train_tokenizer,
)
from minisgl.builtin.corpus import FOLLOW_UPS, Entry, HeldOut, normalise, owners
from minisgl.builtin.outside import ANSWER, Kind
from minisgl.builtin.variations import vary, vary_safely

ENTRIES = [
    Entry(
        "radix",
        ("What is a radix cache?", "Explain the radix cache."),
        "A cache of prefixes.",
        {"why": "Prompts begin alike.", "example": "A system prompt."},
    ),
    Entry("seed", ("What does the seed do?", "seed?"), "It makes an answer repeatable: `seed=1`."),
    Entry("port", ("How do I change the port?", "which port"), "Use `--port 8000`."),
]
KINDS = [Kind("food", ("how do I cook {dish}?", "{dish} recipe"), {"dish": ["rice", "soup"]})]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(corpus.load(), KINDS, 2048, seed=0)


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
    assert train_tokenizer(corpus.load(), KINDS, 2048, seed=0).to_str() == tokenizer.to_str()


def test_batches_follow_from_seed_and_step(tokenizer: Tokenizer) -> None:
    def batches(seed: int) -> list[list[list[int]]]:
        chats = Chats(tokenizer, ENTRIES, HeldOut(), KINDS, answers=16, seed=seed)
        return [chats[step].tokens.tolist() for step in range(5)]

    assert batches(1) == batches(1) != batches(2)
    alike = Chats(tokenizer, ENTRIES, HeldOut(), KINDS, answers=16, seed=1)
    lengths = [alike[step].tokens.shape[1] for step in (1, 5, 9, 13)]  # made together and sorted
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[3]


@pytest.mark.parametrize(
    ("kind", "chats_of", "turns"), [("first", 32, 1), ("second", 16, 2), ("third", 16, 3)]
)
def test_a_brief_batch_learns_how_the_last_answer_begins(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str, chats_of: int, turns: int
) -> None:
    monkeypatch.setattr(chats_module, "_KIND_WEIGHTS", [name == kind for name in chats_module._KINDS])
    answers = list(answers_of(ENTRIES).values())
    batch = Chats(tokenizer, ENTRIES, HeldOut(), KINDS, answers=16, seed=0)[0]
    assert len(batch.tokens) == len(batch.first) == len(batch.keys) == chats_of
    assert torch.equal(batch.tokens.flatten()[batch.before + 1], batch.targets)
    rows = batch.before // batch.tokens.shape[1]
    for row, ids in enumerate(batch.tokens.tolist()):
        begun = tokenizer.encode(answers[batch.keys[row]] + END).ids[:12]
        assert batch.targets[rows == row].tolist() == begun == [i for i in ids if i][-len(begun) :]
        assert batch.first[row] == (rows == row).nonzero()[0]
        assert ids.count(tokenizer.token_to_id(START)) == 2 * turns
    if turns > 1:  # the first answer is all there, but where it was cut short
        texts = [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in batch.tokens]
        assert sum(text.split(f"{START}assistant\n")[1].split(END)[0] in answers for text in texts) >= 12


def test_answers_without_a_follow_up(tokenizer: Tokenizer) -> None:
    """What is asked next gets the same answer everywhere, then."""
    keys = list(answers_of(ENTRIES[1:]))
    chats = Chats(tokenizer, ENTRIES[1:], HeldOut(), [], answers=4, seed=0)
    learned = {keys[number] for step in range(20) for number in chats[step].keys}
    assert learned == {"seed", "port", "nothing-more"}


def test_a_batch_is_what_the_template_writes_and_learns_answers_only(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats_module, "_KIND_WEIGHTS", [name == "whole" for name in chats_module._KINDS])
    answers = {*answers_of(ENTRIES).values()}
    template = Template(TEMPLATE, keep_trailing_newline=True)
    chats = Chats(tokenizer, ENTRIES, HeldOut(), KINDS, answers=16, seed=0)
    for step in range(20):
        batch = chats[step]
        learned = tokenizer.decode(batch.targets.tolist(), skip_special_tokens=False).split(END)[:-1]
        assert set(learned) <= answers
        assert learned == [list(answers_of(ENTRIES).values())[key] for key in batch.keys]
        assert torch.equal(batch.tokens.flatten()[batch.before + 1], batch.targets)
        for row in batch.tokens.tolist():
            text = tokenizer.decode(row, skip_special_tokens=False).replace("<|endoftext|>", "")
            messages = []
            for part in text.removeprefix(START).removesuffix(END).split(f"{END}\n{START}"):
                role, content = part.split("\n", 1)
                messages.append({"role": role, "content": content})
            written = template.render(messages=messages).removesuffix("\n")
            assert written == text
            assert tokenizer.encode(written).ids == [i for i in row if i]  # the pieces join without a seam


def test_what_is_asked_next_is_about_the_last_answer_to_something_else(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question gets the answer that it should have where it stands; none that is held out is asked."""
    monkeypatch.setattr(chats_module, "vary", lambda question, rng: question)
    held_out = HeldOut((("port", "How do I change the port"),), (("why", "Why"),), ("rice recipe",))
    chats = Chats(tokenizer, ENTRIES, held_out, KINDS, answers=64, seed=0)
    by_question = {normalise(q): entry for entry in ENTRIES for q in entry.questions}
    next_questions = {normalise(q): name for name, asked in ASKED_NEXT.items() for q in asked}
    outside, nothing = Entry("outside", (), ANSWER), Entry("nothing", (), "")
    seen: Counter[str] = Counter()
    for step in range(160):
        for row in chats[step].tokens.tolist():
            text = tokenizer.decode(row, skip_special_tokens=False).replace("<|endoftext|>", "")
            turns = [part.split("\n", 1) for part in text.removeprefix(START).split(f"{END}\n{START}")]
            turns = turns[1:] if turns[0][0] == "system" else turns
            about: Entry | None = nothing
            told: list[str] = []
            for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True):
                asked, answer = normalise(question), answer.removesuffix(END)
                assert asked not in held_out.normalised or asked in (*by_question, *next_questions)
                if asked in next_questions and about is not None:
                    name = next_questions[asked]
                    wanted = NOTHING_MORE if name in told else about.follow_ups.get(name, NOTHING_MORE)
                    assert wanted.startswith(answer), "cut short at most"
                    told.append(name)
                    seen[f"{about.key}: {', '.join(told)}"] += 1
                else:
                    about, told = outside if answer == ANSWER else by_question.get(asked), []
                    assert about is None or about.answer.startswith(answer)
    chains = ["why", "example", "why, example", "example, why"]
    assert all(seen[f"{about}: {chain}"] for about in ("radix", "seed", "outside") for chain in chains)
    assert seen["nothing: why"]
    assert any(seen[f"radix: {name}, {name}"] for name in FOLLOW_UPS)  # the second time nothing more
