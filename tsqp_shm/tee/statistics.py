"""What a session has done so far: operations of both sides, doorbells, bytes."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from tsqp_shm import _native
from tsqp_shm.tee.request_tallies import RequestTallies
from tsqp_shm.trace.recorder import Recorder


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
        submissions: what native code counts of doorbells; the properties below show it.
        gpu_restarts: GPU processes that took the place of one that had died.
        start_waiting_ns: how long it was waited for GPU processes to be ready.
        earlier_waits: how the waits for those that have died had ended.
        requests: what they come to.
        steps: forward passes of the scheduler, `tokens` that went through the model in them, and `generated` ones.
    """

    tee: defaultdict[str, OperationTally] = field(default_factory=lambda: defaultdict(OperationTally))
    submissions: _native.Tallies = field(default_factory=_native.Tallies)
    gpu_restarts: int = 0
    start_waiting_ns: int = 0
    earlier_waits: Counter[str] = field(default_factory=Counter)
    requests: RequestTallies = field(default_factory=RequestTallies)
    steps: int = 0
    tokens: int = 0
    generated: int = 0

    @property
    def gpu(self) -> dict[str, OperationTally]:
        """The GPU process's operations by name, with the times that it claims: for display only."""
        return {name: OperationTally(calls, total_ns) for name, calls, total_ns in self.submissions.operations()}

    @property
    def doorbells(self) -> int:
        """Submissions rung."""
        return self.submissions.doorbells

    @property
    def bytes_to_gpu(self) -> int:
        """Bytes of slots handed over for the GPU process to read."""
        return self.submissions.bytes_to_gpu

    @property
    def bytes_to_tee(self) -> int:
        """Bytes of slots handed over for a result."""
        return self.submissions.bytes_to_tee

    @property
    def waiting_ns(self) -> int:
        """How long this process waited for completions, those of a start left aside."""
        return self.submissions.waiting_ns - self.start_waiting_ns

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
            # A list, as the thread that counts may come upon a new operation meanwhile.
            counted = list(tallies.items())
            side_ns = sum(tally.total_ns for _, tally in counted) or 1
            for name, tally in counted:
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
        """From submission to completion less the work itself, where nothing else was in flight.

        Units: microseconds. None before the first round trip.
        """
        ordered = sorted(self.submissions.newest_round_trips())
        if not ordered:
            return None
        return ordered[min(len(ordered) - 1, int(len(ordered) * percentile / 100))] / 1e3


class TracedStatistics(Statistics):
    """Statistics that also record each of this process's operations; without a trace there is no branch for one."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def count(self, operation: str, started_ns: int) -> None:
        super().count(operation, started_ns)
        self._recorder.slice(operation, started_ns, time.perf_counter_ns(), self._recorder.rung)
