"""Whether the other process is alive: its heartbeat in the arena and, where it is a child, its exit."""

from __future__ import annotations

import time
from typing import Protocol

from tsqp_shm import _native
from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena

HEARTBEAT_INTERVAL_MS = 100
# A peer's death must be known within a second, but a machine that stands still for a moment must not pass for one. So a
# heartbeat counts as stopped where it was missing for SILENCE_S and over SILENT_LOOKS looks: while the machine stands
# still, this process does not look either.
SILENCE_S = 0.7
# One whose exit is told, a child or a sibling, is dead by that; silence is its end only where it was stopped. While it
# ends it beats no more, which on a busy machine takes longer than SILENCE_S, and then it says why it did.
TOLD_SILENCE_S = 5.0
SILENT_LOOKS = 6
LOOK_INTERVAL_S = 0.08

HEARTBEAT_OFFSETS = {
    "tee": layout.TEE_HEARTBEAT_OFFSET_BYTES,
    "gpu": layout.GPU_HEARTBEAT_OFFSET_BYTES,
}


class ChildProcess(Protocol):
    """What liveness asks of a child; `roles.process.RoleProcess` and `roles.thread.RoleThread` answer it."""

    def death(self) -> TsqpError | None:
        """Why the child ended, or None while the child lives."""


class PeerWatch:
    """Looks after one peer; `check` is called while waiting, at least every LOOK_INTERVAL_S."""

    def __init__(self, arena: Arena, role: str, child: ChildProcess | None = None) -> None:
        self.role = role
        self._arena = arena
        self._child = child
        self._silence_s = SILENCE_S if child is None else TOLD_SILENCE_S
        self._beat = 0
        self._beat_at: float | None = None
        self._looks = 0
        self._looked_at = 0.0

    @property
    def heartbeat_age_s(self) -> float | None:
        """Seconds since the heartbeat was seen to change; None if it never was."""
        return None if self._beat_at is None else time.monotonic() - self._beat_at

    def check(self) -> None:
        """Raises:
        PeerDied: the peer has exited, or its heartbeat has stopped. One that has not begun is not dead.
        """
        if self._child is not None:
            death = self._child.death()
            if death is not None:
                raise death
        now = time.monotonic()
        # Half of the interval is enough: a wait that ends a moment early would else skip this look, and the peer would
        # be looked at after two intervals.
        if now - self._looked_at < LOOK_INTERVAL_S / 2:
            return
        self._looked_at = now
        # UNTRUSTED: any change counts as life and nothing else is concluded from it.
        beat = _native.load_word(self._arena.buffer, HEARTBEAT_OFFSETS[self.role])
        if beat != self._beat:
            self._beat, self._beat_at, self._looks = beat, now, 0
            return
        self._looks += 1
        age = self.heartbeat_age_s
        if age is not None and age > self._silence_s and self._looks >= SILENT_LOOKS:
            # A peer that was stopped (SIGSTOP) is given up too: from here it cannot be told from a dead one, and
            # waiting for it would delay the report of a death.
            raise PeerDied(self.role, f"no heartbeat for {age:.1f} s: it has ended, or was stopped")
