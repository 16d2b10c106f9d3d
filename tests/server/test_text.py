"""Text assembly: whole characters, stop strings, and log-probabilities that stay beside their text."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.server.text import Choice, Piece, TextOptions
from stages.interface import Request, SamplingParams, TokenLogprobs, TokenOutput
from stages.stage1_naive.tokenizer import Tokenizer
from tests.checkpoints import EOS, byte_tokenizer
from tests.vocabularies import KINDS, save
from tests.vocabularies import pieces as pieces_of


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level: every byte is a token, id 256 the end, 257 a special token."""
    path = tmp_path_factory.mktemp("letters")
    byte_tokenizer().save_pretrained(path)
    return Tokenizer(path)


def make_request(**params: Any) -> Request:
    return Request("r", [1, 2], SamplingParams(**params))


def run(
    texts: list[str], stop: list[str], last: str = "length", scored: bool = False, **params: Any
) -> list[Piece]:
    """The pieces of a choice whose tokens have these texts (in Latin-1: bytes), taken after each token."""
    with TemporaryDirectory() as folder:
        tokenizer, ids = pieces_of(Path(folder), [text.encode("latin-1") for text in ["", *texts]])
    request = make_request(logprobs=0 if scored else None, **params)
    choice = Choice(0, request, tokenizer, TextOptions(stop))
    pieces = []
    for i, token_id in enumerate(ids[1:]):
        if choice.finish_reason:
            break
        finish = last if i == len(texts) - 1 else None
        choice.push(output(token_id, finish, TokenLogprobs(-1.0, []) if scored else None))
        if piece := choice.take():
            pieces.append(piece)
    assert choice.finish_reason
    return pieces


def output(token_id: int, finish: str | None = None, logprobs: TokenLogprobs | None = None) -> TokenOutput:
    return TokenOutput("r", token_id, logprobs, finish)  # type: ignore[arg-type]


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_without_stops_text_leaves_at_once() -> None:
    assert [piece.text for piece in run(["Hel", "lo", "!"], [])] == ["Hel", "lo", "!"]


def test_a_stop_string_over_several_tokens() -> None:
    pieces = run(["one ", "S", "TO", "P two", "more"], ["STOP"])
    assert [piece.text for piece in pieces] == ["one ", ""]
    assert pieces[-1].finish_reason == "stop"


def test_a_false_beginning_is_released() -> None:
    assert [piece.text for piece in run(["a", "S", "T", "X", "b"], ["STOP"])] == ["a", "STX", "b"]


def test_withheld_text_leaves_at_the_end() -> None:
    pieces = run(["a", "ST"], ["STOP"])
    assert (text(pieces), pieces[-1].finish_reason) == ("aST", "length")


def test_the_stop_token_adds_no_text() -> None:
    pieces = run(["a", "S", "<end>"], ["STOP"], last="stop")
    assert (text(pieces), pieces[-1].finish_reason) == ("aS", "stop")


def test_half_a_character_waits() -> None:
    euro = "€".encode().decode("latin-1")  # three bytes
    assert [piece.text for piece in run(["1", *euro, "!"], [])] == ["1", "€", "!"]
    assert text(run(["1", *euro[:2]], [])) == "1\ufffd"


def test_a_stop_string_may_come_with_the_flush() -> None:
    pieces = run(["a", "€".encode()[:2].decode("latin-1")], ["\ufffd"])
    assert (text(pieces), pieces[-1].finish_reason) == ("a", "stop")


def test_logprobs_leave_with_their_text() -> None:
    pieces = run(["a", "S", "T", "X", "b"], ["STOP"], scored=True)
    assert [[token.offset for token in piece.tokens or []] for piece in pieces] == [[0], [1, 2, 3], [4]]
    cut = run(["ab", "cS", "T", "OP", "b"], ["STOP"], scored=True)
    assert [[scored.token.text for scored in piece.tokens or []] for piece in cut] == [["ab"], ["cS"], []]
    assert run(["a"], [])[0].tokens is None


@settings(deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_the_cut_of_the_tokens_does_not_matter(whole: str, stops: list[str], sizes: list[int]) -> None:
    """Expected: the shortest prefix that ends with a stop string, without that (the longest such) one."""
    expected, finish = whole, "length"
    for end in range(len(whole) + 1):
        ends = [stop for stop in stops if whole[:end].endswith(stop)]
        if ends:
            expected, finish = whole[: end - max(map(len, ends))], "stop"
            break
    tokens = []
    rest = whole
    for size in sizes:
        tokens.append(rest[:size])
        rest = rest[size:]
    pieces = run(tokens, stops)
    assert (text(pieces), pieces[-1].finish_reason) == (expected, finish)
    released = ""
    for piece in pieces:  # what was sent is never taken back, and never part of a stop string
        released += piece.text
        assert expected.startswith(released)


MARK = EOS + 1  # a special token, "<|mark|>"


def choose(tokenizer: Tokenizer, options: TextOptions, ids: list[int], **params: Any) -> Choice:
    """A choice after these tokens, or as many as it takes."""
    choice = Choice(0, make_request(**params), tokenizer, options)
    for token_id in ids:
        if not choice.finish_reason:
            choice.push(output(token_id))
    return choice


def spelled(tokenizer: Tokenizer, *parts: str | int) -> list[int]:
    return [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part))]


