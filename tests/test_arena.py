"""The arena: seen whole or not at all, refused when it is another's, and gone when its creator is."""

import errno
import os
import secrets
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from arenas import attach_arena, new_arena

from tsqp_shm import _native
from tsqp_shm.errors import ArenaError, ArenaMismatch, ArenaNotReady, ArenaTooSmall
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.objects import unlink_dead

PLAN = Plan.of_slots([("a", "float32", 10, 300), ("b", "bfloat16", 7, 5)])
EPOCH = 0x1234_5678_9ABC_DEF1


@pytest.fixture
def name():
    return f"/tsqp-shm-test-{secrets.token_hex(4)}"


@pytest.fixture
def arena(name):
    with new_arena(PLAN, name, EPOCH) as arena:
        yield arena


@pytest.fixture
def published(arena):
    arena.publish()
    return arena


def file_of(name: str) -> Path:
    return Path("/dev/shm" + name)


def test_attach_reports_not_ready_until_created(name):
    with pytest.raises(ArenaNotReady, match="does not exist"):
        attach_arena(name, PLAN)


def test_attach_reports_not_ready_while_it_has_no_size(name):
    file_of(name).touch(mode=0o600)
    try:
        with pytest.raises(ArenaNotReady, match="still being made"):
            attach_arena(name, PLAN)
    finally:
        file_of(name).unlink()


def test_attach_reports_not_ready_until_published(arena):
    with pytest.raises(ArenaNotReady, match="not published"):
        attach_arena(arena.name, PLAN)
    arena.publish()
    with attach_arena(arena.name, PLAN) as attached:
        assert attached.epoch == EPOCH


def test_another_process_attaches_what_was_published(published, forked):
    def attach():
        with attach_arena(published.name, PLAN) as attached:
            assert attached.epoch == EPOCH

    forked(attach).join()


@pytest.mark.parametrize("order", ["creator writes", "attacher writes"])
def test_one_process_sees_in_a_slot_what_the_other_wrote(published, forked, order):
    slot = PLAN.slot("b")
    values = np.arange(slot.num_rows * slot.row_elements, dtype=np.uint16)

    def slot_of(arena):
        return np.frombuffer(arena.buffer, np.uint16, values.size, slot.offset_bytes)

    def attached(act):
        with attach_arena(published.name, PLAN) as arena:
            act(slot_of(arena))

    if order == "creator writes":
        slot_of(published)[:] = values
        forked(attached, lambda seen: np.testing.assert_array_equal(seen, values)).join()
    else:
        forked(attached, lambda seen: np.copyto(seen, values)).join()
        np.testing.assert_array_equal(slot_of(published), values)


@pytest.mark.parametrize(
    ("field", "offset_bytes"),
    [
        ("magic", layout.HEADER_MAGIC_OFFSET_BYTES),
        ("layout version", layout.HEADER_VERSION_OFFSET_BYTES),
        ("total bytes", layout.HEADER_TOTAL_BYTES_OFFSET_BYTES),
        ("plan digest", layout.HEADER_DIGEST_OFFSET_BYTES),
        ("plan digest", layout.HEADER_BYTES - 8),
    ],
)
def test_attach_names_the_header_field_that_differs(published, field, offset_bytes):
    word = _native.load_word(published.buffer, offset_bytes)
    _native.store_word(published.buffer, offset_bytes, word ^ 0x100)
    with pytest.raises(ArenaMismatch) as caught:
        attach_arena(published.name, PLAN)
    assert caught.value.field == field
    assert caught.value.expected != caught.value.found


def test_attach_refuses_another_size(published):
    larger = Plan.of_slots([("a", "float32", 100, 300)])
    with pytest.raises(ArenaMismatch) as caught:
        attach_arena(published.name, larger)
    assert caught.value.field == "size in bytes"
    assert (caught.value.expected, caught.value.found) == (larger.total_bytes, PLAN.total_bytes)


