"""A command on a pseudo-terminal of its own, as a person types it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from typing import Any


class OnTerminal:
    """A process whose standard streams and controlling terminal are a pseudo-terminal, which it leads; ends with the
    block.

    Attributes:
        seen: what has come out of the terminal so far, as bytes.
    """

    def __init__(self, *arguments: object, under: Sequence[str] = (), columns: int = 0) -> None:
        """Runs `tsqp-shm ARGUMENTS`, as the last words of the command `under`.

        Args:
            columns: of the terminal; 0: it does not say.
        """
        self.seen = b""
        words = [*under, sys.executable, "-m", "tsqp_shm", *map(str, arguments)]
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 60 if columns else 0, columns, 0, 0))
                os.execvp(words[0], words)
            finally:
                os._exit(127)
        self._code: int | None = None

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def modes(self) -> list[Any]:
        """Of the terminal, as `termios` has them."""
        return termios.tcgetattr(self._terminal)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def echoes(self) -> bool:
        """Whether the terminal itself shows what is typed, as it does where no program edits the line."""
        return bool(termios.tcgetattr(self._terminal)[3] & termios.ECHO)

    def hang_up(self) -> None:
        """Closes the terminal, as its window does."""
        os.close(self._terminal)
        self._terminal = -1

    def read_until(self, condition: Callable[[], object]) -> None:
        """Takes what comes out, until the condition holds."""
        end = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < end, self.seen
            if self._terminal != -1 and select.select([self._terminal], [], [], 0.02)[0]:
                # A terminal that nobody has open any more is an error to its master.
                with contextlib.suppress(OSError):
                    self.seen += os.read(self._terminal, 1 << 16)

    def wait(self) -> int:
        """The exit code; negative is a signal's number."""
        self.read_until(self._has_ended)
        assert self._code is not None
        return self._code

    def _has_ended(self) -> bool:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._has_ended():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        if self._terminal != -1:
            os.close(self._terminal)