def test_a_special_token_may_be_a_stop_string(letters: Tokenizer) -> None:
    ids = spelled(letters, "ab", MARK, "c")
    for skip in (True, False):
        choice = choose(letters, TextOptions(["<|mark|>"], skip_special_tokens=skip), ids)
        assert choice.stop_reason == "<|mark|>"
        assert choice.take().text == "ab"  # type: ignore[union-attr]
        choice = choose(letters, TextOptions(["<|mark|>"], include_stop=True, skip_special_tokens=skip), ids)
        assert choice.take().text == "ab<|mark|>"  # type: ignore[union-attr]


def test_special_tokens_are_shown_if_wanted(letters: Tokenizer) -> None:
    ids = spelled(letters, "a", MARK, "b")
    assert choose(letters, TextOptions(skip_special_tokens=False), ids).take().text == "a<|mark|>b"  # type: ignore[union-attr]
    assert choose(letters, TextOptions(), ids).take().text == "ab"  # type: ignore[union-attr]


def test_the_stop_string_may_be_part_of_the_answer(letters: Tokenizer) -> None:
    choice = choose(letters, TextOptions(["END"], include_stop=True), spelled(letters, "the END is"))
    assert (choice.take().text, choice.stop_reason) == ("the END", "END")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("stops", "eos", "reason"), [([MARK], EOS, MARK), ([], MARK, None), ([EOS], EOS, None)]
)
def test_the_reason_is_the_requests_own_stop_token(
    letters: Tokenizer, stops: list[int], eos: int, reason: int | None
) -> None:
    choice = Choice(0, make_request(stop_token_ids=stops), letters)
    choice.push(output(stops[0] if stops else eos, "stop"))
    assert choice.stop_reason == reason
    shown = Choice(0, make_request(), letters, TextOptions(include_stop=True, skip_special_tokens=False))
    shown.push(output(EOS, "stop"))
    assert shown.take().text == "<|end|>"  # type: ignore[union-attr]


def test_no_stop_string_ends_before_the_least_number_of_tokens(letters: Tokenizer) -> None:
    ids = spelled(letters, "xxaxx")
    for least, expected in ((0, ""), (1, "x"), (2, "xxa"), (4, "xxax")):
        choice = choose(letters, TextOptions(["x"]), ids, min_tokens=least)
        assert (choice.take().text, choice.finish_reason) == (expected, "stop")  # type: ignore[union-attr]
    assert choose(letters, TextOptions(["x"]), ids, min_tokens=5).finish_reason is None


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_joined_are_the_text(kind: str, tmp_path: Path) -> None:
    """In any vocabulary, and their bytes joined are its bytes; also of the prompt when it stands before."""
    tokenizer = Tokenizer(save(KINDS[kind](), tmp_path))
    ids = tokenizer.encode("café 漢👍 true", add_special_tokens=False)
    scores = TokenLogprobs(-1.0, [(i, -1.0) for i in ids])
    request = Request("r", ids, SamplingParams(logprobs=20, prompt_logprobs=20))
    choice = Choice(0, request, tokenizer)
    choice.show_prompt([scores] * (len(ids) - 1), echo=True)
    for i, token_id in enumerate(ids):
        choice.push(output(token_id, "length" if i == len(ids) - 1 else None, scores))
    piece = choice.take()
    assert piece is not None
    assert piece.tokens is not None
    tokens = [scored.token for scored in piece.tokens]
    assert [token.token_id for token in tokens] == [*ids, *ids]
    assert [token.logprob for token in tokens][: len(ids)] == [None, *[-1.0] * (len(ids) - 1)]
    assert piece.text == tokenizer.decode([*ids, *ids])
    assert "".join(token.text for token in tokens) == piece.text
    assert b"".join(token.bytes for token in tokens) == piece.text.encode()
    for scored in piece.tokens:
        assert piece.text.startswith(scored.token.text, scored.offset)
        token_id = scored.token.token_id
        if scored.top and tokenizer.byte(token_id) is None and not tokenizer.is_special(token_id):
            own = next(top for top in scored.top if top.token_id == token_id)
            assert (own.text, own.bytes) == (scored.token.text, scored.token.bytes)


def test_an_unfinished_character_belongs_to_its_last_token(letters: Tokenizer) -> None:
    choice = Choice(0, make_request(logprobs=0), letters)
    for i, token_id in enumerate(first := letters.encode("é漢")[:-1]):
        choice.push(output(token_id, "length" if i == len(first) - 1 else None, TokenLogprobs(-1.0, [])))
    piece = choice.take()
    assert piece is not None
    assert piece.text == "é\ufffd"
    assert [scored.token.text for scored in piece.tokens or []] == ["", "é", "", "\ufffd"]
    assert b"".join(scored.token.bytes for scored in piece.tokens or []) == "é漢".encode()[:-1]
