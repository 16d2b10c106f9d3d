"""Asks the built-in model what it learned, and what it never saw, and counts the exact answers."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisgl.builtin import PATH, corpus, outside
from minisgl.builtin.chats import ASKED_NEXT, answers_of
from minisgl.builtin.corpus import FOLLOW_UPS, Entry, HeldOut, owners
from minisgl.builtin.outside import Kind
from minisgl.builtin.variations import vary_safely

AIMS = {  # the shares of exact answers that are good enough
    "held out": 0.90,
    "follow-up": 0.85,
    "held-out follow-up": 0.85,
    "second follow-up": 0.85,
    "held-out second follow-up": 0.85,
    "outside": 0.95,
    "held-out outside": 0.95,
    "at temperature 0.7": 0.90,
}

Chat = list[dict[str, str]]


class Answerer:
    """The model of a folder in bfloat16 on a GPU, or on the CPU in float32 from the same rounded weights."""

    def __init__(self, path: Path, device: str) -> None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self._batch = 1024 if dtype == torch.bfloat16 else 64

    def __call__(
        self, chats: Sequence[Chat], max_tokens: int = 160, temperature: float = 0.0
    ) -> list[str | None]:
        """The answer to each chat, greedy or sampled with a fixed seed; None where it does not end."""
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        torch.manual_seed(0)
        answers: list[str | None] = []
        end = self._tokenizer.eos_token_id
        for start in range(0, len(chats), self._batch):
            prompts: Any = self._tokenizer.apply_chat_template(
                chats[start : start + self._batch],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self._model.device)
            output = self._model.generate(
                **prompts, max_new_tokens=max_tokens, **(sampling or {"do_sample": False})
            )
            for ids in output[:, prompts["input_ids"].shape[1] :].tolist():
                answers.append(self._tokenizer.decode(ids[: ids.index(end)]) if end in ids else None)
        return answers


@dataclass(frozen=True)
class Case:
    """A chat that ends with a question, and the answer that it should get, by its key."""

    chat: Chat
    key: str


@dataclass
class Score:
    """How one way of asking went; a failure names the answer that came instead by its key, if it has one."""

    asked: int = 0
    exact: int = 0
    ended: int = 0
    failures: list[dict[str, str | None]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of exact answers."""
        return self.exact / self.asked


def ways_to_ask(
    entries: Sequence[Entry],
    held_out: HeldOut,
    kinds: Sequence[Kind],
    each: int | None = 1,
    seed: int = 1_000_003,
) -> dict[str, list[Case]]:
    """Of every entry `each` questions (None: all) as they stand, varied by rule, under a system prompt, and
    as a chat's third question; why and an example, at once and after each other; what lies outside; and
    questions, why and example, and what lies outside in words that are held out."""
    rng, owner = Random(seed), owners(entries)
    ways: dict[str, list[Case]] = {}
    unseen = {name: [asked for kind, asked in held_out.follow_ups if kind == name] for name in FOLLOW_UPS}

    def add(way: str, chat: Chat, key: str) -> None:
        ways.setdefault(way, []).append(Case(chat, key))

    for entry in entries:
        count = len(entry.questions)
        for question in rng.sample(entry.questions, count if each is None else min(each, count)):
            ask = _turn("user", question)
            before: Chat = []
            for other in rng.choices(entries, k=2):
                before += _turn("user", rng.choice(other.questions)) + _turn("assistant", other.answer)
            add("as it stands", ask, entry.key)
            add("varied", _turn("user", vary_safely(question, owner, rng)), entry.key)
            add("system prompt", _turn("system", "You are a helpful assistant.") + ask, entry.key)
            add("third question", before + ask, entry.key)
        for way, chat, key in _asked_next(entry, ASKED_NEXT, rng):
            add(way, chat, key)
        for way, chat, key in _asked_next(entry, unseen, rng):
            add(f"held-out {way}", chat, key)
    for kind in kinds:
        for _ in range(10):
            add("outside", _turn("user", kind.question(rng)), outside.KEY)
    for key, question in held_out.questions:
        add("held out", _turn("user", question), key)
    for question in held_out.outside:
        add("held-out outside", _turn("user", question), outside.KEY)
    return ways


