"""What a session has done so far: operations of both sides, doorbells, bytes."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from tsqp_shm.trace.recorder import Recorder

# Round trips kept for the percentiles: the newest ones.
ROUND_TRIP_SAMPLES = 16384


@dataclass
class OperationTally:
    """Calls of one operation and the time they took."""

    calls: int = 0
    total_ns: int = 0


@dataclass
class Statistics:
    """Tallies of one session; kept by the TEE process.

    Attributes:
        tee: this process's kernels by name, timed here.
        gpu: the GPU process's operations by opcode name, with the times that it claims: for display only.
        doorbells: submissions rung.
        gpu_restarts: GPU processes that took the place of one that had died.
        bytes_to_gpu: bytes of slots handed over for the GPU process to read.
        bytes_to_tee: bytes of slots handed back with a result.
        waiting_ns: how long this process waited for completions.
        steps: forward passes of the scheduler, `tokens` that went through the model in them, and `generated` ones.
        round_trips_ns: submission to completion less the work itself, where nothing else was in flight.
    """

    tee: defaultdict[str, OperationTally] = field(default_factory=lambda: defaultdict(OperationTally))
    gpu: defaultdict[str, OperationTally] = field(default_factory=lambda: defaultdict(OperationTally))
    doorbells: int = 0
    gpu_restarts: int = 0
    bytes_to_gpu: int = 0
    bytes_to_tee: int = 0
    waiting_ns: int = 0
    steps: int = 0
    tokens: int = 0
    generated: int = 0
    round_trips_ns: deque[int] = field(default_factory=lambda: deque(maxlen=ROUND_TRIP_SAMPLES))

    def count(self, operation: str, started_ns: int) -> None:
        """Counts one call of a TEE operation, which began at `started_ns` of `time.perf_counter_ns`."""
        tally = self.tee[operation]
        tally.calls += 1
        tally.total_ns += time.perf_counter_ns() - started_ns

    def operations(self) -> list[dict[str, Any]]:
        """One entry for each operation of either side.

        Units: seconds; `share` is of the side's own total.
        """
        rows = []
        for side, tallies in (("gpu", self.gpu), ("tee", self.tee)):
            side_ns = sum(tally.total_ns for tally in tallies.values()) or 1
            for name, tally in tallies.items():
                rows.append(
                    {
                        "operation": name,
                        "side": side,
                        "calls": tally.calls,
                        "total_s": tally.total_ns / 1e9,
                        "mean_us": tally.total_ns / tally.calls / 1e3,
                        "share": tally.total_ns / side_ns,
                    }
                )
        return rows

    def round_trip_us(self, percentile: float) -> float | None:
        """Units: microseconds. None before the first round trip."""
        if not self.round_trips_ns:
            return None
        ordered = sorted(self.round_trips_ns)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percentile / 100))] / 1e3


class TracedStatistics(Statistics):
    """Statistics that also record each of this process's operations; without a trace there is no branch for one."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def count(self, operation: str, started_ns: int) -> None:
        super().count(operation, started_ns)
        self._recorder.slice(operation, started_ns, time.perf_counter_ns(), self._recorder.rung)
