"""A session without a GPU process: the slots are this process's own memory, and nothing is waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from tsqp_shm import _native
from tsqp_shm.config import Limits
from tsqp_shm.errors import TsqpError
from tsqp_shm.model.network import Network
from tsqp_shm.shm.invitation import Invitation
from tsqp_shm.shm.liveness import LOOK_INTERVAL_S
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.transport import Registration
from tsqp_shm.tee.connection import CLOSED
from tsqp_shm.tee.engine import MakeEngineAlone
from tsqp_shm.tee.progress import ProgressWriter
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.trace.recorder import Recorder

_LOOK_INTERVAL_NS = int(LOOK_INTERVAL_S * 1e9)


class Alone:
    """A `Connection` to nobody.

    Args:
        registration: the session's, which has no other connection.
        recorder: takes what this process does and when; None: nothing does.
        must_stop: asked now and then between two operations; True ends the step, and with it the session.
        look: called as often; does what is due meanwhile.
    """

    num_lent = 0
    pads = None

    def __init__(
        self,
        registration: Registration,
        network: Network,
        limits: Limits,
        statistics: Statistics,
        make_engine: MakeEngineAlone,
        recorder: Recorder | None,
        must_stop: Callable[[], bool],
        look: Callable[[], None],
    ) -> None:
        self.plan = Plan.derive(network, limits)
        if self.plan.shared_slots:
            raise TsqpError(f"mode {limits.mode} has no GPU process, and slots that one would share")
        self._registration = registration
        self._must_stop = must_stop
        self._look = look
        self._look_ns = 0
        if recorder is not None:
            recorder.describe(self.plan)
        self._slots = Slots(self.plan, None)
        try:
            self.engine = make_engine(self._slots, self._look_between, statistics)
            self.progress = ProgressWriter(lambda progress: registration.tell(progress.pack()), statistics)
            registration.publish(self._invitation(limits).pack())
        except BaseException:
            self.close()
            raise

    def _invitation(self, limits: Limits) -> Invitation:
        return Invitation(
            endpoint="",
            doorbell="",
            spin_us=0,
            yield_us=0,
            limits=limits,
            geometry=self.plan.geometry.plain(),
            tee_pid=os.getpid(),
        )

    def _look_between(self) -> None:
        """What an engine calls between two operations."""
        now_ns = time.perf_counter_ns()
        if now_ns < self._look_ns:
            return
        self._look_ns = now_ns + _LOOK_INTERVAL_NS
        if self._must_stop():
            raise TsqpError(CLOSED)
        self._look()

    def begin(self) -> None:
        """Nothing has to be made ready."""

    def rest(self) -> None:
        """Nobody waits for it."""

    def settle(self) -> None:
        """Nothing is in flight between two operations."""

    def describe(self) -> dict[str, Any]:
        limits = self.plan.limits
        return {
            "mode": limits.mode,
            "session": self._registration.name,
            "arithmetic": limits.arithmetic,
            "threads": _native.get_num_threads(),
            "slots_bytes": self.plan.private_bytes,
            "processes": {"tee": {"pid": os.getpid()}},
        }

    def facts(self, *, asks: bool) -> dict[str, Any]:
        return self.describe()

    def mark_broken(self) -> None:
        """Nobody is at the other end."""

    def abandon(self) -> None:
        self.close()

    def close(self) -> None:
        self._slots.release()
