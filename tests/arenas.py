"""Arenas in POSIX shared memory, without a session around them."""

from __future__ import annotations

import secrets
from contextlib import closing

from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.memory import PosixMemory, SharedObject
from tsqp_shm.shm.transport import Hold


def new_name() -> str:
    return f"/tsqp-shm-test-{secrets.token_hex(4)}"


def new_arena(plan: Plan, name: str | None = None, epoch: int = 1) -> Arena:
    return Arena.create(PosixMemory.create(name or new_name(), plan.total_bytes), plan, epoch)


def arena_of(session: Hold, plan: Plan, epoch: int = 1) -> Arena:
    return Arena.create(session.create_memory(plan.total_bytes), plan, epoch)


def attach_arena(name: str, plan: Plan) -> Arena:
    with closing(SharedObject(name)) as shared:
        return Arena.attach(shared.map(plan.total_bytes), plan)
