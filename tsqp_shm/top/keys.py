"""What is typed while the view is up: each key at once, and not shown."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
from typing import Any

LEAVES = b"qQ"


class Keys:
    """Reads the terminal that standard input is, if it is one and this process's own at the moment; else it waits, and
    nothing is read. The terminal is as it was when the block is left, however it is left.

    Attributes:
        has_left: whether a key was hit that ends the view.
    """

    def __init__(self) -> None:
        self.has_left = False
        self._fd: int | None = None
        self._before: list[Any] = []

    def __enter__(self) -> Keys:
        # There may be no standard input, or it is no terminal.
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):
            fd = sys.stdin.fileno()
            # In the background a process that touches the terminal is stopped.
            if os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp():
                self._before = termios.tcgetattr(fd)
                self._fd = fd
                _set(fd, _key_by_key(self._before))
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            _set(self._fd, self._before)

    def wait(self, timeout_s: float) -> bool:
        """Whether nobody wants to see more; as soon as that is so."""
        until = time.monotonic() + timeout_s
        while (left_s := until - time.monotonic()) > 0:
            if self._fd is None:
                time.sleep(left_s)
            elif select.select([self._fd], [], [], left_s)[0]:
                keys = _read(self._fd)
                if not keys:
                    # It has hung up, and would be ready for ever.
                    self._fd = None
                if any(key in LEAVES for key in keys):
                    self.has_left = True
                    break
        return self.has_left


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 64)
    except OSError:
        return b""


def _set(fd: int, modes: list[Any]) -> None:
    # At once, and not when what was written has been shown: Ctrl-S would keep this process here.
    with contextlib.suppress(termios.error):
        termios.tcsetattr(fd, termios.TCSANOW, modes)


def _key_by_key(modes: list[Any]) -> list[Any]:
    """The same without echo and without lines. Ctrl-C is still a signal; Ctrl-Z is a key, as the screen would stay."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, characters = modes
    characters = list(characters)
    characters[termios.VMIN], characters[termios.VTIME] = 1, 0
    characters[termios.VSUSP] = b"\0"
    return [iflag, oflag, cflag, lflag & ~(termios.ICANON | termios.ECHO), ispeed, ospeed, characters]
