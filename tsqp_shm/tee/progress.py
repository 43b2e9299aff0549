"""Publishes what a session has done so far, a few stores a step."""

from __future__ import annotations

import time
from collections.abc import Callable

from tsqp_shm import _native
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.progress import Progress
from tsqp_shm.tee.statistics import Statistics

# Percentiles are sorted out of so many of the newest round trips, and not at every step.
NEWEST_ROUND_TRIPS = 1024
PERCENTILES_INTERVAL_NS = 250_000_000


class ProgressWriter:
    """Args:
    publish: takes what there is to be seen from outside.

    Attributes:
        progress: what was published last.
    """

    def __init__(self, publish: Callable[[Progress], None], statistics: Statistics) -> None:
        self._publish = publish
        self._statistics = statistics
        self.progress = Progress()
        self._sorted_ns = 0

    def step_begins(self, running: int, waiting: int) -> None:
        self._store(running, waiting, step_began_ns=time.perf_counter_ns())

    def step_ends(self, running: int, waiting: int) -> None:
        now_ns = time.perf_counter_ns()
        if now_ns - self._sorted_ns > PERCENTILES_INTERVAL_NS:
            self._sorted_ns = now_ns
            ordered = sorted(self._statistics.submissions.newest_round_trips(NEWEST_ROUND_TRIPS))
            if ordered:
                p50_ns, p99_ns = (ordered[len(ordered) * percent // 100] for percent in (50, 99))
                self.progress = self.progress._replace(round_trip_p50_ns=p50_ns, round_trip_p99_ns=p99_ns)
        self._store(running, waiting, step_ended_ns=now_ns)

    def _store(self, running: int, waiting: int, **moment: int) -> None:
        statistics = self._statistics
        self.progress = self.progress._replace(
            steps=statistics.steps,
            tokens=statistics.tokens,
            generated=statistics.generated,
            doorbells=statistics.doorbells,
            running=running,
            waiting=waiting,
            **moment,
        )
        self._publish(self.progress)


def store_in(arena: Arena, progress: Progress) -> None:
    """Each word whole; a reader may see words of two moments."""
    for index, value in enumerate(progress):
        _native.store_word(arena.buffer, layout.PROGRESS_OFFSET_BYTES + 8 * index, value)
