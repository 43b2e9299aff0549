"""How many pads a session keeps ready, as a user says it, and what is taken where nobody does."""

from __future__ import annotations

import re
from typing import NamedTuple

from tsqp_shm.errors import ConfigError

_UNITS = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
# Without a word of the user's, at most such a part of the memory that is free.
_SHARE_OF_MEMORY = 1 / 4
# And of what may be locked, where it is to be: keys, slots and caches are locked beside it.
_SHARE_OF_LOCKABLE = 1 / 2


class Stock(NamedTuple):
    """A bound for the pads that are kept ready. One of the two is None.

    Attributes:
        rows: pads for so many rows through the whole model.
        size_bytes: as many as take so much memory.
    """

    rows: int | None
    size_bytes: int | None

    @classmethod
    def parse(cls, words: str) -> Stock:
        """Rows, "4096", or memory, "2GiB".

        Raises:
            ConfigError: it is neither.
        """
        parts = re.fullmatch(r"([0-9]{1,12})(KiB|MiB|GiB|TiB)?", words)
        if parts is None or int(parts[1]) == 0:
            raise ConfigError("pad_stock", words, "rows, as 4096, or memory, as 512MiB or 2GiB")
        if parts[2] is None:
            return cls(int(parts[1]), None)
        return cls(None, int(parts[1]) << _UNITS[parts[2]])


def stock_rows(
    words: str | None, row_bytes: int, *, most_rows: int, free_bytes: int, lockable_bytes: int | None
) -> int:
    """How many rows a stock gets.

    Args:
        words: the user's; None: as many as a longest sequence has, as far as memory goes.
        row_bytes: what the pads of a row take.
        most_rows: of a longest sequence.
        free_bytes: of memory.
        lockable_bytes: of memory that the system lets this process lock, where it is to be locked; None: it is not.

    Raises:
        ConfigError: what the user says is less than a row, or more than there is.
    """
    stock = None if words is None else Stock.parse(words)
    if stock is None:
        bound_bytes = int(free_bytes * _SHARE_OF_MEMORY)
        if lockable_bytes is not None:
            bound_bytes = min(bound_bytes, int(lockable_bytes * _SHARE_OF_LOCKABLE))
        return max(1, min(most_rows, bound_bytes // row_bytes))
    rows = stock.rows if stock.size_bytes is None else stock.size_bytes // row_bytes
    if not rows:
        raise ConfigError("pad_stock", words, f"at least a row, of {row_bytes:,} bytes")
    if rows * row_bytes > free_bytes:
        raise ConfigError("pad_stock", words, f"at most the {free_bytes:,} bytes of memory that are free")
    return rows
