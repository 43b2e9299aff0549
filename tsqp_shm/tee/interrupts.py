"""Ctrl-C between two steps, not inside one: there it could lose a record that was received, or send one twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# The handler that a SIGINT would have called, while one is held back.
_held: Callable[[int, None], Any] | None = None


@contextmanager
def held_interrupts() -> Iterator[None]:
    """A SIGINT in the block has its effect at the block's end, or where `raise_held_interrupt` is called.

    Does nothing outside of the main thread, or where SIGINT is ignored.
    """
    previous = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or not callable(previous):
        yield
        return

    def hold(number: int, frame: object) -> None:
        global _held
        _held = previous

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        # A handler that has been called meanwhile may have put another in its place.
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, previous)
        raise_held_interrupt()


@contextmanager
def cancelling_interrupts() -> Iterator[None]:
    """A SIGINT in the block, however often it comes, ends the block and nothing else."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, previous)


def raise_held_interrupt() -> None:
    """For a wait that has just found nothing: no record is at stake, and the peer may be hanging.

    Raises:
        KeyboardInterrupt: or whatever else the handler raises.
    """
    global _held
    if _held is not None and _in_main_thread():
        handler, _held = _held, None
        handler(signal.SIGINT, None)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
