"""Bring-up: the TEE's side of a session, from its name to a GPU process that answers."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig, Limits
from tsqp_shm.errors import PeerTimeout, TsqpError
from tsqp_shm.model.network import Network
from tsqp_shm.modes import MODES, Mode
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.doorbell import Doorbell, open_doorbell
from tsqp_shm.shm.invitation import Invitation
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, LOOK_INTERVAL_S, PeerWatch
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.progress import Progress
from tsqp_shm.shm.protocol import Opcode, unpack_identity
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.transport import Hold
from tsqp_shm.tee.connection import CLOSED
from tsqp_shm.tee.engine import Engine
from tsqp_shm.tee.finite import FiniteSubmissionQueue
from tsqp_shm.tee.loaded import Loaded
from tsqp_shm.tee.progress import ProgressWriter, store_in
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue
from tsqp_shm.tee.telling import Telling
from tsqp_shm.trace.doorbell import SubmittingDoorbell
from tsqp_shm.trace.recorder import Recorder

# How long the answer to STOP is waited for.
STOP_S = 5.0


class GpuProcess(Protocol):
    """A hold on the GPU process; `process.RoleProcess` and `lifeline.ParentsGpu` are two."""

    def death(self) -> TsqpError | None: ...
    def came_up(self) -> object: ...
    def stop(self) -> object: ...
    def kill(self) -> object: ...


StartGpu = Callable[[Hold], GpuProcess | None]


@dataclass
class StoppableWatch:
    """What is looked at now and then while the peer is waited for: whether to go on waiting at all, what else is due,
    and the peer's life.

    Attributes:
        has_stopped: a wait was ended because it was to stop, and not by anything that the peer did.
        tell_of_pulse: called once, when the peer's heart has begun to beat; None: nobody is.
    """

    peer: PeerWatch
    must_stop: Callable[[], bool]
    look: Callable[[], None]
    has_stopped: bool = False
    tell_of_pulse: Callable[[], object] | None = None

    @property
    def heartbeat_age_s(self) -> float | None:
        return self.peer.heartbeat_age_s

    def check(self) -> None:
        """Raises:
        TsqpError: it is to stop.
        PeerDied: the peer is gone.
        """
        if self.must_stop():
            self.has_stopped = True
            raise TsqpError(CLOSED)
        self.look()
        self.peer.check()
        tell = self.tell_of_pulse
        if tell is not None and self.heartbeat_age_s is not None:
            self.tell_of_pulse = None
            tell()

    def require_pulse(self, timeout_s: float, started: float) -> None:
        """Waits until the peer's heartbeat has moved: whoever answers without one has no hold on the arena.

        Args:
            timeout_s: how long at most, since `started`, of the monotonic clock.

        Raises:
            PeerTimeout: there is none.
            TsqpError: as `check`.
        """
        while True:
            self.check()
            if self.heartbeat_age_s is not None:
                return
            waited_s = time.monotonic() - started
            if waited_s > timeout_s:
                raise PeerTimeout("a heartbeat in the arena", "", waited_s, None)
            time.sleep(LOOK_INTERVAL_S)


@dataclass
class GpuConnection:
    """A `Connection` to one GPU process; use `GpuConnection.open`, and `close` or `abandon` at the end.

    Attributes:
        gpu_pid, gpu_device, gpu_transfer: what the GPU process says of itself; for display.
    """

    session: Hold
    arena: Arena
    slots: Slots
    queue: SubmissionQueue
    doorbell: Doorbell
    doorbell_mode: str
    endpoint: str
    statistics: Statistics
    progress: ProgressWriter
    gpu_process: GpuProcess | None
    watch: StoppableWatch
    engine: Engine
    loaded: Loaded
    gpu_pid: int = 0
    gpu_device: str = ""
    gpu_transfer: str = ""
    _stack: ExitStack = field(default_factory=ExitStack)
    _is_broken: bool = False
    _is_abandoned: bool = False

    @classmethod
    def open(
        cls,
        session: Hold,
        network: Network,
        config: EngineConfig,
        limits: Limits,
        statistics: Statistics,
        loaded: Loaded,
        start_gpu: StartGpu | None,
        report: Callable[[str], None] = lambda line: None,
        recorder: Recorder | None = None,
        must_stop: Callable[[], bool] = lambda: False,
        look: Callable[[], None] = lambda: None,
        ready_timeout_s: float | None = None,
    ) -> GpuConnection:
        """Publishes an arena with an epoch of its own, and waits until the GPU process is ready.

        Args:
            session: has no other connection.
            start_gpu: starts a GPU process for the session; None: somebody else does.
            report: takes a line about what is waited for.
            recorder: takes what this process does and when; None: nothing does.
            must_stop: asked now and then while the peer is waited for; True ends the wait, and with it the session.
            look: called as often; does what is due meanwhile.
            ready_timeout_s: how long the GPU process may take to be ready, its heartbeat included; None: as long as a
                step.

        Raises:
            TsqpError: what kept it from coming up; nothing is left behind but the session.
        """
        plan = Plan.derive(network, limits)
        with ExitStack() as stack:
            # Started first: loading torch takes longer than everything else here, and it waits for the invitation.
            gpu_process = start_gpu(session) if start_gpu else None
            if gpu_process is not None:
                stack.callback(gpu_process.stop)
            arena = stack.enter_context(
                Arena.create(session.create_memory(plan.total_bytes), plan, secrets.randbits(63) | 1)
            )
            slots = Slots(plan, arena)
            stack.callback(slots.release)
            heartbeat = _native.Heartbeat(arena.buffer, "tee", HEARTBEAT_INTERVAL_MS)
            stack.callback(heartbeat.release)
            doorbell = open_doorbell(config.doorbell, arena, "tee", session.open_waker, config.spin_us, config.yield_us)
            stack.callback(doorbell.close)
            if recorder is not None:
                recorder.describe(plan)
                doorbell = SubmittingDoorbell(doorbell, recorder)
            invitation = Invitation(
                endpoint=session.endpoint,
                doorbell=config.doorbell,
                spin_us=config.spin_us,
                yield_us=config.yield_us,
                limits=limits,
                geometry=plan.geometry.plain(),
                tee_pid=os.getpid(),
                linears_digest=loaded.linears_digest,
            )
            arena.publish(invitation.pack())
            watch = StoppableWatch(PeerWatch(arena, "gpu", gpu_process), must_stop, look)
            make_queue = FiniteSubmissionQueue if config.check_finite else SubmissionQueue
            queue = make_queue(slots, doorbell, watch, arena.epoch, config.timeout_s, statistics)
            connection = cls(
                session, arena, slots, queue, doorbell, config.doorbell, session.endpoint, statistics,
                ProgressWriter(_publish_in(arena, MODES[limits.mode]), statistics), gpu_process, watch,
                loaded.make_engine(slots, queue, statistics), loaded,
            )  # fmt: skip
            stack.callback(connection._stop_gpu)
            if session.folder is not None and MODES[limits.mode].has_pads:
                stack.callback(Telling(session.folder, connection._tell).close)
            timeout_s = config.timeout_s if ready_timeout_s is None else ready_timeout_s
            if gpu_process is None:
                command = " ".join(("tsqp-shm gpu MODEL", *session.gpu_flags))
                report(f"waiting up to {timeout_s:.0f} s for the GPU process: {command}")
            else:
                report("waiting: the GPU process imports torch")
                # Its heart beats when it has that behind it.
                watch.tell_of_pulse = lambda: report("waiting: the GPU process loads weights")
            started, waited_ns = time.monotonic(), statistics.waiting_ns
            identity = queue.call(Opcode.READY, timeout_s).value
            watch.require_pulse(timeout_s, started)
            watch.tell_of_pulse = None
            statistics.start_waiting_ns += statistics.waiting_ns - waited_ns
            # From here on it is asked to stop: whoever has no hold on the arena is not.
            connection.gpu_pid, connection.gpu_device, connection.gpu_transfer = unpack_identity(identity)
            loaded.meet(connection.gpu_device)
            if gpu_process is not None:
                gpu_process.came_up()
            connection._stack = stack.pop_all()
        return connection

    def _tell(self) -> dict[str, Any]:
        """What the arena says nothing of, for who watches the session."""
        return {"pads": self.pads, "withheld": self.progress.progress.withheld()}

    def _stop_gpu(self) -> None:
        """Tells the GPU process to end, if it still listens."""
        # One that is in the middle of a long operation still listens: it is told, and not waited for.
        if (self._is_broken and not self.watch.has_stopped) or not self.gpu_pid:
            return
        if not self.watch.has_stopped:
            # That the session is closed is why it is asked, and no reason not to hear the answer.
            self.watch.must_stop = lambda: False
        try:
            self.queue.call(Opcode.STOP, timeout_s=STOP_S)
        except TsqpError:
            # It is stopped firmly by whoever started it.
            self._is_broken = True

    @property
    def plan(self) -> Plan:
        return self.arena.plan

    @property
    def num_lent(self) -> int:
        return self.slots.num_lent

    @property
    def pads(self) -> dict[str, Any] | None:
        return self.loaded.pads()

    def begin(self) -> None:
        self.arena.renew_guard()
        self.loaded.work(True)

    def rest(self) -> None:
        self.loaded.work(False)

    def settle(self) -> None:
        self.queue.drain()

    def mark_broken(self) -> None:
        self._is_broken = True

    def close(self) -> None:
        """Stops the GPU process and removes the arena. Closing twice does nothing."""
        self._stack.close()

    def abandon(self) -> None:
        """Closes where the GPU process is dead. One that was only believed dead is killed if it is a child; if not, it
        keeps the old arena's memory, and cannot reach what comes after."""
        self._is_broken = True
        if not self._is_abandoned:
            self.statistics.earlier_waits.update(self.doorbell.waits)
        self._is_abandoned = True
        if self.gpu_process is not None:
            self.gpu_process.kill()
        self.close()

    def describe(self) -> dict[str, Any]:
        plan = self.arena.plan
        residency = self.arena.residency
        return {
            "mode": plan.limits.mode,
            "session": self.session.name,
            "arithmetic": plan.limits.arithmetic,
            "arena": {
                "name": self.arena.name,
                "bytes": plan.total_bytes,
                "slots": len(plan.shared_slots),
                "pages": residency.pages,
                "locked": residency.locked,
                "locked_reason": residency.locked_reason,
            },
            "doorbell": {"mode": self.doorbell_mode, "endpoint": self.endpoint},
            "processes": {
                "tee": {"pid": os.getpid()},
                "gpu": {"pid": self.gpu_pid, "restarts": self.statistics.gpu_restarts},
            },
            "device": self.gpu_device,
            "transfer": self.gpu_transfer,
            **self.loaded.describe(),
        }

    def facts(self, *, asks: bool) -> dict[str, Any]:
        facts = self.describe()
        if self.pads is not None:
            facts["pads"].update(self.pads)
        statistics = self.statistics
        # What the GPU process says its peak memory is; for display.
        facts["processes"]["gpu"]["peak_rss_bytes"] = self.queue.call(Opcode.STATUS).value if asks else 0
        facts["doorbell"].update(
            rung=statistics.doorbells,
            round_trip_p50_us=statistics.round_trip_us(50),
            round_trip_p99_us=statistics.round_trip_us(99),
            waits=dict(statistics.earlier_waits + (Counter() if self._is_abandoned else self.doorbell.waits)),
            waiting_s=statistics.waiting_ns / 1e9,
            start_waiting_s=statistics.start_waiting_ns / 1e9,
        )
        facts["bytes"] = {
            "to_gpu": statistics.bytes_to_gpu,
            "to_tee": statistics.bytes_to_tee,
            # Every tensor crosses in its slot; a record is 64 bytes of numbers.
            "serialised": 0,
        }
        return facts


def _publish_in(arena: Arena, mode: Mode) -> Callable[[Progress], None]:
    if not mode.has_pads:
        return lambda progress: store_in(arena, progress)
    # Whoever controls the GPU process reads them: they follow from lengths alone.
    return lambda progress: store_in(arena, progress.public())
