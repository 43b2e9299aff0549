"""The other process of a trial of the doorbell: `python -m tsqp_shm.doctor.peer INVITATION`, a JSON object."""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import ExitStack, closing
from functools import partial
from typing import NoReturn

from tsqp_shm import _native
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.doorbell import open_doorbell
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, PeerWatch
from tsqp_shm.shm.plan import Plan, SlotShape
from tsqp_shm.shm.posix.transport import PosixTransport

TRIAL_PLAN = Plan.of_slots([SlotShape("trial", "float32", 1, 1)])
TRIAL_TIMEOUT_S = 10.0


def main() -> NoReturn:
    """Answers each record with itself until stdin closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    invitation = json.loads(sys.argv[1])
    with ExitStack() as stack:
        transport = PosixTransport(invitation["session"])
        joined = stack.enter_context(closing(transport.join(TRIAL_TIMEOUT_S, lambda line: None)))
        arena = stack.enter_context(Arena.attach(joined.map_memory(TRIAL_PLAN.total_bytes), TRIAL_PLAN))
        stack.callback(_native.Heartbeat(arena.buffer, "gpu", HEARTBEAT_INTERVAL_MS).release)
        open_waker = partial(joined.open_waker, invitation["endpoint"])
        doorbell = open_doorbell(
            invitation["mode"], arena, "gpu", open_waker, invitation["spin_us"], invitation["yield_us"]
        )
        stack.callback(doorbell.close)
        watch = PeerWatch(arena, "tee")
        while True:
            doorbell.send(doorbell.receive(watch, TRIAL_TIMEOUT_S, "a record"))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    # This side owns nothing that would stay behind.
    os._exit(0)


if __name__ == "__main__":
    main()
