"""Text to token ids and back: the only module that knows both."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, as the chat template wants it


class Tokenizer:
    """A Hugging Face tokenizer folder: encode, chat template, decode.

    Raises:
        ValueError: the folder holds no tokenizer that can be loaded.
    """

    def __init__(self, path: Path) -> None:
        from transformers import PreTrainedTokenizerFast  # takes seconds: not before a tokenizer is wanted

        # This class reads tokenizer.json as it is. AutoTokenizer takes the class that the folder names, which
        # may put another normalizer and another regular expression in the place of the file's: up to
        # transformers 5.24 that costs some models the spaces of their prompts.
        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(
                path, clean_up_tokenization_spaces=False
            )
            backend = self._backend = self._tokenizer.backend_tokenizer
            backend.no_truncation()  # tokenizer.json may ask for both, left from the model's training
            backend.no_padding()
            vocabulary = backend.get_vocab(with_added_tokens=True)
            decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
            eos = self._tokenizer.eos_token_id
        except Exception as error:  # a broken file fails in as many ways as there are fields in it
            raise ValueError(
                f"no fast tokenizer (tokenizer.json) could be loaded from {path}: {error}"
            ) from error
        self.has_chat_template = self._tokenizer.chat_template is not None
        self.longest_token = max(
            map(len, vocabulary), default=1
        )  # characters; a text is at most as many a token
        self.eos_token_ids: tuple[int, ...] = (
            () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        )
        self._lengths: dict[int, int] = {}
        self._known = frozenset(token_id for name, token_id in vocabulary.items() if name)
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
        self._is_byte_level = "ByteLevel" in kinds
        names = {f"<0x{byte:02X}>": byte for byte in range(256)} if "ByteFallback" in kinds else {}
        self._byte_of = {vocabulary[name]: byte for name, byte in names.items() if name in vocabulary}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own prefix (BOS) where it has one.

        Safe to call from several threads: the backend is only read. It lets go of the interpreter lock
        meanwhile, which the backend's own `encode` of one text would hold.

        Raises:
            ValueError: the text has half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason}") from error
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def chat(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation, ending where the answer begins. Raises what `render` does."""
        return self.encode(self.render(messages, **template_kwargs), add_special_tokens=False)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The text of a conversation, special tokens written out. It ends where the assistant's answer
        begins, or with `continue_final_message` within the last message, which the answer continues.

        Raises:
            ValueError: the model has no chat template, or its template refuses these messages.
        """
        if not self.has_chat_template:
            raise ValueError("this model has no chat template; use plain completions instead")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **template_kwargs,
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return text

    def bad_words_ids(self, words: Iterable[str]) -> list[list[int]]:
        """The token ids of each word as it stands at the beginning of a text and after a space.

        Raises:
            ValueError: a word is empty or not valid Unicode.
        """
        ids = []
        for word in words:
            if not word:
                raise ValueError("a word must not be empty")
            for text in dict.fromkeys((word, f" {word.lstrip()}")):
                if (found := self.encode(text, add_special_tokens=False)) not in ids:
                    ids.append(found)
        return [found for found in ids if found]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids the vocabulary lacks are left out."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str:
        """The text of one token by itself, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)

    def length(self, token_id: int) -> int:
        """Characters of one token by itself; remembered, as it is asked for each that is generated."""
        if token_id not in self._lengths:
            self._lengths[token_id] = len(self.token(token_id))
        return self._lengths[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a mark (an end, a turn) and no text."""
        return token_id in self._special

    def is_known(self, token_id: int) -> bool:
        """Whether the vocabulary has text for this id; a model may have more ids than its tokenizer."""
        return token_id in self._known

    def byte(self, token_id: int) -> int | None:
        """The byte that a token of a byte-fallback vocabulary stands for; None for others."""
        return self._byte_of.get(token_id)

    def bytes_of(self, token_id: int, text: str) -> bytes:
        """The bytes that a token adds where it adds `text`: its own ones if it may be part of a character."""
        if token_id in self._byte_of:
            return bytes([self._byte_of[token_id]])
        name = self._backend.id_to_token(token_id) or ""
        if self._is_byte_level and not self.is_special(token_id) and _BYTES.keys() >= set(name):
            return bytes(_BYTES[character] for character in name)
        return text.encode()


def _byte_level() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2, Radford et al. 2019): printable
    ones for themselves, and those from U+0100 on for the rest, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_level()
