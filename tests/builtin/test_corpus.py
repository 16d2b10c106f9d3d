"""The corpus is what the built-in model's issue asks for, and a broken file is refused with its name."""

from pathlib import Path
from random import Random

import pytest

from minisgl.builtin import corpus, outside
from minisgl.builtin.chats import ASKED_NEXT

GOOD = '[[entry]]\nkey = "a"\nquestions = ["What is A?"]\nanswer = "A is a letter."\n'


def test_the_corpus_is_valid_and_large_enough() -> None:
    entries = corpus.load()
    assert len(entries) >= 400
    assert len({entry.answer for entry in entries}) == len(entries)
    for entry in entries:
        assert len(entry.questions) >= 12, entry.key
        assert "".join((entry.key, *entry.questions, entry.answer)).isascii(), entry.key


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no .*entry"),
        (GOOD + GOOD, "b.toml, entry 'a': an entry before it has this key"),
        (
            GOOD + GOOD.replace('"a"', '"b"').replace("A?", "a"),
            "entry 'b': the question 'what is a' is in",
        ),
        (GOOD.replace('["What is A?"]', '"What is A?"'), "entry 'a': questions must be a list"),
        (GOOD.replace('"What is A?"', ""), "entry 'a': questions must be a list of at least one"),
        (GOOD.replace("letter.", "letter. "), "entry 'a': 'A is a letter. ' is not a text without blanks"),
        (GOOD.replace("letter.", "<|letter|>."), "entry 'a': 'A is a .*' has .*, which begins"),
        (GOOD.replace("key", "name"), "entry 'without a key': the fields are"),
    ],
)
def test_a_broken_corpus_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        corpus.load(tmp_path)


def test_follow_ups_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD + 'why = "It begins the alphabet."\n')
    assert corpus.load(tmp_path)[0].follow_ups == {"why": "It begins the alphabet."}


def test_questions_in_any_script_stay_different() -> None:
    assert corpus.normalise("How's `--top_k`?") == corpus.normalise("how s TOP k") == "how s top k"
    assert len(set(map(corpus.normalise, ("你好", "привет", "¿Qué?", "que", "")))) == 5


def test_what_is_held_out_is_not_in_the_corpus() -> None:
    entries = corpus.load()
    held_out = corpus.load_held_out(entries)
    assert not held_out.normalised & set(corpus.owners(entries))
    assert not held_out.normalised & {corpus.normalise(q) for asked in ASKED_NEXT.values() for q in asked}
    templates = [template for kind in outside.load() for template in kind.templates if "{" not in template]
    assert not held_out.normalised & set(map(corpus.normalise, templates))
    assert {name for name, _ in held_out.follow_ups} == set(corpus.FOLLOW_UPS)


@pytest.mark.parametrize(
    ("questions", "follow_ups", "complaint"),
    [
        ('b = ["Which letter?"]', "", "asks for entries that there are not: b"),
        ('a = ["what is a"]', "", "held out, but in the corpus: what is a"),
        ("", 'because = ["so?"]', "follow_ups.toml has because"),
    ],
)
def test_a_broken_held_out_file_is_refused(
    tmp_path: Path, questions: str, follow_ups: str, complaint: str
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.toml").write_text(GOOD)
    (tmp_path / "questions.toml").write_text(questions)
    (tmp_path / "follow_ups.toml").write_text(follow_ups)
    (tmp_path / "outside.toml").write_text("questions = []")
    with pytest.raises(ValueError, match=complaint):
        corpus.load_held_out(corpus.load(tmp_path / "corpus"), tmp_path)


def test_every_kind_that_lies_outside_can_be_asked() -> None:
    owned = corpus.owners(corpus.load())
    kinds, rng = outside.load(), Random(0)
    assert len(kinds) >= 30
    for kind in kinds:
        for question in (kind.question(rng) for _ in range(50)):
            assert "{" not in question
            assert corpus.normalise(question) not in owned, f"{kind.name}: {question}"


def test_a_slot_without_fillers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "outside.toml"
    path.write_text('[[kind]]\nname = "food"\ntemplates = ["how do I cook {dish}?"]\n')
    with pytest.raises(ValueError, match=r"kind 'food': nothing for \['dish'\]"):
        outside.load(path)