def test_attach_refuses_another_plan_of_the_same_size(published):
    other = Plan.of_slots([("other", "float32", 10, 300), ("b", "bfloat16", 7, 5)])
    assert other.total_bytes == PLAN.total_bytes
    with pytest.raises(ArenaMismatch, match="plan digest"):
        attach_arena(published.name, other)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_attach_refuses_an_arena_that_others_may_open(published, mode):
    file_of(published.name).chmod(mode)
    with pytest.raises(ArenaMismatch) as caught:
        attach_arena(published.name, PLAN)
    assert (caught.value.field, caught.value.found) == ("mode", oct(mode))


def test_attach_refuses_the_arena_of_another_user(published, monkeypatch):
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ArenaError, match=f"belongs to user {me}, not to user {me + 1}"):
        attach_arena(published.name, PLAN)


def test_only_its_user_may_open_it_and_every_page_is_there(arena):
    status = file_of(arena.name).stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == PLAN.total_bytes
    assert status.st_blocks * 512 >= PLAN.total_bytes
    assert arena.residency.pages * layout.PAGE_BYTES == PLAN.total_bytes


def test_a_page_that_cannot_be_locked_has_a_reason(arena):
    assert arena.residency.locked == (not arena.residency.locked_reason)


def test_create_refuses_a_name_that_exists(arena):
    with pytest.raises(ArenaError, match="exists already"):
        new_arena(PLAN, arena.name, EPOCH)
    assert file_of(arena.name).exists()


def test_create_refuses_a_name_that_is_none():
    with pytest.raises(ArenaError, match="cannot be created"):
        new_arena(PLAN, "/tsqp-shm-test/slash", EPOCH)


def test_create_says_how_much_is_needed_and_how_much_is_free(name, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
    with pytest.raises(ArenaTooSmall) as caught:
        new_arena(PLAN, name, EPOCH)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (PLAN.total_bytes, 12288)
    assert f"{PLAN.total_bytes:,}" in str(caught.value)
    assert "12,288" in str(caught.value)
    assert "--max-model-len" in str(caught.value)
    assert not file_of(name).exists()


@pytest.mark.parametrize(
    ("cause", "raised"),
    [
        (OSError(errno.ENOSPC, "no space"), ArenaTooSmall),
        (OSError(errno.EPERM, "not permitted"), ArenaError),
        (SystemExit(143), SystemExit),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_create_leaves_nothing_behind_when_it_is_cut_short(name, monkeypatch, cause, raised):
    def refuse(*arguments):
        assert file_of(name).exists()
        raise cause

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(raised):
        new_arena(PLAN, name, EPOCH)
    assert not file_of(name).exists()


def test_only_the_creator_unlinks(published):
    attach_arena(published.name, PLAN).close()
    assert file_of(published.name).exists()
    published.close()
    assert not file_of(published.name).exists()


def test_closing_twice_does_nothing(name):
    arena = new_arena(PLAN, name, EPOCH)
    arena.close()
    with new_arena(PLAN, name, EPOCH):
        arena.close()
        assert file_of(name).exists()


def test_a_closed_arena_cannot_be_used(arena):
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        _ = arena.buffer


def test_a_view_outlives_the_arena(arena):
    view = np.frombuffer(arena.buffer, np.uint8)
    view[-1] = 77
    arena.close()
    assert view[-1] == 77
    view[-1] = 78
    assert view[-1] == 78


def test_an_arena_that_is_dropped_unclosed_is_warned_about(published):
    attached = attach_arena(published.name, PLAN)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del attached


def test_only_the_arena_of_a_dead_maker_is_removed_by_its_name(name, held_elsewhere):
    maker = held_elsewhere(lambda: new_arena(PLAN, name, EPOCH))
    assert not unlink_dead(name)
    assert file_of(name).exists()
    maker.kill()
    assert unlink_dead(name)
    assert not unlink_dead(name)
