"""What callers ask of the thread that runs the steps, which takes it between two of them.

Nothing here has a lock that is held while code runs: a finaliser or a signal handler may interrupt any of it, in the
same thread, and ask for more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")
# Between two steps orders are taken for so long, and one at least: who asks without end must not keep those waiting
# who want tokens.
SHARE_S = 0.005
# Who waits looks so often whether there is still somebody to wait for; an exception that one thread has set for another
# gets there as late too.
PATIENCE_S = 0.5
# Longer than what a lock may be waited for cannot be said.
_LONGEST_WAIT_S = 3600.0


class Ending:
    """Said once, and waited for by any thread at any moment: `threading.Event` has a lock, which a signal handler that
    closes would find held by what it has interrupted."""

    def __init__(self) -> None:
        self.is_said = False
        self._waiting: deque[SimpleQueue[None]] = deque()

    def say(self) -> None:
        self.is_said = True
        # SYNC POINT: pairs with `wait`, which is in the queue before it looks whether it has been said.
        for waiting in list(self._waiting):
            waiting.put(None)

    def wait(self) -> None:
        mine: SimpleQueue[None] = SimpleQueue()
        self._waiting.append(mine)
        while not self.is_said:
            with suppress(Empty):
                mine.get(timeout=PATIENCE_S)


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

    Args:
        ending: said when nobody takes them any more.
    """

    def __init__(self, ending: Ending) -> None:
        self._ending = ending
        self._given: deque[_Order] = deque()
        self._is_over = False
        # Held while there is nothing new, by nobody: who waits sleeps on it.
        self._bell = threading.Lock()
        self._bell.acquire()

    def give(self, act: Callable[[], None]) -> None:
        self._give(_Order(act))

    def _give(self, order: _Order) -> None:
        self._given.append(order)
        with suppress(RuntimeError):
            # Fails where it rings already: who hears it finds this order too.
            self._bell.release()
        # SYNC POINT: pairs with `end`, which says so before it takes orders a last time: one of both takes this one.
        if self._is_over:
            order()

    def ask(self, act: Callable[[], T]) -> T:
        """Has it done and waits for it. Returns what it gives, or raises what it raises."""
        answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def act_and_answer() -> None:
            try:
                answer.put((act(), None))
            except BaseException as error:
                answer.put((None, error))

        order = _Order(act_and_answer)
        self._give(order)
        value, error = self.wait_for(answer)
        if error is not None:
            try:
                raise error
            finally:
                # Or this frame and the error would keep each other, and the frames of whoever asked.
                del error
        return value  # type: ignore[return-value]

    def wait_for(self, queue: SimpleQueue[T]) -> T:
        """The next of a queue that orders put into.

        Raises:
            Empty: there is nothing, and nobody takes orders any more who would put something there.
        """
        while True:
            is_over = self._ending.is_said
            try:
                return queue.get(block=not is_over, timeout=PATIENCE_S)
            except Empty:
                if is_over:
                    raise

    def take(self, *, wait: bool = False, timeout_s: float | None = None) -> None:
        """Does what was given.

        Args:
            wait: for one first, so long at most; then all that are there are done, and else those of SHARE_S.
        """
        if wait and not self._given:
            self._bell.acquire(timeout=_LONGEST_WAIT_S if timeout_s is None else min(timeout_s, _LONGEST_WAIT_S))
        if self._given:
            end_s = time.monotonic() + SHARE_S
            self._do_next()
            while self._given and (wait or time.monotonic() < end_s):
                self._do_next()

    def _do_next(self) -> None:
        # It stays until it is done: whatever keeps this thread from doing it, `end` finds it.
        self._given[0]()
        self._given.popleft()

    def end(self) -> None:
        """Does what is left; what is given from now on is done by who gives it."""
        self._is_over = True
        while self._given:
            # One that fails must not keep the others from being done: whoever gave it waits no more, as it is over.
            with suppress(Exception):
                self._given.popleft()()
