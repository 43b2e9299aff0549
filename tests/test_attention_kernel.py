"""Attention over a private cache: against float64, bit for bit where nothing may matter, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from attention_steps import Shape, Step, chunked, exact, new_cache, rounded_keys_and_values
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import instruction_set
from slot_memory import BF16, F32, Arena

from tsqp_shm import _native

ELEMENTS = ("bfloat16", "float32")
DIMS = (4, 8, 20, 64, 80, 96, 128, 256)
# Rows around a block's end, in one chunk.
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 127, 130)


@pytest.fixture
def threads():
    yield _native.set_num_threads
    _native.set_num_threads(1)


def normal(rows: int, shape: Shape, seed: int = 3, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, shape.qkv_elements)) * scale).astype(np.float32)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one.view(np.uint32), other.view(np.uint32))


def assert_close(found: np.ndarray, wanted: np.ndarray, qkv: np.ndarray, shape: Shape, scale: float = 1.0) -> None:
    """A score is off by a share of the sum of its terms' absolute values, its weight by that much, and a result by that
    much of the largest value. The share is 2^-23: what was found is a third of it."""
    heads, groups, dim = shape
    q, k, v = (np.abs(x).astype(np.float64) for x in np.split(qkv, [heads * dim, (heads + groups) * dim], axis=1))
    pairs = ((h, h * groups // heads) for h in range(heads))
    terms = max((q[:, h * dim :][:, :dim] @ k[:, g * dim :][:, :dim].T).max() for h, g in pairs)
    allowed = 2.0**-23 * (1 + terms * dim**-0.5 * scale) * v.max()
    assert np.abs(found - wanted).max() <= allowed


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_attention_agrees_with_float64(isa, element, head_dim):
    shape, rows = Shape(4, 2, head_dim), 70
    qkv = normal(rows, shape, scale=2)
    found = chunked(qkv, shape, [rows], new_cache(shape, rows, element=element))
    kept = rounded_keys_and_values(qkv, shape) if element == "bfloat16" else qkv
    assert_close(found, exact(kept, shape), qkv, shape)


def test_query_heads_share_their_kv_head(isa):
    for ratio in range(1, 9):
        shape, rows = Shape(2 * ratio, 2, 16), 67
        qkv = normal(rows, shape)
        found = chunked(qkv, shape, [rows], new_cache(shape, rows, element="float32"))
        assert_close(found, exact(qkv, shape), qkv, shape)


@pytest.mark.parametrize("window", [None, 1, 2, 63, 64, 65, 100])
def test_a_row_sees_its_window_and_nothing_after_it(isa, window):
    shape = Shape(3, 1, 12)
    for rows in LENGTHS:
        qkv = normal(rows, shape)
        found = chunked(qkv, shape, [rows], new_cache(shape, rows, element="float32"), window=window)
        assert_close(found, exact(qkv, shape, window=window), qkv, shape)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3, 0.0625])
def test_scores_are_scaled(isa, scale):
    shape, rows = Shape(2, 2, 32), 66
    qkv = normal(rows, shape)
    found = chunked(qkv, shape, [rows], new_cache(shape, rows, element="float32"), scale=scale)
    assert_close(found, exact(qkv, shape, scale=scale), qkv, shape, abs(scale) * 32**0.5)


@pytest.mark.parametrize("soft_cap", [0.5, 2.0, 30.0, 50.0])
def test_scores_are_capped_softly(isa, soft_cap):
    shape, rows = Shape(4, 2, 32), 70
    qkv = normal(rows, shape, scale=4)
    found = chunked(qkv, shape, [rows], new_cache(shape, rows, element="float32"), soft_cap=soft_cap)
    wanted = exact(qkv, shape, soft_cap=soft_cap)
    assert_close(found, wanted, qkv, shape)
    assert np.abs(found - exact(qkv, shape)).max() > 0.01


@pytest.mark.parametrize("rows", [1, 64, 66, 140])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"soft_cap": 3.0}])
def test_a_sink_takes_its_share_of_the_weights(isa, rows, options):
    shape = Shape(4, 2, 16)
    qkv = normal(rows, shape)
    sinks = np.array([0.0, 3.0, -50.0, 40.0], np.float32)
    found = chunked(qkv, shape, [rows], new_cache(shape, rows, element="float32"), sinks=sinks, **options)
    wanted = exact(qkv, shape, sinks=sinks, **options)
    assert_close(found, wanted, qkv, shape)
    by_head = np.abs(found).reshape(rows, 4, 16).max(axis=(0, 2))
    assert by_head[3] < 1e-12 < by_head[1] < by_head[2]  # the large sink takes all, the small one nothing


def test_scores_far_apart_give_the_value_of_the_largest(isa):
    shape = Shape(1, 1, 4)
    qkv = np.zeros((100, shape.qkv_elements), np.float32)
    qkv[:, :4] = 1
    qkv[:, 4:8] = -1000
    qkv[70, 4:8] = 1000
    qkv[:, 8:] = np.arange(100)[:, None]
    found = chunked(qkv, shape, [100], new_cache(shape, 100), scale=1.0)
    assert (found[70:] == 70).all()
    assert np.allclose(found[:70, 0], np.arange(70) / 2, rtol=1e-6)


# What a row's bits must not depend on. The oracle takes one row at a time, on one thread, its blocks in order.


OPTIONS = (
    {},
    {"window": 40, "sinks": np.array([1.0, -2.0, 0.5, 3.0, 0.0, -1.0], np.float32)},
    {"soft_cap": 5.0, "window": 64},
)


def oracle(qkv: np.ndarray, shape: Shape, element: str, chunks: list[int], **options) -> np.ndarray:
    with instruction_set("scalar"):
        return chunked(qkv, shape, chunks, new_cache(shape, len(qkv), element=element), **options)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window, sinks", "cap, window"])
@pytest.mark.parametrize("shape", [Shape(6, 2, 20), Shape(6, 1, 64), Shape(6, 6, 8)])
def test_chunks_threads_blocks_and_instruction_sets_do_not_change_a_bit(isa, threads, element, options, shape):
    rows = 150
    qkv = normal(rows, shape, scale=2)
    expected = oracle(qkv, shape, element, [1] * rows, **options)
    for num_threads in (1, 2, 3):
        threads(num_threads)
        for chunks in ([rows], [1] * rows, [63, 1, 1, 64, 21], [5, 130, 15]):
            cache = new_cache(shape, rows + 200, sequences=3, element=element, shuffle=num_threads)
            assert same_bits(chunked(qkv, shape, chunks, cache, sequence=1, **options), expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_batch_gives_each_sequence_the_bits_that_it_has_alone(data):
    ratio, groups = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    shape = Shape(ratio * groups, groups, 4 * data.draw(st.integers(1, 20)))
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    window = data.draw(st.one_of(st.none(), st.integers(1, 150)))
    soft_cap = data.draw(st.sampled_from([None, 2.0]))
    num_threads, element = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(ELEMENTS))
    options = {"window": window, "soft_cap": soft_cap}
    all_rows = [normal(length, shape, seed) for seed, length in enumerate(lengths)]
    expected = [
        chunked(rows, shape, [len(rows)], new_cache(shape, len(rows), element=element), **options) for rows in all_rows
    ]
    cache = new_cache(shape, max(lengths), sequences=len(lengths), element=element, shuffle=len(lengths))
    done = [0] * len(lengths)
    _native.set_num_threads(num_threads)
    try:
        while any(at < length for at, length in zip(done, lengths, strict=True)):
            segments, parts, row = [], [], 0
            for sequence, (at, length) in enumerate(zip(done, lengths, strict=True)):
                if at == length:
                    continue
                # One sequence may come in several segments of one step.
                for _ in range(data.draw(st.integers(1, 2))):
                    count = min(length - at, data.draw(st.sampled_from([1, 2, 30, 64, 200])))
                    segments.append((sequence, at, row, count))
                    parts.append(all_rows[sequence][at : at + count])
                    row, at = row + count, at + count
                done[sequence] = at
            step = Step(row, shape)
            step.qkv[:] = np.concatenate(parts)
            found = step.attend(cache, segments, **options)
            for sequence, position, first_row, count in segments:
                assert same_bits(found[first_row : first_row + count], expected[sequence][position : position + count])
    finally:
        _native.set_num_threads(1)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("window", [None, 30])
def test_what_a_former_sequence_left_behind_the_end_does_not_matter(isa, threads, element, window):
    shape, room = Shape(4, 2, 20), 320
    stale = Step(room, shape)
    stale.qkv[:] = np.nan
    qkv = normal(150, shape)
    expected = chunked(qkv, shape, [150], new_cache(shape, room, element=element), window=window)
    for num_threads in (1, 3):
        threads(num_threads)
        for chunks in ([150], [1] * 150, [65, 85]):
            cache = new_cache(shape, room, element=element)
            stale.attend(cache, [(0, 0, 0, room)])
            assert same_bits(chunked(qkv, shape, chunks, cache, window=window), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_number_spoils_those_that_see_it_and_no_other(isa, bad):
    shape, rows, at, window = Shape(2, 1, 8), 140, 70, 20
    qkv = normal(rows, shape)
    expected = chunked(qkv, shape, [rows], new_cache(shape, rows), window=window)
    qkv[at] = bad
    spoilt = chunked(qkv, shape, [rows], new_cache(shape, rows), window=window)
    seeing = (np.arange(rows) >= at) & (np.arange(rows) < at + window)
    assert same_bits(spoilt[~seeing], expected[~seeing])
    assert np.isnan(spoilt[seeing]).all()
    assert (spoilt[seeing].view(np.uint32) == 0x7FC00000).all()


def test_long_contexts_and_many_threads_split_a_row_and_keep_its_bits(threads):
    shape, length = Shape(6, 2, 64), 2100
    qkv = normal(length, shape)
    cache = new_cache(shape, length)
    expected = chunked(qkv, shape, [length - 3, 1, 1, 1], cache)[-3:]
    step = Step(3, shape)
    step.qkv[:] = qkv[-3:]
    for num_threads in (1, 2, 5, 16):
        threads(num_threads)
        assert same_bits(step.attend(cache, [(0, length - 3, 0, 3)]), expected)


def test_rows_of_no_segment_stay_as_they_are_and_no_segment_is_none():
    shape = Shape(2, 1, 8)
    step, cache = Step(9, shape), new_cache(shape, 64)
    step.qkv[:] = normal(9, shape)
    found = step.attend(cache, [(0, 0, 2, 3), (0, 3, 6, 0), (0, 3, 7, 1)])
    assert np.isnan(found).all(axis=1).tolist() == [True, True, False, False, False, True, True, False, True]
    assert np.isnan(step.attend(cache, [])).all()


def test_tanh_is_within_two_ulp(isa):
    positive = np.concatenate(
        [
            np.linspace(0, 1, 200_001, dtype=np.float32),
            np.geomspace(1e-30, 20, 200_000, dtype=np.float32),
            np.array([0.625, np.nextafter(np.float32(0.625), np.float32(0)), 1e-40, 100, 3e38], np.float32),
        ]
    )
    values = np.concatenate([positive, -positive])
    found = np.empty_like(values)
    _native.hyperbolic_tangent(values, found)
    wanted = np.tanh(values.astype(np.float64))
    unit = np.ldexp(1.0, np.maximum(np.frexp(wanted)[1] - 1, -126) - 23)
    assert (np.abs(found - wanted) / unit).max() <= 2
    ends = np.array([np.inf, -np.inf, np.nan], np.float32)
    found = np.empty_like(ends)
    _native.hyperbolic_tangent(ends, found)
    assert found[:2].tolist() == [1, -1] and np.isnan(found[2])


def test_reading_a_sequence_looks_at_all_of_its_blocks(threads):
    shape = Shape(2, 2, 8)
    cache = new_cache(shape, 1000, element="float32", shuffle=1)
    assert cache.num_bytes == 16 * cache.block_bytes == 16 * 64 * 2 * (8 + 16) * 4
    assert cache.read(0, 1000) == 0
    step = Step(700, shape)
    step.qkv[:] = 1
    step.attend(cache, [(0, 0, 0, 700)])
    two = 0x3F8000003F800000  # two elements of a word
    for num_threads in (1, 3):
        threads(num_threads)
        assert cache.read(0, 700) == 700 * 2 * 2 * 8 // 2 * two % 2**64
        assert cache.read(0, 64) == 64 * 2 * 2 * 8 // 2 * two % 2**64
    with pytest.raises(IndexError):
        cache.read(1, 5)


# What is refused.


@pytest.mark.parametrize(
    ("error", "named", "segments"),
    [
        (IndexError, r"segments\[0\]: sequence 2 of a cache of 2", [(2, 0, 0, 1)]),
        (IndexError, r"segments\[1\]: positions up to 129", [(0, 0, 0, 1), (1, 128, 1, 1)]),
        (IndexError, r"segments\[0\]: positions up to 2147483648", [(0, 2**31 - 1, 0, 1)]),
        (IndexError, "rows .* of slot 0", [(0, 0, 8, 2)]),
        (IndexError, "rows .* of slot 0", [(0, 0, 2**31 - 1, 1)]),
        (IndexError, r"segments\[0\]: got -1", [(-1, 0, 0, 1)]),
        (IndexError, r"segments\[0\]: got -1", [(0, -1, 0, 1)]),
        (IndexError, r"segments\[0\]: got -2", [(0, 0, -2, 1)]),
        (IndexError, r"segments\[0\]: got -1", [(0, 0, 0, -1)]),
        (ValueError, r"segments\[1\]: begins at row 1, but the one before ends at 2", [(0, 0, 0, 2), (1, 0, 1, 1)]),
        (ValueError, r"segments\[1\]: begins at position 1,", [(0, 0, 0, 2), (0, 1, 2, 1)]),
    ],
)
def test_a_segment_that_does_not_fit_is_refused_by_its_name(error, named, segments):
    shape = Shape(2, 1, 8)
    step, cache = Step(9, shape), new_cache(shape, 128, sequences=2)
    with pytest.raises(error, match=named):
        step.attend(cache, segments)
    assert np.isnan(step.out).all()
    assert cache.read(0, 128) == 0


@pytest.mark.parametrize(
    ("error", "named", "arguments"),
    [
        (ValueError, "num_heads", {"num_heads": 3}),
        (ValueError, "num_heads", {"num_heads": 0}),
        (IndexError, "num_heads", {"num_heads": -2}),
        (ValueError, "num_heads|elements", {"num_heads": 2**62}),
        (ValueError, "slot 0: its rows", {"num_heads": 6}),
        (ValueError, "slot 1: its rows", {"qkv_slot": 1, "out_slot": 0}),
        (ValueError, "out_slot", {"out_slot": 0}),
        (IndexError, "slot 9", {"qkv_slot": 9}),
        (IndexError, "qkv_slot", {"qkv_slot": -1}),
        (TypeError, "out_slot", {"out_slot": 2}),
        (TypeError, "qkv_slot", {"qkv_slot": 3}),
        (ValueError, "window", {"window": 0}),
        (ValueError, "window", {"window": -5}),
        (ValueError, "soft_cap", {"soft_cap": 0.0}),
        (ValueError, "soft_cap", {"soft_cap": float("nan")}),
        (ValueError, "scale", {"scale": float("inf")}),
        (ValueError, "sinks", {"sinks": np.zeros(3, np.float32)}),
        (TypeError, "sinks", {"sinks": np.zeros(4)}),
        (TypeError, "segments", {"segments": np.zeros((1, 4), np.int64)}),
        (ValueError, "segments", {"segments": np.zeros((1, 3), np.int32)}),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_by_its_name(error, named, arguments):
    shape = Shape(4, 2, 8)
    arena = Arena((3, 64, F32), (3, 32, F32), (3, 32, BF16), (3, 64, BF16))
    given = {
        "qkv_slot": 0,
        "out_slot": 1,
        "segments": np.array([[0, 0, 0, 2]], np.int32),
        "num_heads": 4,
        "scale": 1.0,
        **arguments,
    }
    with pytest.raises(error, match=named):
        _native.attend(
            new_cache(shape, 64),
            arena.slots,
            given.pop("qkv_slot"),
            given.pop("out_slot"),
            given.pop("segments"),
            **given,
        )


@pytest.mark.parametrize(
    ("error", "named", "arguments"),
    [
        (ValueError, "num_kv_heads", {"num_kv_heads": 0}),
        (IndexError, "num_kv_heads", {"num_kv_heads": -1}),
        (ValueError, "head_dim", {"head_dim": 0}),
        (ValueError, "head_dim", {"head_dim": 6}),
        (ValueError, "head_dim", {"head_dim": 2**40}),
        (ValueError, "blocks", {"blocks": np.zeros((0, 4), np.int32)}),
        (ValueError, "blocks", {"blocks": np.zeros((4, 0), np.int32)}),
        (ValueError, "blocks", {"blocks": np.zeros(4, np.int32)}),
        (TypeError, "blocks", {"blocks": np.zeros((1, 4))}),
        (ValueError, "blocks: got 4, expected 0 to 4", {"blocks": np.array([[0, 1], [2, 4]], np.int32)}),
        (ValueError, "blocks: got -1", {"blocks": np.array([[0, -1]], np.int32)}),
        (ValueError, "blocks: 1 is there twice", {"blocks": np.array([[1, 0], [2, 1]], np.int32)}),
        (ValueError, "element: got 'int8'", {"element": "int8"}),
        (MemoryError, None, {"num_kv_heads": 2**60}),
    ],
)
def test_a_cache_that_cannot_be_is_refused(error, named, arguments):
    blocks = np.arange(4, dtype=np.int32).reshape(2, 2)
    with pytest.raises(error, match=named):
        _native.KeyValueCache(**{"num_kv_heads": 2, "head_dim": 8, "blocks": blocks, **arguments})
