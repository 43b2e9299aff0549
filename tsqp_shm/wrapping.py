"""Lines at a terminal's width, broken between words; the width of a text is counted in a terminal's cells."""

from __future__ import annotations

import os
import unicodedata
from typing import TextIO

_TAB_CELLS = 8
# A terminal that is narrower breaks lines as it likes.
_LEAST_COLUMNS = 16
# One that is narrower than this has no room for a text beside its label.
_NARROW_COLUMNS = 50


def num_cells(text: str) -> int:
    """How many cells of a terminal a text takes that has neither tabs nor newlines."""
    return len(text) if text.isascii() else sum(map(_cells_of, text))


def columns_of(stream: TextIO) -> int | None:
    """How many cells a line has where a stream goes to a terminal that says so; None where nothing is to be broken."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        # None, or one that was closed.
        return None
    return columns if columns >= _LEAST_COLUMNS else None


def wrapped(text: str, columns: int, *, indent: int = 0) -> list[str]:
    """A line as several, each of fewer cells than `columns`.

    Args:
        indent: the spaces before each but the first.
    """
    lines = LineBreaks(" " * min(indent, columns * 3 // 4)).push(text, columns).split("\n")
    return [line.rstrip() for line in lines]


def beside(label: str, text: str, out: TextIO) -> str:
    """A line of a report, with what there is to say beside its label, in as many lines as a terminal needs for it.

    Args:
        label: with the spaces around it.
        out: where it is to be printed; in a pipe it is one line.
    """
    columns = columns_of(out)
    if columns is None:
        return label + text
    if columns < _NARROW_COLUMNS:
        return "\n".join(wrapped(" ".join([*label.split(), text]), columns, indent=2))
    return "\n".join(wrapped(label + text, columns, indent=num_cells(label)))


def cut(text: str, columns: int) -> str:
    """The beginning of a text, in fewer cells than `columns`."""
    if num_cells(text) < columns:
        return text
    while num_cells(text) > columns - 4:
        text = text[:-1]
    return text + "..."


class LineBreaks:
    """Breaks what is written piece by piece. Every piece is shown at once: a word that turns out not to fit, when a
    part of it is there already, is taken back, and begins the next line.

    The last cell of a line stays empty: behind a character in it, terminals differ in where the cursor is.

    Args:
        indent: begins each line that is made.
    """

    def __init__(self, indent: str = "") -> None:
        self._indent = indent
        self._column = 0
        self._word = ""

    def push(self, text: str, columns: int | None) -> str:
        """What is to be written for the next piece, which is printable but for newlines and tabs.

        Args:
            columns: of the terminal at this moment; None: nothing is broken.
        """
        written: list[str] = []
        # Of the word so many characters stand there already, and the rest in `written` from its beginning on.
        num_shown, begin = len(self._word), 0
        for character in text:
            if character == "\n":
                self._word, self._column = "", 0
            elif character in " \t":
                cells = 1 if character == " " else _TAB_CELLS - self._column % _TAB_CELLS
                self._word = ""
                if columns is not None and self._column + cells >= columns:
                    # The break stands for it, if a word follows.
                    self._column = columns - 1
                    continue
                self._column += cells
            else:
                cells = _cells_of(character)
                # Before and behind a character of two cells a line may be broken.
                if not self._word or cells == 2:
                    self._word, num_shown, begin = "", 0, len(written)
                if columns is not None and self._column + cells >= columns:
                    del written[begin:]
                    written += self._broken(num_shown)
                    num_shown, begin = 0, len(written) - len(self._word)
                self._word = "" if cells == 2 else self._word + character
                self._column += cells
            written.append(character)
        return "".join(written)

    def _broken(self, num_shown: int) -> list[str]:
        """Begins a line and moves the word there that this one ends with."""
        cells = num_cells(self._word)
        back = num_cells(self._word[:num_shown])
        if self._column - cells <= len(self._indent):
            # It fills the line alone, and has to be cut.
            said = [*self._word[num_shown:], "\n" + self._indent]
            self._word, self._column = "", len(self._indent)
            return said
        self._column = len(self._indent) + cells
        return ["\b" * back + " " * back, "\n" + self._indent, *self._word]


def _cells_of(character: str) -> int:
    if character.isascii():
        return 1
    # Marks stand over the character before; so do the vowels and finals of which Hangul syllables may be put together.
    if unicodedata.category(character) in ("Mn", "Me", "Cf") or "\u1160" <= character <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
