"""Private memory that is kept from being swapped out, as far as the limit allows."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from models import RandomModel, model_folder

from tsqp_shm import _native
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.locking import lock_private

NOBODY = 65534
SLOT_BYTES = 1 << 20
CACHE_BYTES = 4 * 64 * (64 + 64) * 2 * 2


def locked_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.fixture
def slots():
    slots = Slots(Plan.of_slots([("x", "float32", 1024, SLOT_BYTES // 4096, "rows", "private")]), None)
    yield slots
    slots.release()


@pytest.fixture
def caches():
    return [_native.KeyValueCache(4, 64, np.arange(2, dtype=np.int32).reshape(1, 2)) for _ in range(2)]


def test_what_there_is_is_locked_where_the_limit_allows(slots, caches, forked):
    def run():
        before = locked_bytes()
        expected = {"keys": True, "stock": True, "slots": True, "caches": True, "reason": None}
        assert lock_private(slots, caches, stock=True) == expected
        assert locked_bytes() - before >= SLOT_BYTES + sum(cache.num_bytes for cache in caches)
        slots.release()

    forked(run).join()


@pytest.mark.skipif(os.geteuid() != 0, reason="root is above the limit, and becomes another user")
@pytest.mark.parametrize(
    ("limit_bytes", "has_slots", "has_caches"),
    [(64 << 10, False, False), (SLOT_BYTES + (64 << 10), True, False)],
)
def test_what_the_limit_has_no_room_for_is_named_with_the_limit(
    slots, caches, forked, limit_bytes, has_slots, has_caches
):
    def run():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit_bytes, limit_bytes))
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        locked = lock_private(slots, caches, stock=False)
        assert (locked["keys"], locked["stock"]) == (True, False)
        assert (locked["slots"], locked["caches"]) == (has_slots, has_caches)
        assert locked["reason"] == (
            f"not locked: {'stock, caches' if has_slots else 'stock, slots, caches'} (Cannot allocate memory; "
            f"the limit is {limit_bytes >> 10:,} KiB, raise it with ulimit -l or LimitMEMLOCK)"
        )

    forked(run).join()


@pytest.mark.skipif(os.geteuid() != 0, reason="root is above the limit")
def test_a_session_says_what_of_it_is_locked_where_that_is_asked_for(fast):
    model = model_folder(RandomModel("llama"))
    limits = {"pad_stock": 64, "max_model_len": 64, "max_num_seqs": 1}
    with fast.llm(model, mode="blinded", lock_memory=True, **limits) as llm:
        locks = llm.bring_up()["pads"]["locks"]
    assert locks == {"keys": True, "stock": True, "slots": True, "caches": True, "reason": None}
