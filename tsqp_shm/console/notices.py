"""Lines about a session that are not the answer: between lines of it, and never within one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# Of more the oldest are dropped: nobody may look at the terminal for hours.
_MOST_KEPT = 200


class Notices:
    """Any thread may say something.

    Args:
        out: where it is said.
        is_quiet: only what is insisted on is.
        shares_line: whether answers go to the same terminal; elsewhere nothing has to wait.
    """

    def __init__(self, out: TextIO, *, is_quiet: bool = False, shares_line: bool = True) -> None:
        self._out = out
        self._is_quiet = is_quiet
        self._shares_line = shares_line
        self._lock = threading.Lock()
        self._is_held = False
        self._kept: deque[str] = deque(maxlen=_MOST_KEPT)
        self._num_dropped = 0

    def say(self, line: str) -> None:
        """Says it at once, or when the line that the terminal is in has ended."""
        if not self._is_quiet:
            self.insist(line)

    def insist(self, line: str) -> None:
        """Says what whoever types has to know to go on."""
        with self._lock:
            if self._is_held:
                self._num_dropped += len(self._kept) == _MOST_KEPT
                self._kept.append(line)
            else:
                print(line, file=self._out, flush=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The terminal is in the middle of a line for the block."""
        with self._lock:
            self._is_held = self._shares_line
        try:
            yield
        finally:
            with self._lock:
                self._is_held = False
                if self._num_dropped:
                    print(f"{self._num_dropped:,} earlier lines are left out", file=self._out)
                while self._kept:
                    print(self._kept.popleft(), file=self._out)
                self._num_dropped = 0
                self._out.flush()
