"""One line on a terminal, gone at the end; nothing in a pipe."""

from __future__ import annotations

import sys

from tsqp_shm.printable import obeyed


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

    def show(self, text: str) -> None:
        if self.is_shown:
            print(f"\r\033[K{text}", end="", file=obeyed(sys.stderr), flush=True)


def _has_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        # It has been closed.
        return False
