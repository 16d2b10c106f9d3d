"""Questions about anything else, made from patterns, and the one answer to all of them."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

FILE = Path(__file__).with_name("outside.toml")
KEY = "outside"
ANSWER = (
    "That lies outside what I know. I am a tiny model for LLM serving and for Mini-SGLang: "
    "ask me what a radix cache is, or how to start the server."
)
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Kind:
    """One kind of question: patterns such as "how do I cook {dish}?", and what may stand in each slot."""

    name: str
    templates: tuple[str, ...]
    slots: dict[str, list[str]]

    def question(self, rng: Random) -> str:
        return _SLOT.sub(lambda slot: rng.choice(self.slots[slot[1]]), rng.choice(self.templates))


def ask(kinds: Sequence[Kind], rng: Random) -> str:
    """A question of any kind, all their patterns as often."""
    (kind,) = rng.choices(kinds, [len(kind.templates) for kind in kinds])
    return kind.question(rng)


def load(path: Path = FILE) -> list[Kind]:
    """All kinds of a file.

    Raises:
        ValueError: a pattern has a slot without fillers, or a kind has no pattern.
    """
    kinds = [
        Kind(raw["name"], tuple(raw["templates"]), raw.get("slots", {}))
        for raw in tomllib.loads(path.read_text("utf-8"))["kind"]
    ]
    for kind in kinds:
        empty = {slot for template in kind.templates for slot in _SLOT.findall(template)} - {
            name for name, fillers in kind.slots.items() if fillers
        }
        if empty or not kind.templates:
            raise ValueError(f"{path.name}, kind {kind.name!r}: nothing for {sorted(empty) or 'templates'}")
    return kinds
