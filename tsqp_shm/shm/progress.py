"""What the TEE tells about itself in the arena, for `tsqp-shm top`: counters and times, nothing of a prompt or answer.

Whoever controls the GPU process sees them too; they tell it nothing that it could not count itself. No role reads them.
Without an arena the words lie in a file of the session's folder, for this user's processes.

In a mode with pads the words that whoever controls the GPU process sees follow from lengths and batches alone. What
does not, times and how many wait, is 0 there, and goes with what is to be said of the pads over a socket in the
session's folder (`tee.telling`).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from tsqp_shm.shm import layout

# The socket, in the folder of a session that has one.
STATS_SOCKET = "stats"
# No answer on it is longer.
MAX_STATS_BYTES = 1 << 16


class Progress(NamedTuple):
    """One 8-byte word each, in this order.

    Units: nanoseconds of CLOCK_MONOTONIC; round trips over the newest ones, 0 before the first.
    """

    steps: int = 0
    tokens: int = 0  # through the model, those of prompts included
    generated: int = 0
    doorbells: int = 0
    running: int = 0  # sequences that have a cache
    waiting: int = 0
    step_began_ns: int = 0
    step_ended_ns: int = 0
    round_trip_p50_ns: int = 0
    round_trip_p99_ns: int = 0

    @classmethod
    def load(cls, arena: bytes) -> Progress:
        return cls._make(_WORDS.unpack_from(arena, layout.PROGRESS_OFFSET_BYTES))

    def public(self) -> Progress:
        return self._replace(**dict.fromkeys(WITHHELD, 0))

    def withheld(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in WITHHELD}

    def pack(self) -> bytes:
        return _WORDS.pack(*self)


# Those of the words that say more than what crosses.
WITHHELD = ("waiting", "step_began_ns", "step_ended_ns", "round_trip_p50_ns", "round_trip_p99_ns")
_WORDS = struct.Struct(f"<{len(Progress._fields)}Q")
