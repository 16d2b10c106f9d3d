"""Tokens that arrive one by one become text: never half a character, and in the end what `decode` says."""

import codecs
from collections.abc import Sequence
from itertools import islice

from stages.stage1_naive.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so at most as many byte-level tokens
_HELD_BYTES = 16  # of a run of <0x..> tokens: a reader waits no longer to see whole characters


class Detokenizer:
    """One request's text: what `decode` writes for all of its tokens together, after the prompt's.

    A token's text depends on its neighbours: a space before a word, bytes of one character spread over
    tokens, a byte-level token that ends one character and begins the next. So each step decodes a short
    window that begins with a token whose text has left already, and emits what is certain.

    Tokens that stand for one byte (byte fallback, in sentencepiece-like vocabularies) are text only if the
    whole run of them is UTF-8: else `decode` writes U+FFFD for each. Such a run is held until it ends or is
    long.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # tokens with text, of which all but the last few have left
        self._sent = 0  # characters of the window's text that have left
        self._run: list[tuple[int, str]] = []  # tokens held as part of a run of bytes, and what each adds
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._broken = False  # whether this run of bytes is known not to be UTF-8
        ends = (token_id for token_id in reversed(prompt) if not self._is_silent(token_id))
        for token_id in reversed(list(islice(ends, 2 * _LONGEST_CHARACTER))):
            self.push(token_id)
        self._run = []  # what the prompt shows is not shown again
        self._sent = len(tokenizer.decode(self._window, False))

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        return "".join(self.settle(token_id))

    def settle(self, token_id: int) -> list[str]:
        """As `push`, but what each token adds: first those of earlier calls that were held, then this one. A
        token that is held itself comes with a later call."""
        if (byte := self._tokenizer.byte(token_id)) is not None:
            return self._push_byte(token_id, byte)
        if self._is_silent(token_id):  # it does not even end a run of bytes
            if not self._run:
                return [""]
            self._run.append((token_id, ""))
            return []
        texts = self._end_run()
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window, False)
        certain = text.removesuffix(_REPLACEMENT)  # its last character may be incomplete
        texts.append(certain[self._sent :])
        self._sent = max(self._sent, len(certain))
        if self._sent == len(text):
            self._restart(token_id)
        elif len(self._window) > 2 * _LONGEST_CHARACTER:  # bytes that never become a character
            del self._window[:-_LONGEST_CHARACTER]
            self._sent = len(self._tokenizer.decode(self._window, False)) - 1
        return texts

    def peek(self, token_id: int) -> str:
        """What `token_id` would add if it came next; a special token shows its name."""
        if (byte := self._tokenizer.byte(token_id)) is not None:
            pending = self._utf8.getstate()[0] + bytes([byte])
            return _REPLACEMENT if self._broken else pending.decode(errors="ignore")
        if self._is_silent(token_id):
            return self._tokenizer.token(token_id)
        text = self._tokenizer.decode([*self._window, token_id], False)
        return text.removesuffix(_REPLACEMENT)[self._sent :]

    def finish(self) -> list[str]:
        """What is left at the end, as `settle` says it; a last text more belongs to the newest token. An
        incomplete character becomes U+FFFD, as often as `decode` writes it."""
        texts = self._end_run()
        rest = self._tokenizer.decode(self._window, False)[self._sent :]
        self._sent += len(rest)
        return [*texts, rest] if rest else texts

    def flush(self) -> str:
        """`finish` in one piece."""
        return "".join(self.finish())

    def _is_silent(self, token_id: int) -> bool:
        skipped = self._skip_special_tokens and self._tokenizer.is_special(token_id)
        return skipped or not self._tokenizer.is_known(token_id)

    def _restart(self, token_id: int) -> None:
        """Let the window begin with a token all of whose text has left."""
        self._window = [token_id]
        self._sent = self._tokenizer.length(token_id)

    def _push_byte(self, token_id: int, byte: int) -> list[str]:
        try:
            text = _REPLACEMENT if self._broken else self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            text, self._broken = _REPLACEMENT, True
        if not self._window:  # the text's very first token: a decoder may drop a space there
            text = text and self._tokenizer.token(token_id)
            self._restart(token_id)
        self._run.append((token_id, text))
        whole = text and len(self._run) >= _HELD_BYTES
        return self._take_run() if self._broken or whole else []

    def _take_run(self) -> list[str]:
        """What each held token adds."""
        broken = self._broken
        texts = [
            _REPLACEMENT if broken and self._tokenizer.byte(token_id) is not None else text
            for token_id, text in self._run
        ]
        self._run = []
        return texts

    def _end_run(self) -> list[str]:
        self._broken = self._broken or bool(self._utf8.getstate()[0])  # ended within a character
        texts = self._take_run()
        self._broken = False
        self._utf8.reset()
        return texts
