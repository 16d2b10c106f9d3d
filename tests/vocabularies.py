"""Tokenizer folders of the kinds that models have, trained on a few lines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.stage1_naive.tokenizer import Tokenizer

LINES = [
    "Paris is the capital of France.",
    "true or false, it is true",
    "a café, naïve: über",
    "x = (true)\n",
] * 4
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(dummy_space: bool = True) -> Any:
    """As Llama 2 and Mistral: "▁" is a space, one is put before the text and dropped again, and bytes are
    tokens of their own. As Gemma without the `dummy_space`."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[*special, *BYTE_TOKENS], show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    model = backend.model
    backend = Backend(model)  # byte tokens are ordinary ones
    backend.add_special_tokens(special)
    steps = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if dummy_space else steps)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if dummy_space else parts)
    return backend


def byte_level() -> Any:
    """As GPT-2, Llama 3 and Qwen: BPE over bytes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    return backend


def metaspace() -> Any:
    """As T5: a unigram model whose decoder joins words at "▁"."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return backend


def wordpiece() -> Any:
    """As BERT: "##" goes on with a word."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[PAD]"], show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return backend


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece without a dummy space": lambda: sentencepiece(dummy_space=False),
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}


def save(backend: Any, path: Path, **settings: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(path)
    return path


def pieces(path: Path, texts: Sequence[bytes]) -> tuple[Tokenizer, list[int]]:
    """A byte-level vocabulary of any pieces, wherever characters begin, and the ids that spell `texts`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    names = ["".join(alphabet[byte] for byte in text) for text in texts]
    ids = {name: i for i, name in enumerate(dict.fromkeys(names))}
    backend = Backend(models.WordLevel(ids, unk_token=""))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(save(backend, path)), [ids[name] for name in names]
