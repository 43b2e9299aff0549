"""One line on a terminal, gone at the end; nothing in a pipe."""

from __future__ import annotations

import sys

from tsqp_shm.printable import obeyed


class Progress:
    def __init__(self, quiet: bool = False) -> None:
        self._shown = not quiet and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")

    def show(self, text: str) -> None:
        if self._shown:
            print(f"\r\033[K{text}", end="", file=obeyed(sys.stderr), flush=True)
