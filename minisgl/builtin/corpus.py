"""The questions and answers that the built-in model learns, read from `corpus/*.toml`."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Entry:
    """One answer and the ways to ask for it."""

    key: str
    questions: tuple[str, ...]
    answer: str


def normalise(question: str) -> str:
    """A question without case and punctuation: two that agree in this are the same."""
    return " ".join(re.findall(r"[a-z0-9]+", question.lower()))


def owners(entries: Sequence[Entry]) -> dict[str, str]:
    """The key that each normalised question belongs to."""
    return {normalise(question): entry.key for entry in entries for question in entry.questions}


def split(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The entries without the last question of each, and with nothing but it."""
    trained = [replace(entry, questions=entry.questions[:-1]) for entry in entries]
    return trained, [replace(entry, questions=entry.questions[-1:]) for entry in entries]


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
    if set(raw) != {"key", "questions", "answer"}:
        raise ValueError(f"{where}: the fields are {sorted(raw)}, not key, questions and answer")
    if not isinstance(raw["questions"], list) or not raw["questions"]:
        raise ValueError(f"{where}: questions must be a list of at least one")
    for text in (raw["key"], raw["answer"], *raw["questions"]):
        if not isinstance(text, str) or not text or text != text.strip():
            raise ValueError(f"{where}: {text!r} is not a text without blanks around it")
    return Entry(raw["key"], tuple(raw["questions"]), raw["answer"])
