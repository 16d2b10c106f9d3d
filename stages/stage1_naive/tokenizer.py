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
            self._backend.no_truncation()  # tokenizer.json may ask for both, left from the model's training
            self._backend.no_padding()
        except Exception as error:  # a broken file fails in as many ways as there are fields in it
            raise ValueError(
                f"no fast tokenizer (tokenizer.json) could be loaded from {path}: {error}"
            ) from error
        self.has_chat_template = self._tokenizer.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own prefix (BOS) where it has one.

        Safe to call from several threads: the backend is only read.

        Raises:
            ValueError: the text has half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason}") from error
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
    tokens, a byte-level token that ends one character and begins the next), so each step decodes a short
    window and emits what is certain and not yet sent. The window begins at tokens sent already, which keeps
    the whole linear in the length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that have left already
        self._clean = 0  # tokens of the window that end with a whole character, so that all of them are sent

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if not text.endswith(_REPLACEMENT):
            return self._emit(text, text)
        if not self._tokenizer.decode(self._window[-_LONGEST_CHARACTER:]):  # no bytes came after these
            return self._emit(text, text)
        if len(self._window) - self._clean < _LONGEST_CHARACTER:  # these bytes may become a character
            return self._emit(text, text.rstrip(_REPLACEMENT))
        return self._emit(text, text[:-1])  # all but the last will not: they are invalid, or whole

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        text = self._tokenizer.decode(self._window)
        return self._emit(text, text)

    def _emit(self, text: str, certain: str) -> str:
        new = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        whole = self._sent == len(text)
        if whole and new:  # what came before this text is not needed any more
            self._shorten(text, self._clean)
        elif len(self._window) > 2 * _LONGEST_CHARACTER:  # tokens without text, or invalid bytes
            self._shorten(text, _LONGEST_CHARACTER)
        if whole:
            self._clean = len(self._window)
        return new

    def _shorten(self, text: str, count: int) -> None:
        """Drop the first tokens. Texts are compared from their ends: a beginning may decode otherwise."""
        unsent = len(text) - self._sent
        del self._window[:count]
        self._sent = len(self._tokenizer.decode(self._window)) - unsent
        self._clean = max(0, self._clean - count)
