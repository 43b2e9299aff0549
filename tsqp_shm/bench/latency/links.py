"""Links between the two processes: each a session's arena with a doorbell, opened as a session opens them."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from tsqp_shm import _native
from tsqp_shm.bench.latency.payload import Words, answer
from tsqp_shm.errors import PeerTimeout
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.doorbell import open_doorbell
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, ChildProcess, PeerWatch
from tsqp_shm.shm.plan import Plan, SlotShape
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.protocol import Opcode, Status, SubmissionRules
from tsqp_shm.shm.slots import Slots, open_slots, slot_array
from tsqp_shm.shm.tiling import Tile
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue

TIMEOUT_S = 20.0
# Control.submission_parked of native/border/layout.h: odd while the peer sleeps, or is about to.
PARKED_OFFSET_BYTES = layout.CONTROL_OFFSET_BYTES + 2 * 128
# From the flag to the system call in which the peer sleeps.
FALL_ASLEEP_S = 0.001

_NAMED_SLOTS = ("tokens", "segments", "x", "hidden", "qk", "gate_up", "act", "logits")
_WHOLE = Tile(0, 1)


@dataclass(frozen=True)
class LinkSettings:
    """How a link is opened; the peer is told the same.

    Attributes:
        sizes: payloads in bytes, each with a slot of its own.
    """

    doorbell: str
    spin_us: int
    yield_us: int
    sizes: Sequence[int] = ()

    def plan(self) -> Plan:
        """Slots with the names that the protocol's rules know; a payload's is a score slot."""
        named = [SlotShape(name, "int32", 1, 4) for name in _NAMED_SLOTS]
        payloads = [SlotShape(f"scores.{n}", "int32", 1, size // 4, kind="tile") for n, size in enumerate(self.sizes)]
        return Plan.of_slots(named + payloads)


class Link:
    """The TEE's end.

    Attributes:
        invitation: what the peer has to know of it, as plain values.
    """

    def __init__(self, stack: ExitStack, name: str, settings: LinkSettings) -> None:
        self._session = stack.enter_context(Session.begin(f"bench-{os.getpid()}-{name}"))
        plan = settings.plan()
        self.arena: Arena = stack.enter_context(
            Arena.create(self._session.create_memory(plan.total_bytes), plan, secrets.randbits(63) | 1)
        )
        self._slots: Slots = stack.enter_context(open_slots(self.arena))
        stack.callback(_native.Heartbeat(self.arena.buffer, "tee", HEARTBEAT_INTERVAL_MS).release)
        self._doorbell = open_doorbell(
            settings.doorbell, self.arena, "tee", self._session.open_waker, settings.spin_us, settings.yield_us
        )
        stack.callback(self._doorbell.close)
        self.arena.publish()
        self._queue: SubmissionQueue
        self._x, self._qk = plan.slot("x"), plan.slot("qk")
        self._payloads = dict(zip(settings.sizes, plan.score_slots, strict=True))
        self.invitation: dict[str, Any] = {
            "session": self._session.name,
            "endpoint": self._session.endpoint,
            "settings": {**asdict(settings), "sizes": list(settings.sizes)},
        }

    def socket_path(self, name: str) -> str:
        """An endpoint for something else, in this link's session."""
        return f"ipc://{self._session.folder / name}"

    def connect(self, peer: ChildProcess) -> None:
        """The peer has attached: from here on it is watched."""
        watch = PeerWatch(self.arena, "gpu", peer)
        self._queue = SubmissionQueue(self._slots, self._doorbell, watch, self.arena.epoch, TIMEOUT_S, Statistics())

    def ring(self) -> None:
        """A submission as the engine makes it in decode, and its completion."""
        self._queue.wait(self._queue.submit(Opcode.QKV, in_slot=self._x, out_slot=self._qk, rows=1))

    def hand_over(self, size: int) -> None:
        slot = self._payloads[size]
        self._queue.wait(self._queue.submit(Opcode.CONTEXT, in_slot=slot, tile=_WHOLE, tile_bytes=size))

    def payload(self, size: int) -> Words:
        words: Words = self._slots.view(self._payloads[size]).reshape(-1).view(np.uint64)
        return words

    def wait_until_parked(self, peer: ChildProcess) -> None:
        """Raises:
        PeerDied, PeerTimeout: the peer does not go to sleep.
        """
        started = time.monotonic()
        while _native.load_word(self.arena.buffer, PARKED_OFFSET_BYTES) % 2 == 0:
            death = peer.death()
            if death is not None:
                raise death
            if time.monotonic() - started > TIMEOUT_S:
                raise PeerTimeout("the peer to sleep", "", TIMEOUT_S, None)
            time.sleep(0.0002)
        time.sleep(FALL_ASLEEP_S)


class PeerLink:
    """The other end: serves as `gpu.worker.Worker` does, but computes nothing."""

    def __init__(self, stack: ExitStack, invitation: dict[str, Any]) -> None:
        settings = LinkSettings(**invitation["settings"])
        plan = settings.plan()
        transport = PosixTransport(invitation["session"])
        joined = stack.enter_context(closing(transport.join(TIMEOUT_S, lambda line: None)))
        self.arena: Arena = stack.enter_context(Arena.attach(joined.map_memory(plan.total_bytes), plan))
        stack.callback(_native.Heartbeat(self.arena.buffer, "gpu", HEARTBEAT_INTERVAL_MS).release)
        open_waker = partial(joined.open_waker, invitation["endpoint"])
        self._doorbell = open_doorbell(
            settings.doorbell, self.arena, "gpu", open_waker, settings.spin_us, settings.yield_us
        )
        stack.callback(self._doorbell.close)
        self._watch = PeerWatch(self.arena, "tee")
        self._rules = SubmissionRules(plan, self.arena.epoch)
        self._words: dict[int, Words] = {
            slot.index: slot_array(self.arena, slot).reshape(-1).view(np.uint64) for slot in plan.score_slots
        }
        # Views of the arena have to go before it does.
        stack.callback(self._words.clear)

    def serve(self, trips: int, work_us: int = 0) -> None:
        """Answers so many submissions, each after this much processor time."""
        for _ in range(trips):
            submission = self._doorbell.receive(self._watch, TIMEOUT_S, "a submission")
            started_ns = time.perf_counter_ns()
            record = self._rules.accept(submission)
            if record.opcode == Opcode.CONTEXT:
                words = self._words[record.in_slot]
                answer(words, out=words)
            if work_us:
                _work(work_us)
            busy_ns = time.perf_counter_ns() - started_ns
            self._doorbell.complete(submission, Status.OK, busy_ns)


def _work(microseconds: int) -> None:
    end_ns = time.thread_time_ns() + 1000 * microseconds
    while time.thread_time_ns() < end_ns:
        pass
