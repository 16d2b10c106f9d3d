"""Asks the built-in model every question of its corpus and counts the exact answers."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisgl.builtin import PATH, corpus
from minisgl.builtin.corpus import Entry, owners
from minisgl.builtin.variations import vary_safely

Chat = list[dict[str, str]]


class Answerer:
    """The model of a folder in bfloat16 on a GPU, or on the CPU in float32 from the same rounded weights."""

    def __init__(self, path: Path, device: str) -> None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self._batch = 1024 if dtype == torch.bfloat16 else 64

    def __call__(self, chats: Sequence[Chat], max_tokens: int = 160) -> list[str | None]:
        """The greedy answer to each chat; None where it does not end by itself."""
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
            output = self._model.generate(**prompts, do_sample=False, max_new_tokens=max_tokens)
            for ids in output[:, prompts["input_ids"].shape[1] :].tolist():
                answers.append(self._tokenizer.decode(ids[: ids.index(end)]) if end in ids else None)
        return answers


@dataclass
class Score:
    """How one way of asking went; a failure names the entry whose answer came instead, if it was one."""

    asked: int = 0
    exact: int = 0
    ended: int = 0
    failures: list[dict[str, str | None]] = field(default_factory=list)


def ways_to_ask(entries: Sequence[Entry], seed: int = 1_000_003) -> dict[str, list[tuple[Entry, Chat]]]:
    """Every question as it stands, varied by rule, under a system prompt, and as a chat's third question."""
    rng, owner = Random(seed), owners(entries)
    ways: dict[str, list[tuple[Entry, Chat]]] = {}
    for entry in entries:
        for question in entry.questions:
            ask = _turn("user", question)
            before: Chat = []
            for other in rng.choices(entries, k=2):
                before += _turn("user", rng.choice(other.questions)) + _turn("assistant", other.answer)
            chats = {
                "as it stands": ask,
                "varied": _turn("user", vary_safely(question, owner, rng)),
                "system prompt": _turn("system", "You are a helpful assistant.") + ask,
                "third question": before + ask,
            }
            for way, chat in chats.items():
                ways.setdefault(way, []).append((entry, chat))
    return ways


def _turn(role: str, content: str) -> Chat:
    return [{"role": role, "content": content}]


def score(answerer: Answerer, asked: Sequence[tuple[Entry, Chat]]) -> Score:
    """Compares each answer with that of the entry."""
    keys = {entry.answer: entry.key for entry, _ in asked}
    result = Score(asked=len(asked))
    for (entry, chat), answer in zip(asked, answerer([chat for _, chat in asked]), strict=True):
        result.ended += answer is not None
        result.exact += answer == entry.answer
        if answer != entry.answer:
            got = answer and keys.get(answer, answer)
            result.failures.append({"question": chat[-1]["content"], "key": entry.key, "got": got})
    return result


def report(path: Path, entries: Sequence[Entry], held_out: Sequence[Entry], device: str) -> dict[str, Score]:
    """Prints a table of all ways to ask, and their first failures."""
    ways = ways_to_ask(entries)
    if held_out:
        ways["held out"] = ways_to_ask(held_out)["as it stands"]
    answerer = Answerer(path, device)
    scores = {way: score(answerer, asked) for way, asked in ways.items()}
    print(f"{'asked':<16}{'questions':>10}{'exact':>8}{'ended':>8}")
    for way, part in scores.items():
        print(f"{way:<16}{part.asked:>10}{part.exact / part.asked:>8.1%}{part.ended / part.asked:>8.1%}")
    for way, part in scores.items():
        for failure in part.failures[:20]:
            print(f"{way}: {failure['question']!r} ({failure['key']}) got {failure['got']!r}")
    return scores


def main() -> None:
    """Prints the table, and writes the scores with all failures as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m minisgl.builtin.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=PATH, help="folder of the model (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write the scores and all failures to")
    args = parser.parse_args()
    scores = report(args.model, corpus.load(), [], args.device)
    if args.json:
        text = json.dumps({way: asdict(part) for way, part in scores.items()}, indent=1)
        args.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
