"""An arena whose pages somebody takes away: an error that says so, and never a signal that ends the process."""

import os
import secrets
import signal
import subprocess
import sys

import numpy as np
import pytest
from arenas import attach_arena, new_arena

from tsqp_shm import _native
from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu import _products
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.slots import open_slots

ROWS, ELEMENTS = 512, 1024
PLAN = Plan.of_slots([("a", "float32", ROWS, ELEMENTS)])


@pytest.fixture
def name():
    return f"/tsqp-shm-test-{secrets.token_hex(4)}"


def truncate(name: str, size_bytes: int = 0) -> None:
    os.truncate(f"/dev/shm{name}", size_bytes)


def test_a_truncated_arena_is_an_error_at_its_next_use_and_ever_after(name, forked):
    def use():
        with new_arena(PLAN, name) as arena, open_slots(arena) as slots:
            out = np.ones((2, ELEMENTS), np.float32)
            truncate(name)
            with pytest.raises(ProtocolError, match="cut the object short") as caught:
                _native.load_rows(slots.table, 0, 0, 2, out)
            assert caught.value.field == "arena"
            assert (out == 0).all()
            # Nothing is read of what somebody maps there next.
            truncate(name, PLAN.total_bytes)
            for use_again in (
                lambda: _native.load_word(arena.buffer, 0),
                lambda: _native.store_rows(slots.table, 0, 0, 2, out),
                lambda: _native.RingReader(arena.buffer, "completion").read(0, 0),
                lambda: _native.RingReader(arena.buffer, "completion").park(),
                lambda: _native.RingWriter(arena.buffer, "submission").write(bytes(64)),
            ):
                with pytest.raises(ProtocolError, match="arena"):
                    use_again()

    forked(use).join()


def test_what_a_ring_makes_of_the_zeros_is_not_what_is_reported(name, forked):
    def use():
        with new_arena(PLAN, name) as arena:
            writer = _native.RingWriter(arena.buffer, "completion")
            reader = _native.RingReader(arena.buffer, "completion")
            writer.write(bytes(64))
            reader.read(0, 0)
            truncate(name)
            with pytest.raises(ProtocolError) as caught:
                reader.read(0, 0)
            assert caught.value.field == "arena"
            writer.release()
            reader.release()

    forked(use).join()


def test_threads_of_native_code_survive_too(name, forked):
    """Their signals are blocked, and a fault that is blocked where it happens kills whatever handler there is."""

    def use():
        _native.set_num_threads(2)
        with new_arena(PLAN, name) as arena, open_slots(arena) as slots:
            heartbeat = _native.Heartbeat(arena.buffer, "tee", 1)
            out = np.empty((ROWS, ELEMENTS), np.float32)
            _native.load_rows(slots.table, 0, 0, ROWS, out)
            truncate(name)
            with pytest.raises(ProtocolError, match="arena"):
                while True:  # until the heartbeat's thread, or this one, has found it gone
                    _native.load_word(arena.buffer, layout.TEE_HEARTBEAT_OFFSET_BYTES)
            for _ in range(20):
                with pytest.raises(ProtocolError, match="arena"):
                    _native.load_rows(slots.table, 0, 0, ROWS, out)
            heartbeat.release()

    forked(use).join()


def test_the_products_of_the_gpu_process_survive_it_and_its_next_look_at_the_arena_does_not(name, forked):
    """They are in an extension of their own, and the handler is not."""
    width, plan = 64, Plan.of_slots([("x", "bfloat16", ROWS, 64), ("logits", "bfloat16", ROWS, ELEMENTS)])
    instruction_set = _native.active_instruction_set()
    if _products.panel_kernels(instruction_set) is None:
        pytest.skip(f"{instruction_set} has no packed products")

    def use():
        _products.set_num_threads(2)
        with new_arena(plan, name) as arena, open_slots(arena) as slots:
            sizes = dict.fromkeys(("num_layers", "num_heads", "num_kv_heads"), 1)
            sizes |= dict.fromkeys(("hidden", "intermediate", "head_dim"), width)
            sizes |= {"vocabulary": ELEMENTS, "max_tokens": ROWS}
            products = _products.CpuProducts(slots.table, instruction_set, np.zeros((1, 1), np.int32), **sizes)
            products.set_lm_head(np.ones((ELEMENTS, width), np.uint16))
            products.lm_head(0, 1, 0, ROWS)
            truncate(name)
            for _ in range(20):
                products.lm_head(0, 1, 0, ROWS)
            with pytest.raises(ProtocolError, match="arena"):
                _native.load_word(arena.buffer, 0)

    forked(use).join()


def test_a_part_that_was_cut_off_is_noticed_when_it_is_used(name, forked):
    def use():
        with new_arena(PLAN, name) as arena, open_slots(arena) as slots:
            truncate(name, layout.SLOTS_OFFSET_BYTES)
            _native.load_word(arena.buffer, 0)
            with pytest.raises(ProtocolError, match="arena"):
                _native.store_rows(slots.table, 0, ROWS - 1, 1, np.ones((1, ELEMENTS), np.float32))

    forked(use).join()


def test_the_next_arena_is_whole_again(name, forked):
    def use():
        for attempt in range(70):
            with new_arena(PLAN, name) as arena:
                _native.load_word(arena.buffer, 0)
                if attempt % 2:
                    truncate(name)
                    with pytest.raises(ProtocolError):
                        _native.load_word(arena.buffer, 0)

    forked(use).join()


def test_whoever_attaches_to_an_arena_that_shrinks_gets_an_error(name, forked, monkeypatch):
    def attach():
        read_header = Arena.attach.__func__.__globals__["_read_header"]

        def shrink_first(*arguments):
            truncate(name)
            return read_header(*arguments)

        monkeypatch.setitem(Arena.attach.__func__.__globals__, "_read_header", shrink_first)
        with pytest.raises(ProtocolError, match="arena"):
            attach_arena(name, PLAN)

    with new_arena(PLAN, name) as arena:
        arena.publish()
        forked(attach).join()


FAULT_ELSEWHERE = """
import mmap, os, sys
from pathlib import Path
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.memory import PosixMemory
name, path = sys.argv[1:]
plan = Plan.of_slots([("a", "float32", 1, 1)])
with Arena.create(PosixMemory.create(name, plan.total_bytes), plan, 1):
    Path("/dev/shm" + name).unlink()
    with open(path, "w+b") as file:
        file.truncate(4096)
        other = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
        other[0]
"""


@pytest.mark.parametrize("handler", [[], ["-X", "faulthandler"]])
def test_a_fault_elsewhere_finds_the_handler_that_was_there_before(name, tmp_path, handler):
    ended = subprocess.run(
        [sys.executable, *handler, "-c", FAULT_ELSEWHERE, name, str(tmp_path / "other")], stderr=subprocess.PIPE
    )
    assert ended.returncode == -signal.SIGBUS
    assert (b"Bus error" in ended.stderr) == bool(handler)