def _asked_next(
    entry: Entry, asked: Mapping[str, Sequence[str]], rng: Random
) -> Iterator[tuple[str, Chat, str]]:
    """Why and an example of an answer, in words of `asked`, at once and after the other of the two: the way,
    the chat and the key of what should come."""
    answered = _turn("user", entry.questions[0]) + _turn("assistant", entry.answer)
    for name in filter(asked.get, entry.follow_ups):
        key, ask = f"{entry.key}/{name}", _turn("user", rng.choice(asked[name]))
        yield "follow-up", answered + ask, key
        for other in filter(asked.get, entry.follow_ups.keys() - {name}):
            between = _turn("user", rng.choice(asked[other]))
            between += _turn("assistant", entry.follow_ups[other])
            yield "second follow-up", answered + between + ask, key


def _turn(role: str, content: str) -> Chat:
    return [{"role": role, "content": content}]


def score(answered: Sequence[str | None], cases: Sequence[Case], answers: Mapping[str, str]) -> Score:
    """Compares each answer with that of the case's key."""
    keys = {answer: key for key, answer in answers.items()}
    result = Score(asked=len(cases))
    for case, answer in zip(cases, answered, strict=True):
        result.ended += answer is not None
        result.exact += answer == answers[case.key]
        if answer != answers[case.key]:
            got = answer and keys.get(answer, answer)
            result.failures.append({"question": case.chat[-1]["content"], "key": case.key, "got": got})
    return result


def measure(
    answerer: Answerer, ways: Mapping[str, Sequence[Case]], answers: Mapping[str, str]
) -> dict[str, Score]:
    """The scores of all `ways` to ask, and of the questions as they stand at a temperature of 0.7."""
    scores = {
        way: score(answerer([case.chat for case in cases]), cases, answers) for way, cases in ways.items()
    }
    plain = ways["as it stands"]
    warm = answerer([case.chat for case in plain], temperature=0.7)
    return scores | {"at temperature 0.7": score(warm, plain, answers)}


def digest(path: Path) -> str:
    """SHA-256 of a model's weights, tokenizer and chat template, to tell of which model scores are."""
    files = (path / name for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def show(scores: Mapping[str, Score]) -> bool:
    """Prints a table and some failures. Returns whether every aim is reached."""
    print(f"{'asked':<28}{'questions':>10}{'exact':>8}{'aim':>8}{'ended':>8}")
    for way, part in scores.items():
        aim = f"{AIMS[way]:.0%}" if way in AIMS else ""
        print(f"{way:<28}{part.asked:>10}{part.share:>8.1%}{aim:>8}{part.ended / part.asked:>8.1%}")
    for way, part in scores.items():
        for failure in part.failures[:10]:
            print(f"{way}: {failure['question']!r} ({failure['key']}) got {failure['got']!r}")
    missed = [way for way, aim in AIMS.items() if way in scores and scores[way].share < aim]
    endless = [way for way, part in scores.items() if part.ended < part.asked]
    for about, found in (("too few exact answers", missed), ("answers without an end", endless)):
        if found:
            print(f"{about}: {', '.join(found)}")
    return not missed and not endless


def main() -> int:
    """Prints the table, and writes the scores with all failures as JSON if asked. 1 if an aim is missed."""
    parser = argparse.ArgumentParser(prog="python -m minisgl.builtin.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=PATH, help="folder of the model (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", action="store_true", help="all questions of the corpus, not one an entry")
    parser.add_argument("--json", type=Path, help="file to write the scores and all failures to")
    args = parser.parse_args()
    entries = corpus.load()
    held_out, kinds = corpus.load_held_out(entries), outside.load()
    ways = ways_to_ask(entries, held_out, kinds, None if args.every else 1)
    scores = measure(Answerer(args.model, args.device), ways, answers_of(entries))
    good = show(scores)
    if args.json:
        results = [{"way": way} | asdict(part) for way, part in scores.items()]
        found = {"sha256": digest(args.model), "results": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
