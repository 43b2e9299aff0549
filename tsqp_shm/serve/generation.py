"""Completions of one HTTP request, as the event loop sees them: no thread for each, for as long as who has asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.updates import Update


class Generation:
    """Runs completions from the same step on, and cancels what is left of them when it is left."""

    def __init__(self, runtime: Runtime, completions: Sequence[Completion]) -> None:
        self.completions = completions
        self._runtime = runtime
        self._updates: asyncio.Queue[Update] = asyncio.Queue()

    def begin(self) -> None:
        """Raises:
        TsqpError: the session is over, or a completion cannot be run.
        """
        # The loop may have ended when the runtime tells: it is told so by an error, and cancels.
        loop, put = asyncio.get_running_loop(), self._updates.put_nowait

        def told(update: Update) -> None:
            loop.call_soon_threadsafe(put, update)

        self._runtime.add(self.completions, told)

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
