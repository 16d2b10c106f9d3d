"""Text that arrives token by token must be the text of all tokens, and never hold half a character."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.stage1_naive.detokenizer import Detokenizer
from stages.stage1_naive.tokenizer import Tokenizer
from tests.checkpoints import EOS, byte_tokenizer
from tests.vocabularies import KINDS, pieces, save

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


class Counting:
    """A tokenizer that counts what it is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.asked.append(len(token_ids))
        return self._tokenizer.decode(token_ids, skip_special_tokens)

    def token(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def single_bytes(folder: Path) -> Tokenizer:
    path = folder / "bytes"
    byte_tokenizer().save_pretrained(path)
    return Tokenizer(path)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return Tokenizer(save(KINDS[request.param](), folder / request.param))


def stream(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
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
def test_valid_text_arrives_whole(single_bytes: Tokenizer, text: str) -> None:
    parts = stream(single_bytes, byte_ids(text.encode()))
    assert "".join(parts) == text
    assert not any(HALF in part for part in parts)


@given(TEXTS)
def test_a_character_is_sent_with_its_last_byte(single_bytes: Tokenizer, text: str) -> None:
    """Not later: the reader sees what there is. (U+FFFD itself may wait for its successor.)"""
    sent = iter(stream(single_bytes, byte_ids(text.encode())))
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
def test_any_bytes_give_the_text_of_all(single_bytes: Tokenizer, data: bytes) -> None:
    assert "".join(stream(single_bytes, byte_ids(data))) == data.decode("utf-8", errors="replace")


@given(st.lists(st.one_of(VALID.filter(bool), st.sampled_from([MARK, EOS, 300]))))
def test_tokens_without_text_change_nothing(single_bytes: Tokenizer, parts: list[str | int]) -> None:
    ids = [i for p in parts for i in ([p] if isinstance(p, int) else byte_ids(p.encode()))]
    sent = stream(single_bytes, ids)
    assert "".join(sent) == "".join(p for p in parts if isinstance(p, str))
    assert not any(HALF in part for part in sent)


@pytest.mark.parametrize("half", [b"\xc3", "\ufffd".encode()], ids=["a lone byte", "the character itself"])
@pytest.mark.parametrize("count", range(16))
def test_nothing_is_lost_after_tokens_without_text(half: bytes, count: int, tmp_path: Path) -> None:
    """What may become a character is waited for, but not for ever."""
    tokenizer, ids = pieces(tmp_path, [b"ok ", half, *[b""] * count, b"whole", b" words"])
    assert "".join(stream(tokenizer, ids)) == "ok \ufffdwhole words"


@given(VALID, st.lists(st.integers(1, 6), min_size=1))
@example("é" * 8, [1, *[2] * 7, 1])  # every token ends one character and begins the next
@example("漢" * 8, [2, *[3] * 7, 1])
def test_tokens_may_straddle_characters(text: str, lengths: list[int]) -> None:
    """Byte-level BPE has such tokens: the vocabulary of Qwen holds thousands."""
    data, texts, start = text.encode(), list[bytes](), 0
    while start < len(data):
        length = lengths[len(texts) % len(lengths)]
        texts.append(data[start : start + length])
        start += length
    with TemporaryDirectory() as folder:
        tokenizer, ids = pieces(Path(folder), texts)
    parts = stream(tokenizer, ids)
    assert not any(HALF in part for part in parts)
    assert "".join(parts) == text


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Any tokens, or bytes above all, or a text's; ids that the vocabulary lacks among them."""
    size = max(tokenizer._known) + 3
    named = [i for i in range(size) if tokenizer.byte(i) is not None] or range(size)
    texts = ["é", "漢字", "👍🏽", " is", "true ", "\ufffd", "(", "x"]
    text = "".join(rng.choices(texts, k=rng.randrange(12)))
    ways = (rng.choices(range(size), k=rng.randrange(40)), rng.choices(named, k=rng.randrange(24)))
    return rng.choice((*ways, tokenizer.encode(text, add_special_tokens=False)))


@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_is_the_text_of_prompt_and_answer(kind: Tokenizer, skip: bool) -> None:
    """By hand: STREAMS=2000 pytest tests/stage1/test_detokenizer.py."""
    rng = random.Random(5)
    # A prompt may not end within a character: that would be neither its own nor the answer's.
    end = next(i for i in kind._known if kind.token(i) == "e" and kind.byte(i) is None)
    for _ in range(int(os.environ.get("STREAMS", "200"))):
        prompt = rng.choice(([], [*random_ids(kind, rng), end]))
        ids = random_ids(kind, rng)
        whole = kind.decode([*prompt, *ids], skip)
        expected = whole[len(kind.decode(prompt, skip)) :]
        detokenizer = Detokenizer(kind, prompt, skip)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == expected
        detokenizer = Detokenizer(kind, prompt, skip)
        settled = [text for token_id in ids for text in detokenizer.settle(token_id)]
        settled += detokenizer.finish()
        assert "".join(settled) == expected
        assert len(settled) in (len(ids), len(ids) + 1)


def test_what_is_peeked_at_is_what_comes(kind: Tokenizer) -> None:
    rng = random.Random(6)
    for _ in range(50):
        detokenizer = Detokenizer(kind, [])
        for token_id in kind.encode("".join(rng.choices("é漢 (true)", k=6)), add_special_tokens=False):
            seen, settled = detokenizer.peek(token_id), detokenizer.settle(token_id)
            if settled and kind.byte(token_id) is None and not kind.is_special(token_id):
                assert seen == settled[-1]


def test_text_in_bytes_is_shown_before_its_end(folder: Path) -> None:
    """A run of <0x..> tokens that goes on for ever is not held for ever."""
    tokenizer = Tokenizer(save(KINDS["sentencepiece"](), folder / "run"))
    detokenizer = Detokenizer(tokenizer, [])
    ids = tokenizer.encode("漢" * 20, add_special_tokens=False)
    shown = "".join(map(detokenizer.push, ids))
    assert shown
    assert shown + detokenizer.flush() == "漢" * 20


def test_an_unfinished_character_is_shown_at_the_end(single_bytes: Tokenizer) -> None:
    assert stream(single_bytes, byte_ids("a漢".encode()[:-1])) == ["a", "", "", HALF]
    assert stream(single_bytes, []) == [""]


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


@pytest.mark.parametrize("name", STREAMS)
def test_the_work_is_linear(single_bytes: Tokenizer, name: str) -> None:
    tokenizer = Counting(single_bytes)
    detokenizer = Detokenizer(tokenizer)  # type: ignore[arg-type]
    for token_id in STREAMS[name]:
        detokenizer.push(token_id)
    assert max(tokenizer.asked) <= 16
    assert sum(tokenizer.asked) <= 50 * len(STREAMS[name])
