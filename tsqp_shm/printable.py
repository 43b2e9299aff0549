"""Text of another's making, made fit for a terminal: what a terminal would obey, or would not show, is spelled out.

A terminal obeys more than letters: an escape sequence moves the cursor, sets the clipboard, renames the window; a
bidirectional control turns a line around; a zero-width character hides in a name. Whatever a model says, a file is
called or another process prints may hold them.
"""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO, cast

from tsqp_shm.wrapping import LineBreaks, columns_of

# Controls, formats (bidirectional and zero-width characters among them), surrogates, private use, unassigned, and the
# separators of lines and paragraphs. Spaces of every width are shown as they are.
_UNSHOWN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Letters and marks by their category, but blank or without width: fillers, and selectors that hide bytes in a name.
_UNSHOWN_LETTERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\U000e0100-\U000e01ef]")
# The first words of an error say what is wrong; what follows may quote a whole file.
_MOST_QUOTED = 300
_SURROGATES = re.compile("[\ud800-\udfff]")


def shown(text: str, *, lines: bool = True) -> str:
    """The text with every character that does not print spelled out, as `\\x1b` or `\\u202e`.

    Args:
        lines: newlines and tabs are left as they are; else they are spelled out too, and the result is one line.
    """
    if text.isprintable() and not _UNSHOWN_LETTERS.search(text):
        return text
    return "".join(map(_shown_in_lines if lines else _shown_character, text))


def quoted(said: object) -> str:
    """What somebody else says, as a part of a line of ours: one line, bounded, with what does not print spelled out."""
    text = shown(" ".join(str(said)[: 4 * _MOST_QUOTED].split()), lines=False)
    return text if len(text) <= _MOST_QUOTED else text[: _MOST_QUOTED - 3] + "..."


def is_text(text: str) -> bool:
    """Whether it can be UTF-8: bytes that no decoder understood are in it as lone surrogates."""
    return not _SURROGATES.search(text)


def _shown_in_lines(character: str) -> str:
    return character if character in "\n\t" else _shown_character(character)


def _shown_character(character: str) -> str:
    if unicodedata.category(character) in _UNSHOWN_CATEGORIES or _UNSHOWN_LETTERS.match(character):
        return character.encode("unicode_escape", "surrogatepass").decode()
    return character


class ShownStream(io.TextIOWrapper):
    """A text stream to a terminal that shows what it is given, and has the terminal obey newlines and tabs alone.

    An escape sequence that comes in pieces is shown too: each character is looked at for itself. Lines are broken
    between words, at the width that the terminal has at that moment.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._breaks = LineBreaks()

    def write(self, text: str, /) -> int:
        super().write(self._breaks.push(shown(text), columns_of(self)))
        return len(text)

    def write_unbroken(self, text: str) -> int:
        super().write(shown(text))
        return len(text)

    def write_obeyed(self, text: str) -> int:
        return super().write(text)


class OtherwiseWritten:
    """What `obeyed` and `unbroken` make of a `ShownStream`; everything but writing is that stream's."""

    def __init__(self, stream: ShownStream, write: Callable[[str], int]) -> None:
        self._stream = stream
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def obeyed(stream: TextIO) -> TextIO:
    """The same stream for who draws on it: the terminal obeys what this program itself has made up."""
    return cast(TextIO, OtherwiseWritten(stream, stream.write_obeyed)) if isinstance(stream, ShownStream) else stream


def unbroken(stream: TextIO) -> TextIO:
    """The same stream for whole lines that programs read too: a break between words would be one in the text."""
    return cast(TextIO, OtherwiseWritten(stream, stream.write_unbroken)) if isinstance(stream, ShownStream) else stream


def print_json(value: object, *, indent: int | None = None) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=indent), file=unbroken(sys.stdout), flush=True)
