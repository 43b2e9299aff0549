"""What a mode has taken of the weights, once a session; the checkpoint is closed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.engine import Engine
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue


class Loaded:
    """Attributes:
    linears_digest: of the Linears as integers, for the GPU process to compare; "" where it has no need of them.
    """

    linears_digest = ""

    def make_engine(self, slots: Slots, queue: SubmissionQueue, statistics: Statistics) -> Engine:
        """An engine of one connection, whose ports lead to the GPU process at the other end of `queue`."""
        raise NotImplementedError

    def begin(self, session: str, stack: ExitStack) -> None:
        """The session of that name begins; what ends with it is laid on the stack."""

    def meet(self, device: str) -> None:
        """A GPU process is ready, with this device, as it says."""

    def wait_until_ready(self, report: Callable[[str], None], look: Callable[[], None]) -> None:
        """Returns when a first request may come.

        Args:
            report: takes lines about what is waited for.
            look: called now and then meanwhile; what it raises ends the wait.
        """

    def work(self, is_busy: bool) -> None:
        """Steps are computed from here on, or none is for the moment."""

    def describe(self) -> dict[str, Any]:
        """What of it belongs to the bring-up report, as plain values."""
        return {}

    def pads(self) -> dict[str, Any] | None:
        """What has become of the session's pads so far, as plain values; None: there are none."""
        return None
