"""Text assembly: whole characters, stop strings, and log-probabilities that stay beside their text."""

from hypothesis import given
from hypothesis import strategies as st

from minisgl.server.text import Choice, Piece
from stages.interface import TokenLogprobs, TokenOutput


class Letters:
    """Token i is the character i; it stands for a tokenizer whose every token is a whole text."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, token_ids: list[int]) -> str:
        return b"".join(self.texts[token].encode("latin-1") for token in token_ids).decode(errors="replace")


def run(texts: list[str], stop: list[str], last: str = "length", scored: bool = False) -> list[Piece]:
    """The pieces of a choice whose tokens have these texts (in Latin-1: bytes), taken after each token."""
    choice = Choice(0, Letters(*texts), stop)  # type: ignore[arg-type]
    pieces = []
    for i in range(len(texts)):
        if choice.finish_reason:
            break
        finish = last if i == len(texts) - 1 else None
        choice.push(TokenOutput("r", i, TokenLogprobs(-1.0, []) if scored else None, finish))  # type: ignore[arg-type]
        if piece := choice.take():
            pieces.append(piece)
    assert choice.finish_reason
    return pieces


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
    assert [[token.token_id for token in piece.tokens or []] for piece in cut] == [[0], [1], []]
    assert run(["a"], [])[0].tokens is None


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
