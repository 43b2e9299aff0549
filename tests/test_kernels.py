"""The kernels as Python sees them: numerics against float64, masks, bounds, threads, refused arguments."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_memory import BF16, F32, I32, PAGE, SLOTS_OFFSET, Arena

from tsqp_shm import _native

WIDTHS = (4, 12, 16, 20, 28, 36, 64, 100, 2048)  # whole words
HALVES = (2, 6, 8, 14, 16, 18, 50, 64, 1024)  # of a head of whole words
COLUMNS = (16, 32, 48, 64, 112, 2048)  # whole blocks


def widen(slot: np.ndarray) -> np.ndarray:
    """A slot's elements as float64."""
    if slot.dtype == np.uint16:
        return (slot.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return slot.astype(np.float64)


def narrow(values: np.ndarray, code: int) -> np.ndarray:
    """Finite float32 values as slot elements, to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if code == F32:
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def ulp(exact: np.ndarray, code: int) -> np.ndarray:
    exponent = np.maximum(np.frexp(exact)[1] - 1, -126)
    return np.ldexp(1.0, exponent - (7 if code == BF16 else 23))


def assert_close(slot: np.ndarray, exact: np.ndarray, f32_ulp: float, absolute: np.ndarray | float = 0.0) -> None:
    """bf16 within 1 ULP of bf16, f32 within `f32_ulp` ULP of f32, each plus `absolute`."""
    code = BF16 if slot.dtype == np.uint16 else F32
    allowed = (1.0 if code == BF16 else f32_ulp) * ulp(exact, code) + absolute
    error = np.abs(widen(slot) - exact)
    assert (error <= allowed).all(), f"off by up to {(error / ulp(exact, code)).max():.2f} ULP"


@pytest.fixture(params=[BF16, F32], ids=["bf16", "f32"])
def code(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def threads():
    yield _native.set_num_threads
    _native.set_num_threads(1)


def normal(rng, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def exact_softmax(scores: np.ndarray, first_valid_end: int, window: int | None) -> np.ndarray:
    """Float64 oracle of scores [H, rows, columns], already scaled."""
    rows, columns = scores.shape[1:]
    hi = np.minimum(first_valid_end + np.arange(rows), columns)[:, None]
    lo = np.maximum(hi - window, 0) if window else np.zeros_like(hi)
    visible = (np.arange(columns) >= lo) & (np.arange(columns) < hi)
    masked = np.where(visible, scores, -np.inf)
    peak = masked.max(-1, keepdims=True, initial=-np.inf)
    e = np.exp(masked - np.where(np.isinf(peak), 0, peak))
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("size", WIDTHS)
def test_add_rms_norm_agrees_with_float64(isa, code, size, rng):
    arena = Arena((4, size, code), (4, size, code))
    arena.view[1][:] = narrow(normal(rng, 4, size), code)
    residual, weight = normal(rng, 4, size, scale=3), normal(rng, size)
    before = residual.copy()
    _native.add_rms_norm(arena.slots, 0, 0, 1, residual, None, 0, 4, weight, 1e-5)
    assert np.array_equal(residual, before + widen(arena.view[1]).astype(np.float32))
    wide = residual.astype(np.float64)
    inverse = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(1e-5))
    assert_close(arena.view[0], wide * inverse * weight, 5 + size / 256)


def test_add_rms_norm_without_delta_leaves_the_residual_and_takes_rows_by_index(isa, code, rng):
    arena = Arena((5, 36, code), (3, 36, code))
    residual, weight = normal(rng, 5, 36), normal(rng, 36)
    residual.flags.writeable = False
    _native.add_rms_norm(arena.slots, 0, 0, None, residual, None, 0, 5, weight, 1e-6)
    _native.add_rms_norm(arena.slots, 1, 1, None, residual, np.array([4, 0], np.int32), 0, 2, weight, 1e-6)
    assert np.array_equal(arena.view[1], np.stack([0 * arena.view[0][0], arena.view[0][4], arena.view[0][0]]))


@pytest.mark.parametrize("size", WIDTHS)
def test_silu_mul_agrees_with_float64(isa, code, size, rng):
    arena = Arena((3, 2 * size, code), (3, size, code))
    arena.view[0][:] = narrow(normal(rng, 3, 2 * size, scale=20), code)
    _native.silu_mul(arena.slots, 0, 1, 0, 3)
    gate, up = np.split(widen(arena.view[0]), 2, axis=1)
    assert_close(arena.view[1], gate / (1 + np.exp(-gate)) * up, 4, np.abs(gate * up) * 2.0**-149)


def test_silu_mul_of_special_gates(isa, code):
    gates = np.array([[np.inf, np.nan, -0.0, 1e-40, -200.0, 200.0, -np.inf, 1.0]], np.float32)
    arena = Arena((1, 16, code), (1, 8, code))
    _native.store_rows(arena.slots, 0, 0, 1, np.concatenate([gates, np.ones_like(gates)], 1))
    _native.silu_mul(arena.slots, 0, 1, 0, 1)
    out = widen(arena.view[1])[0]
    assert out[0] == np.inf and np.isnan(out[1]) and np.isnan(out[6])
    assert out[2] == 0 and np.signbit(out[2])
    assert abs(out[3] - 5e-41) <= ulp(np.array(5e-41), code)  # denormals are kept
    assert out[4] == 0 and np.signbit(out[4]) and out[5] == 200


@pytest.mark.parametrize("half", HALVES)
def test_rope_rotates_pairs_of_half_a_head(isa, code, half, rng):
    arena = Arena((3, 4 * half, code))
    arena.view[0][:] = narrow(normal(rng, 3, 4 * half), code)
    angle = rng.uniform(0, 6, (7, half))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    positions = np.array([6, 0, 3], np.int32)
    x = widen(arena.view[0]).reshape(3, 2, 2, half)
    _native.rope(arena.slots, 0, 0, 3, positions, cos, sin, 2, 2 * half)
    c, s = cos[positions, None].astype(np.float64), sin[positions, None].astype(np.float64)
    exact = np.stack([x[:, :, 0] * c - x[:, :, 1] * s, x[:, :, 1] * c + x[:, :, 0] * s], 2).reshape(3, -1)
    assert_close(arena.view[0], exact, 1, 2.0**-22 * np.abs(x).max())


@pytest.mark.parametrize("half", [4, 16, 32])
def test_rope_leaves_what_lies_behind_the_heads_of_a_row(isa, code, half, rng, threads):
    rows, heads, behind = 300, 3, 20
    width = heads * 2 * half
    arena = Arena((rows, width, code), (rows, width + behind, code))
    values = normal(rng, rows, width + behind)
    arena.view[0][:], arena.view[1][:] = narrow(values[:, :width], code), narrow(values, code)
    before = arena.view[1].copy()
    angle = normal(rng, rows, half)
    positions = rng.permutation(rows).astype(np.int32)
    for num_threads in (1, 3):
        threads(num_threads)
        for slot in (0, 1):
            _native.rope(arena.slots, slot, 0, rows, positions, np.cos(angle), np.sin(angle), heads, 2 * half)
    assert np.array_equal(arena.view[1][:, :width], arena.view[0])
    assert np.array_equal(arena.view[1][:, width:], before[:, width:])
    assert not np.array_equal(arena.view[1][:, :width], before[:, :width])


@pytest.mark.parametrize("score", [1.01469e11, 1.0265e12, 3e38])
def test_the_largest_score_has_all_of_it_however_large(isa, code, score):
    arena = Arena((1, 32, code))
    scores = np.full(32, -score)
    scores[7] = score
    arena.view[0][0] = narrow(scores, code)
    # No power of two: a product with it is rounded.
    _native.softmax(arena.slots, 0, 0, 1, 1, 32, 128**-0.5, 20, None)
    np.testing.assert_array_equal(widen(arena.view[0][0]), np.arange(32) == 7)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("window", [None, 1, 16, 40])
def test_softmax_agrees_with_float64(isa, code, columns, window, rng):
    heads, rows, offset, scale = 2, 5, 4, 0.125
    arena = Arena((1, offset + heads * rows * columns + 2, code))
    scores = narrow(normal(rng, heads, rows, columns, scale=40), code)
    flat = arena.view[0][0]
    flat[:] = 1
    for first_valid_end in (0, 1, columns // 2, columns, columns + 9):
        flat[offset:-2] = scores.ravel()
        _native.softmax(arena.slots, 0, offset, heads, rows, columns, scale, first_valid_end, window)
        exact = exact_softmax(widen(scores) * scale, first_valid_end, window)
        found = flat[offset:-2].reshape(scores.shape)
        # f32 rounds x - max and the sum: relative errors of 2^-24 times |x - max| and columns / 16.
        assert_close(found, exact, 40 + columns / 16)
        assert (flat[:offset] == 1).all() and (flat[-2:] == 1).all()


@settings(max_examples=150, deadline=None)
@given(
    columns=st.sampled_from([16, 32, 64, 80]),
    rows=st.integers(1, 6),
    first_valid_end=st.integers(0, 80),
    window=st.one_of(st.none(), st.integers(0, 80)),
    poison=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
    code=st.sampled_from([BF16, F32]),
)
def test_softmax_neither_uses_nor_keeps_what_the_mask_hides(columns, rows, first_valid_end, window, poison, code):
    scores = np.random.default_rng(columns).standard_normal((2, rows, columns))
    hidden = exact_softmax(scores, first_valid_end, window) == 0
    arena = Arena((2 * rows, columns, code))
    _native.store_rows(
        arena.slots, 0, 0, 2 * rows, np.where(hidden, poison, scores).reshape(-1, columns).astype(np.float32)
    )
    shown = np.where(hidden, 0, widen(arena.view[0]).reshape(scores.shape))
    _native.softmax(arena.slots, 0, 0, 2, rows, columns, 1.0, first_valid_end, window)
    found = arena.view[0].reshape(scores.shape)
    assert (found[hidden] == 0).all()
    assert_close(found, exact_softmax(shown, first_valid_end, window), 40)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([-np.inf] * 3, [0.0] * 3),
        ([np.nan, -np.inf, -np.inf], [np.nan] * 3),
        ([0, np.nan, 1], [np.nan] * 3),
        ([0, np.inf, 1], [np.nan] * 3),  # as torch
        ([0, -np.inf, -np.inf], [1, 0, 0]),
        ([3e38, 3e38, -3e38], [0.5, 0.5, 0]),
        ([-0.0, 0.0, -np.inf], [0.5, 0.5, 0]),
    ],
)
def test_softmax_of_special_rows(isa, code, row, expected):
    arena = Arena((1, 16, code))
    _native.store_rows(arena.slots, 0, 0, 1, np.array([[*row, *[np.nan] * 13]], np.float32))
    _native.softmax(arena.slots, 0, 0, 1, 1, 16, 1.0, 3, None)
    np.testing.assert_array_equal(widen(arena.view[0])[0], [*expected, *[0] * 13])


def test_rows_move_between_slots_and_private_memory(isa, rng):
    arena = Arena((4, 17, BF16), (4, 17, F32), (4, 17, I32))
    values = normal(rng, 2, 17)
    values[0, :5] = [-0.0, np.inf, -np.inf, 1e-40, 1.0]
    ids = rng.integers(-(2**31), 2**31, (1, 17)).astype(np.int32)
    out, out_ids = np.zeros_like(values), np.zeros_like(ids)
    for slot in (0, 1):
        arena.view[slot][:] = 7
        _native.store_rows(arena.slots, slot, 0, 2, values)
        _native.load_rows(arena.slots, slot, 0, 2, out)
        expected = values if slot == 1 else widen(narrow(values, BF16)).astype(np.float32)
        assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
        # What is left of the last word is 0; the next one is as it was.
        after = arena.view[slot].ravel()[34:38]
        assert np.array_equal(after, [0, 0, 7, 7] if slot == 0 else [7] * 4)
    _native.store_rows(arena.slots, 2, 2, 1, ids)
    _native.load_rows(arena.slots, 2, 2, 1, out_ids)
    assert np.array_equal(out_ids, ids)
    assert not arena.view[2][:2].any()


ROWS = 1500  # enough that three threads get work


def all_kernels(code: int, blocks: list[tuple[int, int]]) -> list[np.ndarray]:
    """Every kernel on the same data, with denormals and specials in it, the rows taken block by block."""
    rng = np.random.default_rng(5)
    rows, width = ROWS, 100
    arena = Arena((rows, width, code), (rows, width, code), (rows, 2 * width, code), (rows, 64, code))
    for slot in range(4):
        values = normal(rng, *arena.view[slot].shape, scale=9)
        values[rng.random(values.shape) < 0.002] = 1e-40
        if slot == 2:
            values[rng.random(values.shape) < 0.002] = np.nan
        _native.store_rows(arena.slots, slot, 0, rows, values)
    residual, weight, angle = normal(rng, rows, width), normal(rng, width), normal(rng, 40, 8)
    positions = rng.integers(0, 40, rows).astype(np.int32)
    loaded = np.empty((rows, 2 * width), np.float32)
    for first, count in blocks:
        at = slice(first, first + count)
        _native.add_rms_norm(arena.slots, 0, first, 1, residual, None, first, count, weight, 1e-5)
        _native.rope(arena.slots, 3, first, count, positions[at], np.cos(angle), np.sin(angle), 4, 16)
        _native.load_rows(arena.slots, 2, first, count, loaded[at])
        _native.silu_mul(arena.slots, 2, 1, first, count)
    normed = [
        arena.view[0].copy(),
        arena.view[1].copy(),
        arena.view[3].copy(),
        residual,
        loaded.view(np.uint32),
    ]
    columns = 80
    for first, count in blocks:
        _native.softmax(arena.slots, 0, first * columns, 1, count, columns, 0.5, 1 + first, 50)
    return [*normed, arena.view[0].copy()]


def test_row_blocks_threads_and_instruction_sets_do_not_change_a_bit(code, isa, threads):
    _native.use_instruction_set("scalar")
    expected = all_kernels(code, [(0, ROWS)])
    _native.use_instruction_set(isa)
    for num_threads in (1, 2, 3):
        threads(num_threads)
        assert _native.get_num_threads() == num_threads
        for blocks in ([(0, ROWS)], [(0, 1), (1, 180), (181, ROWS - 181)]):
            for one, other in zip(expected, all_kernels(code, blocks), strict=True):
                np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def test_a_forked_child_computes_with_threads_of_its_own(threads):
    threads(3)
    expected = all_kernels(BF16, [(0, ROWS)])
    child = os.fork()
    if child == 0:
        same = False
        try:
            found = all_kernels(BF16, [(0, ROWS)])
            same = all(map(np.array_equal, expected, found))
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def float_array(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def int_array(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("error", "kernel", "arguments"),
    [
        (IndexError, "load_rows", (9, 0, 1, float_array(1, 16))),
        (IndexError, "load_rows", (0, 3, 2, float_array(2, 16))),
        (IndexError, "load_rows", (0, -1, 1, float_array(1, 16))),
        (IndexError, "load_rows", (0, 2**62, 2**62, float_array(1, 16))),
        (ValueError, "load_rows", (0, 0, 1, float_array(1, 15))),
        (ValueError, "load_rows", (0, 0, 2, float_array(16, 2).T)),
        (TypeError, "load_rows", (0, 0, 1, np.ones((1, 16)))),
        (TypeError, "load_rows", (2, 0, 1, float_array(1, 16))),
        (TypeError, "store_rows", (0, 0, 1, np.ones((1, 16), ">f4"))),
        (IndexError, "rope", (0, 0, 2, int_array(0, 5), float_array(5, 4), float_array(5, 4), 2, 8)),
        (IndexError, "rope", (0, 0, 2, int_array(0, -1), float_array(5, 4), float_array(5, 4), 2, 8)),
        (ValueError, "rope", (0, 0, 2, int_array(0), float_array(5, 4), float_array(5, 4), 2, 8)),
        (ValueError, "rope", (0, 0, 1, int_array(0), float_array(5, 4), float_array(4, 4), 2, 8)),
        (ValueError, "rope", (0, 0, 1, int_array(0), float_array(5, 4), float_array(5, 4), 3, 8)),
        (ValueError, "rope", (0, 0, 1, int_array(0), float_array(5, 4), float_array(5, 4), 2, 9)),
        (TypeError, "rope", (2, 0, 1, int_array(0), float_array(5, 4), float_array(5, 4), 2, 8)),
        (IndexError, "softmax", (0, 1, 1, 4, 16, 1.0, 1, None)),
        (IndexError, "softmax", (0, 0, 2**31, 2**31, 16, 1.0, 1, None)),
        (IndexError, "softmax", (0, 0, 1, 1, 16, 1.0, -1, None)),
        (ValueError, "softmax", (0, 0, 1, 1, 20, 1.0, 1, None)),
        (ValueError, "softmax", (0, 2, 1, 1, 16, 1.0, 1, None)),
        (ValueError, "load_rows", (6, 1, 1, float_array(1, 6))),
        (ValueError, "store_rows", (6, 1, 1, float_array(1, 6))),
        (ValueError, "rope", (6, 0, 1, int_array(0), float_array(5, 1), float_array(5, 1), 3, 2)),
        (ValueError, "rope", (6, 0, 1, int_array(0), float_array(5, 2), float_array(5, 2), 1, 4)),
        (ValueError, "silu_mul", (7, 6, 0, 1)),
        (ValueError, "add_rms_norm", (6, 0, None, float_array(9, 6), None, 0, 1, float_array(6), 1e-5)),
        (ValueError, "all_finite", (0, 1, 1)),
        (TypeError, "softmax", (2, 0, 1, 1, 16, 1.0, 1, None)),
        (ValueError, "silu_mul", (0, 0, 0, 1)),
        (ValueError, "silu_mul", (0, 1, 0, 1)),
        (TypeError, "silu_mul", (4, 3, 0, 1)),
        (IndexError, "add_rms_norm", (0, 4, None, float_array(9, 16), None, 0, 1, float_array(16), 1e-5)),
        (IndexError, "add_rms_norm", (0, 0, None, float_array(9, 16), None, 8, 2, float_array(16), 1e-5)),
        (IndexError, "add_rms_norm", (0, 0, 1, float_array(9, 16), None, 3, 2, float_array(16), 1e-5)),
        (
            IndexError,
            "add_rms_norm",
            (0, 0, 1, float_array(9, 16), int_array(9), 0, 1, float_array(16), 1e-5),
        ),
        (
            IndexError,
            "add_rms_norm",
            (0, 0, 1, float_array(9, 16), int_array(-1), 0, 1, float_array(16), 1e-5),
        ),
        (
            ValueError,
            "add_rms_norm",
            (0, 0, 1, float_array(9, 16), int_array(1, 1), 0, 2, float_array(16), 1e-5),
        ),
        (
            ValueError,
            "add_rms_norm",
            (0, 0, 1, float_array(9, 16), int_array(1), 1, 1, float_array(16), 1e-5),
        ),
        (ValueError, "add_rms_norm", (0, 0, 0, float_array(9, 16), None, 1, 1, float_array(16), 1e-5)),
        (ValueError, "add_rms_norm", (0, 0, 1, float_array(9, 17), None, 0, 1, float_array(16), 1e-5)),
        (TypeError, "add_rms_norm", (0, 0, 5, float_array(9, 16), None, 0, 1, float_array(16), 1e-5)),
    ],
)
def test_a_bad_argument_is_refused_before_memory_is_touched(error, kernel, arguments):
    arena = Arena(
        *[(4, 16, BF16), (4, 16, BF16), (4, 16, I32), (4, 8, BF16), (4, 16, F32), (4, 16, F32)],
        *[(4, 6, BF16), (4, 12, BF16)],  # rows that do not all begin at a word
    )
    with pytest.raises(error):
        getattr(_native, kernel)(arena.slots, *arguments)
    assert not any(view.any() for view in arena.view)


@pytest.mark.parametrize(("heads", "rows"), [(0, 1), (1, 0)])
def test_softmax_of_nothing_takes_no_memory_for_its_columns(heads, rows):
    arena = Arena((4, 16, BF16))
    _native.softmax(arena.slots, 0, 0, heads, rows, 2**60, 1.0, 1, None)


@pytest.mark.parametrize(
    ("error", "entry"),
    [
        (IndexError, (SLOTS_OFFSET, 1025, 2, BF16)),
        (IndexError, (SLOTS_OFFSET + 4, 1, 2, BF16)),
        (IndexError, (0, 1, 2, BF16)),
        (IndexError, (2**63, 1, 2, BF16)),
        (IndexError, (SLOTS_OFFSET, 1, 2**63 + 1, BF16)),
        (ValueError, (SLOTS_OFFSET, 1, 2, 5)),
    ],
)
def test_a_slot_outside_the_arena_is_refused(error, entry):
    with pytest.raises(error):
        _native.SlotTable(bytearray(SLOTS_OFFSET + PAGE), [entry])


def test_an_arena_that_ends_inside_a_word_is_refused():
    with pytest.raises(IndexError, match="whole word"):
        _native.SlotTable(bytearray(SLOTS_OFFSET + 6), [(SLOTS_OFFSET, 1, 3, BF16)])


def test_a_slot_table_keeps_its_mapping_until_released():
    memory = mmap.mmap(-1, SLOTS_OFFSET + PAGE)
    slots = _native.SlotTable(memory, [(SLOTS_OFFSET, 1, 4, F32)])
    assert len(slots) == 1
    with pytest.raises(BufferError):
        memory.close()
    slots.release()
    slots.release()
    memory.close()
    with pytest.raises(ValueError, match="released"):
        _native.load_rows(slots, 0, 0, 1, float_array(1, 4))


def test_thread_counts_out_of_range_are_refused():
    for count in (0, 257):
        with pytest.raises(ValueError, match="expected 1 to 256"):
            _native.set_num_threads(count)


def test_an_unknown_instruction_set_names_those_there_are():
    with pytest.raises(ValueError, match="this machine has: scalar"):
        _native.use_instruction_set("mmx")


@pytest.mark.parametrize(("forced", "expected"), [("scalar", "scalar"), ("mmx", "ValueError: TSQP_SHM_ISA")])
def test_the_environment_forces_an_instruction_set(forced, expected):
    code = "from tsqp_shm import _native; print(_native.active_instruction_set())"
    environment = {**os.environ, "TSQP_SHM_ISA": forced, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert expected in child.stdout + child.stderr
