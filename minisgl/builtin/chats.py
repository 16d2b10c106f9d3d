"""From the corpus to batches of tokens: the tokenizer, the chat template, the conversations to learn from."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

from minisgl.builtin import outside
from minisgl.builtin.corpus import FOLLOW_UPS, Entry, HeldOut, normalise, owners
from minisgl.builtin.outside import Kind
from minisgl.builtin.variations import cross_safely, vary, vary_safely

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
CONTEXT = 2048
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen's rule for splitting text before the merges: transformers insists on it for a model of type qwen3.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SYSTEM_PROMPTS = (
    *("", "You are a helpful assistant.", "You are a helpful AI assistant.", "You are a friendly chatbot."),
    *("Answer briefly.", "Be concise.", "You are an expert.", "You are Mini-SGLang's built-in model."),
    *("You answer questions about LLM serving.", "Explain things in simple words and keep answers short."),
)
_ASKED_NEXT_FILE = Path(__file__).with_name("asked_next.toml")
ASKED_NEXT: dict[str, list[str]] = tomllib.loads(_ASKED_NEXT_FILE.read_text("utf-8"))
NOTHING_MORE = (
    "That is all I know. Ask me about something else in LLM serving or in Mini-SGLang, "
    "or look into the lessons: they go deeper than I can."
)
_OUTSIDE = 0.3  # share of the questions that do not follow from an answer
_TURNS, _TURN_WEIGHTS = (1, 2, 3, 4, 8, 16), (8, 4, 3, 2, 2, 1)  # long chats are rare, but must work
# To find the right answer is harder to learn than to recite it. So in most batches no more of an answer is
# learned than its beginning, which tells it from the others, and more questions are asked: a chat's first, or
# its second or third, where the answers before stand in the chat and are not learned.
_KINDS = ("first", "second", "third", "whole")
_KIND_WEIGHTS, _BEGINNING = (8, 3, 2, 7), 12  # how often; tokens
_NEXT, _NEW = 0.5, 0.8  # how often something is asked next, and then something that was not asked before
_BARE = 0.01  # share of chats that begin with "why?", about nothing
_ALIKE = 4  # batches whose chats are sorted by length together, so that each has less padding


class Batch(NamedTuple):
    """Chats, and what to learn in them; all int64."""

    tokens: Tensor  # [chats, length] ids
    before: Tensor  # [learned] position in the flat chats before each token to learn
    targets: Tensor  # [learned] that token
    first: Tensor  # [answers] which of the learned are an answer's first
    keys: Tensor  # [answers] number of that answer, in the order of `answers_of`


def train_tokenizer(entries: Sequence[Entry], kinds: Sequence[Kind], vocabulary: int, seed: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens, from the answers and the questions as people type."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    rng = Random(seed)
    questions = [question for entry in entries for question in entry.questions]
    questions += [question for asked in ASKED_NEXT.values() for question in asked]
    questions += [outside.ask(kinds, rng) for _ in range(20 * len(kinds))]
    varied = [vary(question, rng) for question in questions]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    answers = list(answers_of(entries).values())
    roles = ["system", "user", "assistant"] * 1000  # as frequent as in chats, so that each is one token
    tokenizer.train_from_iterator([*answers, *questions, *varied, *roles], trainer)
    return tokenizer


def answers_of(entries: Sequence[Entry]) -> dict[str, str]:
    """Every answer there is by its key, which is `entry/why` for what is asked next."""
    answers = {outside.KEY: outside.ANSWER, "nothing-more": NOTHING_MORE}
    for entry in entries:
        answers[entry.key] = entry.answer
        answers |= {f"{entry.key}/{name}": answer for name, answer in entry.follow_ups.items()}
    return answers


class Chats(Dataset[Batch]):
    """Conversations of questions and answers, varied anew in every batch. Most questions are independent;
    some ask about an answer before, and some lie outside what there is to know.

    Batch `step` follows from the seed and `step` alone, so any number of workers makes the same batches.
    Each has about `answers` to learn, or twice as many where chats have one question and answers are cut. All
    its chats have equally many turns and are of like length, which keeps the padding small: the chats of
    `_ALIKE` batches are made together, sorted, and dealt out in steps that are `_ALIKE` apart.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        entries: Sequence[Entry],
        held_out: HeldOut,
        kinds: Sequence[Kind],
        answers: int,
        seed: int,
    ) -> None:
        self._tokenizer, self._answers, self._seed = tokenizer, answers, seed
        self._questions = {entry.key: entry.questions for entry in entries}
        self._keys = list(self._questions)
        self._answer_ids = {
            key: tokenizer.encode(answer + END).ids for key, answer in answers_of(entries).items()
        }
        self._numbers = {key: number for number, key in enumerate(self._answer_ids)}
        self._owners = owners(entries) | dict.fromkeys(held_out.normalised, "nobody here")
        self._kinds = kinds

    def __getitem__(self, step: int) -> Batch:
        period, place = divmod(step, _ALIKE**2)
        part, group = divmod(place, _ALIKE)
        rng = Random(f"{self._seed}/{period}/{group}")
        (kind,) = rng.choices(_KINDS, _KIND_WEIGHTS)
        most = None if kind == "whole" else _BEGINNING
        turns = rng.choices(_TURNS, _TURN_WEIGHTS)[0] if kind == "whole" else 1 + _KINDS.index(kind)
        count = {"first": 2 * self._answers, "whole": self._answers // turns}.get(kind, self._answers)
        together = [self._chat(turns, rng, most) for _ in range(_ALIKE * max(1, count))]
        together.sort(key=lambda chat: len(chat[0]))
        chats = together[len(together) * part // _ALIKE : len(together) * (part + 1) // _ALIKE]
        length = min(max(len(ids) for ids, _ in chats), CONTEXT)
        tokens = torch.zeros(len(chats), length, dtype=torch.long)  # PAD, on the right
        before: list[int] = []
        first: list[int] = []
        keys: list[int] = []
        for row, (ids, learned) in enumerate(chats):
            tokens[row, : len(ids)] = torch.tensor(ids[:length])
            for key, start, end in learned:
                if start < length:
                    first.append(len(before))
                    keys.append(key)
                    before += (row * length + i - 1 for i in range(start, min(end, length)))
        positions, firsts, numbers = (torch.tensor(x, dtype=torch.long) for x in (before, first, keys))
        return Batch(tokens, positions, tokens.flatten()[positions + 1], firsts, numbers)

    def _chat(
        self, turns: int, rng: Random, most: int | None
    ) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Token ids of a chat, and of each answer to learn its number, where it begins and where it ends, the
        mark at its end included. With `most`, it is the last answer alone, and no more tokens of it."""
        asked: list[tuple[str, str]] = []  # as typed, and the key of the answer
        if rng.random() < _BARE:
            asked.append((self._ask_next(rng.choice(FOLLOW_UPS), rng), "nothing-more"))
        while len(asked) < turns:
            asked += self._ask(turns - len(asked), rng)
        prompts = [f"\n{START}user\n{question}{END}\n{START}assistant\n" for question, _ in asked]
        prompts[0] = prompts[0][1:]  # the line break before a message ends the message before
        if most is None and rng.random() < 0.4:
            prompts[0] = f"{START}system\n{rng.choice(_SYSTEM_PROMPTS)}{END}\n{prompts[0]}"
        ids: list[int] = []
        learned: list[tuple[int, int, int]] = []
        for i, prompt in enumerate(self._tokenizer.encode_batch(prompts)):
            ids += prompt.ids
            key, last = asked[i][1], i + 1 == turns
            answer = self._answer_ids[key][: most if last else None]
            if not last and rng.random() < 0.1:  # cut short by the user: to be lived with, not learned
                answer = [*answer[: rng.randrange(len(answer))], answer[-1]]
            elif last or most is None:
                learned.append((self._numbers[key], len(ids), len(ids) + len(answer)))
            ids += answer
        return ids, learned

    def _ask(self, most: int, rng: Random) -> list[tuple[str, str]]:
        """A question as somebody types it and the key of its answer, and perhaps what is asked about it next:
        all of it about that answer, and what was asked before gets nothing more."""
        goes_on = most > 1 and rng.random() < _NEXT
        if self._kinds and rng.random() < _OUTSIDE:
            key = outside.KEY
            while normalise(question := outside.ask(self._kinds, rng)) in self._owners:
                pass
            typed = self._type(question, rng)
        else:
            key = rng.choice(self._keys)
            question = rng.choice(self._questions[key])
            if rng.random() < 0.4:
                typed = cross_safely(question, rng.choice(self._questions[key]), self._owners, rng)
            else:
                typed = vary_safely(question, self._owners, rng) if rng.random() < 0.8 else question
        asked = [(typed, key)]
        told: list[str] = []
        while goes_on:
            left = [name for name in FOLLOW_UPS if name not in told]
            name = rng.choice(left if left and rng.random() < _NEW else FOLLOW_UPS)
            known = name not in told and f"{key}/{name}" in self._answer_ids
            next_key = f"{key}/{name}" if known else "nothing-more"
            asked.append((self._ask_next(name, rng), next_key))
            told.append(name)
            goes_on = len(asked) < most and rng.random() < _NEXT
        return asked

    def _ask_next(self, name: str, rng: Random) -> str:
        return self._type(rng.choice(ASKED_NEXT[name]), rng)

    def _type(self, question: str, rng: Random) -> str:
        """Varied, but not so that it becomes a question of the corpus, or one that is held out."""
        varied = vary(question, rng) if rng.random() < 0.8 else question
        return question if normalise(varied) in self._owners else varied
