"""Completions of one HTTP request, as the event loop sees them: no thread for each, for as long as who has asked."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial

from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.updates import Update


class HandOver:
    """From the thread that runs steps to the event loop: the loop is woken once for all that a step tells, whoever is
    told. Made on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._told: deque[tuple[asyncio.Queue[Update], Update]] = deque()
        self._is_woken = False

    def give(self, queue: asyncio.Queue[Update], update: Update) -> None:
        """Raises:
        RuntimeError: the loop has ended.
        """
        self._told.append((queue, update))
        # SYNC POINT: pairs with `_take`, which says that it is awake no more before it looks what there is.
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._take)
            except RuntimeError:
                self._is_woken = False
                raise

    def _take(self) -> None:
        self._is_woken = False
        while self._told:
            queue, update = self._told.popleft()
            queue.put_nowait(update)


class Generation:
    """Runs completions from the same step on, and cancels what is left of them when it is left."""

    def __init__(self, runtime: Runtime, hand_over: HandOver, completions: Sequence[Completion]) -> None:
        self.completions = completions
        self._runtime, self._hand_over = runtime, hand_over
        self._updates: asyncio.Queue[Update] = asyncio.Queue()

    def begin(self) -> None:
        """Raises:
        TsqpError: the session is over, or a completion cannot be run.
        """
        # The loop may have ended when the runtime tells: it is told so by an error, and cancels.
        self._runtime.add(self.completions, partial(self._hand_over.give, self._updates))

    def end(self) -> None:
        """Cancels what has not ended, before the next step."""
        self._runtime.cancel([each for each in self.completions if each.finish_reason is None])

    async def updates(self) -> AsyncIterator[Update]:
        """Until each has ended.

        Raises:
            TsqpError: what has ended one of them.
        """
        going = len(self.completions)
        while going:
            update = await self._updates.get()
            if update.error is not None:
                raise update.error
            going -= update.is_last
            yield update
