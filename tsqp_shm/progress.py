"""One line on a terminal, gone at the end; nothing in a pipe."""

from __future__ import annotations

import sys

from tsqp_shm.printable import obeyed, shown
from tsqp_shm.wrapping import columns_of, cut

_USUAL_COLUMNS = 80


class Progress:
    """Attributes:
    is_shown: whether somebody can see it.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.is_shown = not quiet and _has_terminal()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")
        self.is_shown = False

    def show(self, text: str) -> None:
        """Of a longer text than a line has room for, the beginning."""
        if self.is_shown:
            # What went on in the next line would stay there; a terminal may not say where that begins.
            line = cut(shown(text, lines=False), columns_of(sys.stderr) or _USUAL_COLUMNS)
            print(f"\r\033[K{line}", end="", file=obeyed(sys.stderr), flush=True)


def _has_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        # It has been closed.
        return False
