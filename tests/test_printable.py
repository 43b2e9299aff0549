"""What others have written, on a terminal: shown, and never obeyed."""

import io
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tsqp_shm.printable import ShownStream, obeyed, quoted, shown

HOSTILE = [
    ("\x1b]52;c;cm0=\x07\x1b[2J", r"\x1b]52;c;cm0=\x07\x1b[2J"),
    ("a\rb\x08c\x7f", r"a\rb\x08c\x7f"),
    ("\x9b31m\x85", r"\x9b31m\x85"),
    ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
    ("one\u2028two\u2029", r"one\u2028two\u2029"),
    ("zero\u200b\u200d\ufeff\u00ad\u2060width", r"zero\u200b\u200d\ufeff\xad\u2060width"),
    ("\U000e0041\U000e0100\u3164\u034f", r"\U000e0041\U000e0100\u3164\u034f"),
    ("\ue000\ud800\U0010ffff\0", r"\ue000\ud800\U0010ffff\x00"),
]


@pytest.mark.parametrize(("text", "seen"), HOSTILE, ids=[seen[:8] for _, seen in HOSTILE])
def test_what_a_terminal_would_obey_or_hide_is_spelled_out(text, seen):
    assert shown(text) == seen


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 東京\u3000and\u00a0🙂️", "a\tb\nc\n"])
def test_what_prints_is_left_as_it_is(text):
    assert shown(text) == text


def test_of_every_character_nothing_is_left_that_is_no_letter_mark_sign_or_space():
    everything = "".join(map(chr, range(0x110000)))
    left = {unicodedata.category(character) for character in shown(everything)} - {"Cc"}
    assert all(category[0] in "LMNPS" or category == "Zs" for category in left)
    assert {character for character in shown(everything) if unicodedata.category(character) == "Cc"} == {"\n", "\t"}
    assert shown(everything, lines=False).splitlines() == [shown(everything, lines=False)]


def test_one_line_stays_one():
    assert shown("a\nb\tc", lines=False) == r"a\nb\tc"


@given(st.text())
@example("\x1b]0;owned\x07\x1b[2J\nsecond line\u202e\u2028")
@example("a" * 10_000)
def test_what_somebody_else_says_becomes_a_part_of_one_line(said):
    assert quoted(said) == shown(quoted(said), lines=False)
    assert len(quoted(said)) <= 300


def test_a_stream_shows_an_escape_that_comes_in_pieces_and_what_it_draws_itself_is_obeyed():
    buffer = io.BytesIO()
    stream = ShownStream(buffer, encoding="utf-8")
    for piece in ("\x1b", "[", "2J\n"):
        print(piece, end="", file=stream)
    print("\x1b[K", end="", file=obeyed(stream), flush=True)
    assert buffer.getvalue() == b"\\x1b[2J\n\x1b[K"
    assert obeyed(buffer) is buffer
