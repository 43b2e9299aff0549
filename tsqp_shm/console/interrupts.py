"""Ctrl-C in a chat: it cuts an answer short or clears what was typed, and ends nothing else."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Takes Ctrl-C for the block; use from the main thread alone.

    It is a KeyboardInterrupt where it is `welcome`, and once each time; elsewhere it is kept until it is.
    """

    def __init__(self) -> None:
        self._is_welcome = False
        self._is_kept = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        self._previous = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    @contextmanager
    def welcome(self) -> Iterator[None]:
        """Raises:
        KeyboardInterrupt: anywhere in it, and if one was kept at its beginning.
        """
        self._is_welcome = True
        try:
            if self._is_kept:
                self._is_kept = False
                raise KeyboardInterrupt
            yield
        finally:
            self._is_welcome = False

    def forget(self) -> None:
        """Those that were kept meant what is over by now."""
        self._is_kept = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self._is_welcome:
            self._is_kept = True
            return
        self._is_welcome = False
        raise KeyboardInterrupt
