"""Text to token ids and back: the only module that knows both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, as the chat template wants it

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so at most as many byte-level tokens


class Tokenizer:
    """A Hugging Face tokenizer folder: encode, chat template, decode.

    Raises:
        ValueError: the folder holds no tokenizer that can be loaded.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer  # takes seconds: not before a tokenizer is wanted

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, clean_up_tokenization_spaces=False)
            self._backend = self._tokenizer.backend_tokenizer
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"no fast tokenizer (tokenizer.json) could be loaded from {path}: {error}"
            ) from error
        self.has_chat_template = self._tokenizer.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own prefix (BOS) where it has one.

        Safe to call from several threads: the backend is only read.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def chat(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins.

        Raises:
            ValueError: the model has no chat template, or its template refuses these messages.
        """
        if not self.has_chat_template:
            raise ValueError("this model has no chat template; use plain completions instead")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **template_kwargs
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)  # the template wrote them already

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, without special tokens. Ids the vocabulary lacks are left out."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """The text of one token by itself, special tokens included (for lists of log-probabilities)."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text


class Detokenizer:
    """Turns one request's tokens into text as they arrive, never half a character.

    A token's text depends on its neighbours (a space before a word, bytes of one character spread over
    tokens), so each step decodes a short window twice, with and without the new tokens, and emits the
    difference. The window begins at the tokens emitted last, which keeps the whole linear in the length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0  # how many tokens of the window have left as text already

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._window.append(token_id)
        for held in range(_LONGEST_CHARACTER):  # the last tokens may be the start of a character
            cut = len(self._window) - held
            if cut <= self._emitted:
                return ""
            text = self._tokenizer.decode(self._window[:cut])
            if not text.endswith(_REPLACEMENT):
                break
        return self._emit(cut, text)  # without a break: no character is that long, the bytes are invalid

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        return self._emit(len(self._window), self._tokenizer.decode(self._window))

    def _emit(self, cut: int, text: str) -> str:
        new = text[len(self._tokenizer.decode(self._window[: self._emitted])) :]
        if new:
            del self._window[: self._emitted]
            self._emitted = cut - self._emitted
        else:  # tokens without text, special ones: forget them, the neighbour is the token before
            del self._window[self._emitted : cut]
        return new
