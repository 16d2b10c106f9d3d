"""Text that arrives token by token must be the text of all tokens, and never hold half a character."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from stages.stage1_naive.tokenizer import Detokenizer
from tests.checkpoints import EOS, byte_tokenizer

MARK = EOS + 1
HALF = "\ufffd"

# Characters of one to four bytes, those that join with their neighbours among them, and U+FFFD itself.
SPECIMENS = [
    "a",
    " ",
    "\n",
    "é",
    "e\u0301",
    "ß",
    "漢",
    "字",
    "한",
    "👍🏽",
    "👩‍👩‍👧",
    "🇳🇱",
    "\u202e",
    "\x00",
    "\U0001d518",
    "ﷺ",
]
TEXTS = st.lists(st.one_of(st.sampled_from(SPECIMENS), st.characters(codec="utf-8"))).map("".join)
VALID = TEXTS.filter(lambda text: HALF not in text)


class Backed:
    """`Tokenizer.decode` over any `tokenizers` backend; it counts what it is asked."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.asked: list[int] = []

    def decode(self, token_ids: Sequence[int]) -> str:
        self.asked.append(len(token_ids))
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=True)
        return text


class Chunks:
    """A byte-level vocabulary of arbitrary pieces: token i is `pieces[i]`, wherever characters begin."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in token_ids).decode("utf-8", errors="replace")


def sentencepiece() -> Any:
    """As Llama 2 and Mistral decode: "▁" is a space, <0x..> a byte, and the first space is dropped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁a", "b", "▁é", "漢"]
    backend = Backend(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


BYTES = byte_tokenizer().backend_tokenizer
SENTENCEPIECE = sentencepiece()


def stream(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """What each push gives, and the flush."""
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def byte_ids(data: bytes) -> list[int]:
    """The ids of `byte_tokenizer`: it numbers the characters that GPT-2's table gives to the bytes, sorted.
    Printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    ids = {byte: i for i, byte in enumerate([*printable, *others])}
    return [ids[byte] for byte in data]


@given(VALID)
def test_valid_text_arrives_whole(text: str) -> None:
    parts = stream(Backed(BYTES), byte_ids(text.encode()))
    assert "".join(parts) == text
    assert not any(HALF in part for part in parts)


@given(TEXTS)
def test_a_character_is_sent_with_its_last_byte(text: str) -> None:
    """Not later: the reader sees what there is. (U+FFFD itself may wait for its successor.)"""
    sent = iter(stream(Backed(BYTES), byte_ids(text.encode())))
    for character in text:
        *halves, last = (next(sent) for _ in character.encode())
        if HALF in text:
            continue
        assert not any(halves)
        assert last == character


@given(st.binary(max_size=40))
@example(b"\xf0\xf0\xf0\xf0\x9f\x98\x80")
@example(b"\xe2\x82\xe2\x82\xac")
@example(b"\xff" * 10 + "é".encode())
def test_any_bytes_give_the_text_of_all(data: bytes) -> None:
    assert "".join(stream(Backed(BYTES), byte_ids(data))) == data.decode("utf-8", errors="replace")


@given(st.lists(st.one_of(VALID.filter(bool), st.sampled_from([MARK, EOS, 300]))))
def test_tokens_without_text_change_nothing(pieces: list[str | int]) -> None:
    ids = [i for p in pieces for i in ([p] if isinstance(p, int) else byte_ids(p.encode()))]
    text = "".join(p for p in pieces if isinstance(p, str))
    parts = stream(Backed(BYTES), ids)
    assert "".join(parts) == text
    assert not any(HALF in part for part in parts)


@pytest.mark.parametrize("half", [b"\xc3", "\ufffd".encode()], ids=["a lone byte", "the character itself"])
@pytest.mark.parametrize("count", range(16))
def test_nothing_is_lost_after_tokens_without_text(half: bytes, count: int) -> None:
    """What may become a character is waited for, but not for ever."""
    chunks = Chunks([b"ok ", half, *[b""] * count, b"whole", b" words"])
    assert "".join(stream(chunks, range(len(chunks.pieces)))) == "ok \ufffdwhole words"


@given(VALID, st.lists(st.integers(1, 6), min_size=1))
@example("é" * 8, [1, *[2] * 7, 1])  # every token ends one character and begins the next
@example("漢" * 8, [2, *[3] * 7, 1])
def test_tokens_may_straddle_characters(text: str, lengths: list[int]) -> None:
    """Byte-level BPE has such tokens: the vocabulary of Qwen holds thousands."""
    data, pieces, start = text.encode(), [], 0
    while start < len(data):
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(data[start : start + length])
        start += length
    parts = stream(Chunks(pieces), range(len(pieces)))
    assert not any(HALF in part for part in parts)
    assert "".join(parts) == text


@given(st.lists(st.one_of(st.integers(257, 262).map(lambda i: [i]), VALID.map(lambda t: list(t.encode())))))
@example([[257], [259]])  # "▁", "▁a": the first space is dropped, the second is text
def test_sentencepiece_text_arrives_whole(pieces: list[list[int]]) -> None:
    ids = [i + 1 if i < 256 else i for piece in pieces for i in piece]  # id 0 is <unk>, then the bytes
    expected = SENTENCEPIECE.decode(ids)
    parts = stream(Backed(SENTENCEPIECE), ids)
    assert "".join(parts) == expected
    assert not any(HALF in part for part in parts)


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    assert stream(Backed(BYTES), byte_ids("a漢".encode()[:-1])) == ["a", "", "", HALF]
    assert stream(Backed(BYTES), []) == [""]


STREAMS = {
    "ascii": byte_ids(b"x" * 10_000),
    "characters of three bytes": byte_ids("漢".encode() * 3_400),
    "stray bytes": byte_ids(b"\x80" * 10_000),
    "bytes that never occur": byte_ids(b"\xff" * 10_000),
    "first bytes": byte_ids(b"\xf0" * 10_000),
    "half characters": byte_ids(b"\xe2\x82" * 5_000),
    "the replacement character": byte_ids(HALF.encode() * 3_400),
    "special tokens": [MARK] * 10_000,
    "no tokens at all": [300] * 10_000,
    "special tokens after half a character": [*byte_ids(b"\xe2"), *[MARK] * 10_000],
    "special tokens between halves": [i for _ in range(3_400) for i in (MARK, *byte_ids(b"\xe2\x82"))],
}


@pytest.mark.parametrize("kind", STREAMS)
def test_the_work_is_linear(kind: str) -> None:
    tokenizer = Backed(BYTES)
    detokenizer = Detokenizer(tokenizer)  # type: ignore[arg-type]
    for token_id in STREAMS[kind]:
        detokenizer.push(token_id)
    assert max(tokenizer.asked) <= 16
    assert sum(tokenizer.asked) <= 50 * len(STREAMS[kind])
