"""What benchmarks print: tables and lines of at most `WIDTH` columns, whatever they hold.

A table that is too wide breaks its titles into lines of one word each; where that is not enough it goes on in a second
part below, which repeats the names of its rows, and what is wider than half of all breaks within its cell. Nothing is
cut.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from tsqp_shm.wrapping import num_cells, wrapped

WIDTH = 100
_GAP = 2
# Of the columns that are repeated; what is left has room for one of any other at least.
_HALF = WIDTH // 2 - _GAP


def say(text: str, out: TextIO | None = None, indent: int = 0) -> None:
    """Prints one paragraph.

    Args:
        indent: the spaces before its lines but the first.
    """
    print("\n".join(wrapped(" ".join(text.split()), WIDTH + 1, indent=indent)), file=out or sys.stdout)


def say_facts(facts: Mapping[str, Any]) -> None:
    """A line for each."""
    for name, fact in facts.items():
        say(f"{name}: {fact}", indent=2)


def print_columns(
    titles: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO | None = None, *, names: int = 1
) -> None:
    """Prints a table.

    Args:
        rows: a cell for each title.
        names: so many columns at the beginning say what a row is: they are there in each part.
    """
    columns = list(zip(titles, *rows, strict=True))
    whole = [_Column(cells, WIDTH) for cells in columns]
    limits = _shared([column.width for column in whole[:names]], _HALF) + [_HALF] * (len(columns) - names)
    limited = [_Column(cells, limit) for cells, limit in zip(columns, limits, strict=True)]
    for candidate in (whole, [column.narrowed() for column in whole]):
        if _total(candidate) <= WIDTH:
            parts = [candidate]
            break
    else:
        parts = list(_parts(limited[:names], limited[names:])) or [limited]
    for number, part in enumerate(parts):
        lines = [line for row in range(len(rows) + 1) for line in _row(part, row)]
        print(*([""] if number else []), *lines, sep="\n", file=out or sys.stdout, flush=True)


def _shared(wanted: list[int], width: int) -> list[int]:
    """What each of several columns gets of a width: what it wants, where that is no more than an equal share of what
    those leave that want less."""
    given = dict.fromkeys(range(len(wanted)), 0)
    left = width - _GAP * (len(wanted) - 1)
    for place, index in enumerate(sorted(given, key=lambda index: wanted[index])):
        given[index] = min(wanted[index], left // (len(wanted) - place))
        left -= given[index]
    return list(given.values())


class _Column:
    """Numbers are flush right, words flush left.

    Args:
        cells: its title, then of each row.

    Attributes:
        lines: of each of them.
    """

    def __init__(self, cells: Sequence[str], limit: int) -> None:
        self._cells = cells
        self.lines = [_lines(cell, max(1, limit)) for cell in cells]
        self.width = max(num_cells(line) for lines in self.lines for line in lines)
        self.is_number = all(cell[:1].isdigit() or cell[:1] in "-+" for cell in cells[1:])

    def narrowed(self) -> _Column:
        """With a title that is no wider than what is below it, or than its own longest word."""
        title, *cells = self.lines
        widths = [num_cells(line) for lines in cells for line in lines]
        return _Column(
            self._cells, max([*widths, *(num_cells(word) for line in title for word in line.split())], default=1)
        )


def _parts(names: list[_Column], others: list[_Column]) -> Iterator[list[_Column]]:
    """As many of the others in each as fit beside the names."""
    names, narrow = [column.narrowed() for column in names], [column.narrowed() for column in others]
    while others:
        count = 1
        while count < len(others) and _total(names + narrow[: count + 1]) <= WIDTH:
            count += 1
        # Of a part that is narrower the titles need no breaking.
        is_wide = _total(names + others[:count]) > WIDTH
        yield names + (narrow if is_wide else others)[:count]
        others, narrow = others[count:], narrow[count:]


def _total(columns: list[_Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _row(columns: list[_Column], row: int) -> Iterator[str]:
    """Its lines: a title stands on what is below it, a name is above what goes on."""
    height = max(len(column.lines[row]) for column in columns)
    padded = []
    for column in columns:
        lines = column.lines[row]
        blank = [""] * (height - len(lines))
        padded.append([_placed(line, column) for line in (blank + lines if row == 0 else lines + blank)])
    for line in zip(*padded, strict=True):
        yield (" " * _GAP).join(line).rstrip()


def _placed(line: str, column: _Column) -> str:
    space = " " * (column.width - num_cells(line))
    return space + line if column.is_number else line + space


def _lines(text: str, width: int) -> list[str]:
    """Broken between words, and within one that is wider; at least one line."""
    return wrapped(" ".join(text.split()), width + 1)
