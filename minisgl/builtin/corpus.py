"""The questions and answers that the built-in model learns, read from `corpus/*.toml`."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "corpus"
HELD_OUT = Path(__file__).parent / "held_out"


FOLLOW_UPS = ("why", "example")  # what can be asked about an answer: "And why is that?", "Give an example."


@dataclass(frozen=True)
class Entry:
    """One answer, the ways to ask for it, and answers to what can be asked next, by names of FOLLOW_UPS."""

    key: str
    questions: tuple[str, ...]
    answer: str
    follow_ups: Mapping[str, str] = field(default_factory=dict)


def normalise(question: str) -> str:
    """A question without case and punctuation: two that agree in this are the same."""
    return " ".join(re.findall(r"[^\W_]+", question.lower()))


def owners(entries: Sequence[Entry]) -> dict[str, str]:
    """The key that each normalised question belongs to."""
    return {normalise(question): entry.key for entry in entries for question in entry.questions}


@dataclass(frozen=True)
class HeldOut:
    """What is never trained on: the same questions in words of somebody who had not seen the corpus."""

    questions: tuple[tuple[str, str], ...] = ()  # (key of the entry, question)
    follow_ups: tuple[tuple[str, str], ...] = ()  # (name of FOLLOW_UPS, question)
    outside: tuple[str, ...] = ()

    @property
    def normalised(self) -> set[str]:
        asked = [question for _, question in (*self.questions, *self.follow_ups)]
        return set(map(normalise, [*asked, *self.outside]))


def load_held_out(entries: Sequence[Entry], folder: Path = HELD_OUT) -> HeldOut:
    """The files of `folder`: `questions.toml` by key of the entry, `follow_ups.toml` by name, `outside.toml`.

    Raises:
        ValueError: there is no such entry, or the corpus has a question as it stands.
    """
    questions, follow_ups, outside = (
        tomllib.loads((folder / f"{name}.toml").read_text("utf-8"))
        for name in ("questions", "follow_ups", "outside")
    )
    if unknown := set(questions) - {entry.key for entry in entries}:
        raise ValueError(f"questions.toml asks for entries that there are not: {', '.join(sorted(unknown))}")
    if unknown := set(follow_ups) - set(FOLLOW_UPS):
        raise ValueError(f"follow_ups.toml has {', '.join(sorted(unknown))}; there are {FOLLOW_UPS}")
    held_out = HeldOut(
        tuple((key, question) for key, asked in questions.items() for question in asked),
        tuple((name, question) for name, asked in follow_ups.items() for question in asked),
        tuple(outside["questions"]),
    )
    if known := held_out.normalised & set(owners(entries)):
        raise ValueError(f"held out, but in the corpus: {', '.join(sorted(known))}")
    return held_out


def load(folder: Path = FOLDER) -> list[Entry]:
    """All entries of all files, in the order of the files' names.

    Raises:
        ValueError: a field is missing, blank or of the wrong type; or a key or a question appears twice.
    """
    entries: dict[str, Entry] = {}
    asked: dict[str, str] = {}  # normalised question -> key
    for path in sorted(folder.glob("*.toml")):
        for raw in tomllib.loads(path.read_text("utf-8")).get("entry", []):
            where = f"{path.name}, entry {raw.get('key', 'without a key')!r}"
            entry = _entry(raw, where)
            if entry.key in entries:
                raise ValueError(f"{where}: an entry before it has this key")
            entries[entry.key] = entry
            for question in map(normalise, entry.questions):
                if question in asked:
                    raise ValueError(f"{where}: the question {question!r} is in {asked[question]!r} already")
                asked[question] = entry.key
    if not entries:
        raise ValueError(f"no [[entry]] in {folder}/*.toml")
    return list(entries.values())


def _entry(raw: dict[str, Any], where: str) -> Entry:
    """One entry of a file, checked; `where` names it in errors."""
    if set(raw) - set(FOLLOW_UPS) != {"key", "questions", "answer"}:
        raise ValueError(
            f"{where}: the fields are {sorted(raw)}, not key, questions, answer and any of {FOLLOW_UPS}"
        )
    if not isinstance(raw["questions"], list) or not raw["questions"]:
        raise ValueError(f"{where}: questions must be a list of at least one")
    follow_ups = {name: raw[name] for name in FOLLOW_UPS if name in raw}
    for text in (raw["key"], raw["answer"], *raw["questions"], *follow_ups.values()):
        if not isinstance(text, str) or not text or text != text.strip():
            raise ValueError(f"{where}: {text!r} is not a text without blanks around it")
        if "<|" in text:
            raise ValueError(f"{where}: {text!r} has <|, which begins the tokens between messages")
    return Entry(raw["key"], tuple(raw["questions"]), raw["answer"], follow_ups)
