"""One line on a terminal, gone at the end; nothing in a pipe."""

from __future__ import annotations

import contextlib
import os
import sys

from tsqp_shm.printable import obeyed

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

    def show(self, text: str) -> None:
        if self.is_shown:
            # What went on in the next line would stay there.
            print(f"\r\033[K{text[: _columns() - 1]}", end="", file=obeyed(sys.stderr), flush=True)


def _has_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        # It has been closed.
        return False


def _columns() -> int:
    with contextlib.suppress(OSError, ValueError):
        # 0 where the terminal does not say.
        return os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_COLUMNS
    return _USUAL_COLUMNS
