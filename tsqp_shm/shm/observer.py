"""A look at a session from outside: its control words and records, and nothing of its slots.

It has a transport's glance and no more, so it cannot change a byte, hold memory, or wait for a role. What it reads may
have been written by the GPU process: for display only.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import NamedTuple

from tsqp_shm.errors import ArenaMismatch, ArenaNotReady
from tsqp_shm.shm import layout
from tsqp_shm.shm.invitation import Invitation, invitation_in
from tsqp_shm.shm.plan import Geometry, Plan
from tsqp_shm.shm.progress import Progress
from tsqp_shm.shm.protocol import Record
from tsqp_shm.shm.transport import Glance, Transport

# The words of native/border/layout.h's Control, each on a pair of cache lines.
_CONTROL = struct.Struct("<" + 8 * "Q120x")
_WORD = struct.Struct("<Q")


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
        behind: the one whose completion was collected last, if there is one; what the TEE computes comes after it.
    """

    at_ns: int
    control: Control
    progress: Progress
    in_flight: tuple[Record, ...]
    behind: Record | None


class Observer:
    """Looks at one session; `close` at the end.

    Args:
        session: its name, for display.

    Raises:
        ArenaNotReady: it has neither arena nor page, not yet or not any more.
        ArenaMismatch: another version of this package made it.
    """

    def __init__(self, session: str, transport: Transport) -> None:
        self.session = session
        self._glance = transport.glance()
        try:
            self.invitation = invitation_of(session, self._glance)
            self.plan = Plan.derive(Geometry.of_plain(self.invitation.geometry), self.invitation.limits)
        except BaseException:
            self._glance.close()
            raise

    @property
    def is_gone(self) -> bool:
        """Whether the arena is: the session has ended, or its GPU process is started anew."""
        return self._glance.is_gone

    def look(self) -> Look:
        page = self._glance.read()
        control = Control._make(_CONTROL.unpack_from(page, layout.CONTROL_OFFSET_BYTES))
        # A ring is never longer, whatever the words say.
        last = min(control.submitted, control.completed + layout.RING_DEPTH)
        in_flight = [_submission(page, position) for position in range(control.completed, last)]
        return Look(
            time.perf_counter_ns(),
            control,
            Progress.load(page),
            tuple(record for record in in_flight if record is not None),
            _submission(page, control.collected - 1) if control.collected else None,
        )

    def close(self) -> None:
        self._glance.close()


def _submission(page: bytes, position: int) -> Record | None:
    """None: it was overwritten meanwhile."""
    start = layout.SUBMISSION_RING_OFFSET_BYTES + position % layout.RING_DEPTH * layout.RECORD_BYTES
    record = Record.unpack(page[start : start + layout.RECORD_BYTES])
    return record if record.sequence == position + 1 else None


def invitation_of(session: str, glance: Glance) -> Invitation:
    """What the TEE of a session has published of it.

    Raises:
        ArenaNotReady: nothing yet.
        ArenaMismatch: another version of this package made it.
        TsqpError: it cannot be read.
    """
    # Looked at twice: what was copied before the version word was there may be half of an invitation.
    (version,) = _WORD.unpack_from(glance.read(), layout.HEADER_VERSION_OFFSET_BYTES)
    if version == 0:
        raise ArenaNotReady(session, f"session {session!r} has none at the moment")
    if version != layout.VERSION:
        raise ArenaMismatch(session, "layout version", layout.VERSION, version)
    return Invitation.parse(invitation_in(session, glance.read()))
