"""What callers ask of the thread that runs the steps, which takes it between two of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")
# Between two steps orders are taken for so long, and one at least: who asks without end must not keep those waiting
# who want tokens.
SHARE_S = 0.005


class _Order:
    """Done once, by whoever comes first."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._taken = threading.Lock()

    def __call__(self) -> None:
        if self._taken.acquire(blocking=False):
            self._act()


class Orders:
    """A queue of orders: any thread gives them, one takes them.

    `give` may be called at any moment, by a finaliser too: a SimpleQueue's put may interrupt another of the same
    thread, which a lock may not.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Order] = SimpleQueue()
        self._is_over = False

    def give(self, act: Callable[[], None]) -> None:
        order = _Order(act)
        self._queue.put(order)
        # SYNC POINT: pairs with `end`, which says so before it takes orders a last time: one of both takes this one.
        if self._is_over:
            order()

    def ask(self, act: Callable[[], T]) -> T:
        """Has it done and waits for it. Returns what it gives, or raises what it raises."""
        answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def order() -> None:
            try:
                answer.put((act(), None))
            except BaseException as error:
                answer.put((None, error))

        self.give(order)
        value, error = answer.get()
        if error is not None:
            try:
                raise error
            finally:
                # Or this frame and the error would keep each other, and the frames of whoever asked.
                del error
        return value  # type: ignore[return-value]

    def take(self, *, wait: bool = False, timeout_s: float | None = None) -> None:
        """Does what was given.

        Args:
            wait: for one first, so long at most; then all that are there are done, and else those of SHARE_S.
        """
        end_s = time.monotonic() + SHARE_S
        with suppress(Empty):
            self._queue.get(block=wait, timeout=timeout_s)()
            while wait or time.monotonic() < end_s:
                self._queue.get(block=False)()

    def end(self) -> None:
        """Does what is left; what is given from now on is done by who gives it."""
        self._is_over = True
        with suppress(Empty):
            while True:
                self._queue.get(block=False)()
