"""From the corpus to batches of tokens: the tokenizer, the chat template, the conversations to learn from."""

from collections.abc import Sequence
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

from minisgl.builtin.corpus import Entry, owners
from minisgl.builtin.variations import vary, vary_safely

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
_TURNS, _TURN_WEIGHTS = (1, 2, 3, 4, 8, 16), (8, 4, 3, 2, 2, 1)  # long chats are rare, but must work

Batch = tuple[Tensor, Tensor, Tensor]
"""Token ids `[chats, length]`; flat positions before the tokens to learn, and these tokens: `[learned]`."""


def train_tokenizer(entries: Sequence[Entry], vocabulary: int, seed: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens, from the answers and the questions as people type."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    rng = Random(seed)
    questions = [question for entry in entries for question in entry.questions]
    varied = [vary(question, rng) for question in questions]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    answers = [entry.answer for entry in entries]
    roles = ["system", "user", "assistant"] * 1000  # as frequent as in chats, so that each is one token
    tokenizer.train_from_iterator([*answers, *questions, *varied, *roles], trainer)
    return tokenizer


class Chats(Dataset[Batch]):
    """Conversations of independent questions and answers, varied anew in every batch.

    Batch `step` follows from the seed and `step` alone, so any number of workers makes the same batches.
    Each has about as many answers to learn; its chats have equally many turns, which keeps the padding small.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        entries: Sequence[Entry],
        held_out: Sequence[Entry],
        answers: int,
        seed: int,
    ) -> None:
        self._tokenizer, self._answers, self._seed = tokenizer, answers, seed
        self._asked = [(question, entry.key) for entry in entries for question in entry.questions]
        self._answer_ids = {entry.key: tokenizer.encode(entry.answer + END).ids for entry in entries}
        self._owners = owners(entries) | dict.fromkeys(owners(held_out), "nobody here")

    def __getitem__(self, step: int) -> Batch:
        rng = Random(f"{self._seed}/{step}")
        (turns,) = rng.choices(_TURNS, _TURN_WEIGHTS)
        chats = [self._chat(turns, rng) for _ in range(max(1, self._answers // turns))]
        length = min(max(len(ids) for ids, _ in chats), CONTEXT)
        tokens = torch.zeros(len(chats), length, dtype=torch.long)  # PAD, on the right
        where: list[int] = []
        for row, (ids, learned) in enumerate(chats):
            tokens[row, : len(ids)] = torch.tensor(ids[:length])
            where += [row * length + i - 1 for i in learned if i < length]
        before = torch.tensor(where)
        return tokens, before, tokens.flatten()[before + 1]

    def _chat(self, turns: int, rng: Random) -> tuple[list[int], list[int]]:
        """Token ids of a chat, and the indices of those to learn: the answers with the mark at their end."""
        asked = rng.choices(self._asked, k=turns)
        typed = [vary_safely(q, self._owners, rng) if rng.random() < 0.8 else q for q, _ in asked]
        prompts = [f"\n{START}user\n{question}{END}\n{START}assistant\n" for question in typed]
        prompts[0] = prompts[0][1:]  # the line break before a message ends the message before
        if rng.random() < 0.4:
            prompts[0] = f"{START}system\n{rng.choice(_SYSTEM_PROMPTS)}{END}\n{prompts[0]}"
        ids: list[int] = []
        learned: list[int] = []
        for i, prompt in enumerate(self._tokenizer.encode_batch(prompts)):
            ids += prompt.ids
            answer = self._answer_ids[asked[i][1]]
            if i + 1 < turns and rng.random() < 0.1:  # cut short by the user: to be lived with, not learned
                answer = [*answer[: rng.randrange(len(answer))], answer[-1]]
            else:
                learned += range(len(ids), len(ids) + len(answer))
            ids += answer
        return ids, learned
