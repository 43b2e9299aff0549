"""A look at a session from outside: its control words and records, and nothing of its slots.

It reads through a read-only descriptor and maps nothing, so it cannot change a byte, hold memory, or wait for a role.
What it reads may have been written by the GPU process: for display only.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from typing import NamedTuple

import posix_ipc

from tsqp_shm.errors import ArenaNotReady
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Geometry, Plan
from tsqp_shm.shm.progress import Progress
from tsqp_shm.shm.protocol import Record
from tsqp_shm.shm.session import SESSION_FILE, Invitation, arena_name, sessions_folder

# The words of native/border/layout.h's Control, each on a pair of cache lines.
_CONTROL = struct.Struct("<" + 8 * "Q120x")


class Control(NamedTuple):
    submitted: int
    taken: int
    gpu_parked: int
    completed: int
    collected: int
    tee_parked: int
    tee_heartbeat: int
    gpu_heartbeat: int


@dataclass(frozen=True)
class Look:
    """What was there at one moment; words of one look may be some nanoseconds apart.

    Attributes:
        in_flight: submissions without a completion, the oldest first.
    """

    at_ns: int
    control: Control
    progress: Progress
    in_flight: tuple[Record, ...]


class Observer:
    """Looks at one session; `close` at the end.

    Raises:
        ArenaNotReady: it has no arena, not yet or not any more.
    """

    def __init__(self, session: str) -> None:
        self.session = session
        try:
            content = (sessions_folder() / session / SESSION_FILE).read_bytes()
            self._fd = posix_ipc.SharedMemory(arena_name(session), read_only=True).fd
        except (FileNotFoundError, posix_ipc.ExistentialError):
            raise ArenaNotReady(arena_name(session), f"session {session!r} has none at the moment") from None
        self.invitation = Invitation.parse(content)
        self.plan = Plan.derive(Geometry.of_plain(self.invitation.geometry), self.invitation.limits)

    @property
    def is_gone(self) -> bool:
        """Whether the arena was unlinked: the session has ended, or its GPU process is started anew."""
        return os.fstat(self._fd).st_nlink == 0

    def look(self) -> Look:
        page = os.pread(self._fd, layout.SLOTS_OFFSET_BYTES, 0).ljust(layout.SLOTS_OFFSET_BYTES, b"\0")
        control = Control._make(_CONTROL.unpack_from(page, layout.CONTROL_OFFSET_BYTES))
        in_flight = []
        # A ring is never longer, whatever the words say.
        last = min(control.submitted, control.completed + layout.RING_DEPTH)
        for position in range(control.completed, last):
            start = layout.SUBMISSION_RING_OFFSET_BYTES + position % layout.RING_DEPTH * layout.RECORD_BYTES
            record = Record.unpack(page[start : start + layout.RECORD_BYTES])
            # Else it was overwritten meanwhile.
            if record.sequence == position + 1:
                in_flight.append(record)
        return Look(time.perf_counter_ns(), control, Progress.load(page), tuple(in_flight))

    def close(self) -> None:
        os.close(self._fd)
