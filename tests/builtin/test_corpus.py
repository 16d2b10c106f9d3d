"""The corpus is what the built-in model's issue asks for, and a broken file is refused with its name."""

from pathlib import Path

import pytest

from minisgl.builtin import corpus

GOOD = '[[entry]]\nkey = "a"\nquestions = ["What is A?"]\nanswer = "A is a letter."\n'


def test_the_corpus_is_valid_and_large_enough() -> None:
    entries = corpus.load()
    assert len(entries) >= 100
    assert len({entry.answer for entry in entries}) == len(entries)
    for entry in entries:
        assert len(entry.questions) >= 2, entry.key
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
        (GOOD.replace("key", "name"), "entry 'without a key': the fields are"),
    ],
)
def test_a_broken_corpus_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        corpus.load(tmp_path)


def test_split_holds_out_the_last_question() -> None:
    entry = corpus.Entry("a", ("One?", "Two?", "Three?"), "Yes.")
    trained, held_out = corpus.split([entry])
    assert trained[0].questions == ("One?", "Two?")
    assert held_out[0].questions == ("Three?",)
