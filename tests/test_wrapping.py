"""Lines at a terminal's width: no word is cut that fits a line, however what is written comes in pieces."""

from __future__ import annotations

import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm.printable import ShownStream, unbroken
from tsqp_shm.wrapping import LineBreaks, columns_of, cut, num_cells, wrapped

PACKAGE = Path(__file__).parents[1] / "tsqp_shm"
PIECES = st.lists(
    st.sampled_from(["a", "bc", " ", "  ", "\n", "defgh,", "supercalifragilistic", "é", "e\u0301", "日本"])
)
COLUMNS = st.integers(16, 40)


def on_a_screen(written: str) -> list[str]:
    """What a terminal shows: a backspace goes back by one cell, and what is written there takes its place."""
    lines: list[list[str]] = [[]]
    column = 0
    for character in written:
        if character == "\n":
            lines.append([])
            column = 0
        elif character == "\b":
            column -= 1
        elif num_cells(character) == 0:
            lines[-1][column - 1] += character
        else:
            cells = [character, *[""] * (num_cells(character) - 1)]
            lines[-1][column : column + len(cells)] = cells
            column += len(cells)
    return ["".join(line).rstrip() for line in lines]


@given(PIECES, COLUMNS)
def test_pieces_look_as_the_whole_does(pieces, columns):
    breaks = LineBreaks()
    in_pieces = "".join(breaks.push(piece, columns) for piece in pieces)
    whole = LineBreaks().push("".join(pieces), columns)
    assert "\b" not in whole
    assert on_a_screen(in_pieces) == on_a_screen(whole)


@given(PIECES, COLUMNS)
def test_no_line_is_too_long_no_word_is_cut_that_fits_and_nothing_is_lost(pieces, columns):
    text = "".join(pieces)
    lines = on_a_screen(LineBreaks().push(text, columns))
    assert all(num_cells(line) < columns for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    words = [word for word in text.split() if "日" not in word and num_cells(word) < columns - 1]
    assert all(any(word in line for line in lines) for word in words)


def test_a_word_that_was_begun_is_taken_back():
    breaks = LineBreaks()
    assert breaks.push("sixteen cells to", 18) == "sixteen cells to"
    assert breaks.push("get", 18) == "\b\b  \ntoget"


def test_the_newline_of_a_text_that_fills_a_line_is_one():
    assert LineBreaks().push(f"{'x' * 15} \nnext", 16) == f"{'x' * 15}\nnext"


@pytest.mark.parametrize(("text", "cells"), [("abc", 3), ("é", 1), ("e\u0301", 1), ("日本", 4), ("🙂", 2), ("한", 2)])
def test_cells_are_those_of_a_terminal(text, cells):
    assert num_cells(text) == cells


def test_lines_after_the_first_are_indented():
    assert wrapped("mode  plain: activations cross in clear", 24, indent=6) == [
        "mode  plain:", "      activations cross", "      in clear",
    ]  # fmt: skip


def test_what_is_cut_says_so():
    assert cut("loading a model", 16) == "loading a model"
    assert cut("loading a model with a long name", 16) == "loading a mo..."


class Terminal:
    def __init__(self) -> None:
        self.reader, self.writer = pty.openpty()
        self.stream = ShownStream(os.fdopen(self.writer, "wb", 0), encoding="utf-8", write_through=True)

    def resize(self, columns: int) -> None:
        ioctl(self.writer, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))

    def read(self) -> str:
        return os.read(self.reader, 4096).decode().replace("\r\n", "\n")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.stream.close()
    os.close(terminal.reader)


def test_a_stream_breaks_lines_at_the_width_that_its_terminal_has(terminal):
    for columns, lines in ((0, 1), (200, 1), (20, 3)):
        terminal.resize(columns)
        assert columns_of(terminal.stream) == (columns or None)
        print("one two three four five six seven eight nine", file=terminal.stream)
        assert terminal.read().count("\n") == lines


def test_what_programs_read_is_not_broken(terminal):
    terminal.resize(20)
    line = '{"text": "one two three four five six"}\n'
    unbroken(terminal.stream).write(line)
    assert terminal.read() == line


def test_every_json_object_goes_out_unbroken():
    found = {path.name for path in PACKAGE.rglob("*.py") if re.search(r"\bprint\(json\.dumps", path.read_text())}
    assert found == {"printable.py"}
