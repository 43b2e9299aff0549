"""The check of a Linear that another process multiplied: what it makes of honest products, and what it lets through.

`test_tampering.py` counts what it lets through; here each kind of lie is told once or a few times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checked_linear import FIELD, OUT, OWN, CheckedLinear, M, X, Y, centred, products
from field_reference import FLOAT32_MAX, NAN
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_memory import F32, U32, Arena

from tsqp_shm import _native


@pytest.fixture(params=[1, 2])
def threads(request):
    before = _native.get_num_threads()
    _native.set_num_threads(request.param)
    yield request.param
    _native.set_num_threads(before)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def honest(outputs: int, inputs: int, rows: int, seed: int = 0, **settings) -> CheckedLinear:
    """Begun and answered, each by the rules."""
    random = np.random.default_rng(seed)
    linear = CheckedLinear(random.normal(0, 0.02, (outputs, inputs)).astype(np.float32), rows, random, **settings)
    linear.x[:] = random.normal(0, 1, (rows, inputs))
    linear.begin()
    linear.answer()
    return linear


def adversarial(x: np.ndarray) -> None:
    """Zeros, a peak, denormals, the largest numbers, and what is no number, each in a row."""
    rows = len(x)
    changes: list[Callable[[np.ndarray], None]] = [
        lambda row: row.fill(0),
        lambda row: row.__setitem__(0, 1e4),
        lambda row: np.multiply(row, np.float32(1e-40), out=row),
        lambda row: np.copysign(FLOAT32_MAX, row, out=row),
        lambda row: row.__setitem__(-1, np.nan),
        lambda row: row.__setitem__(0, -np.inf),
        lambda row: row.fill(-1),
    ]
    for row, change in zip(range(1, rows, 2), changes, strict=False):
        change(x[row])


SHAPES = [(1, 2, 1), (3, 4, 2), (17, 64, 3), (63, 30, 4), (65, 66, 5), (576, 130, 9), (1025, 64, 6), (9001, 12, 3)]


@pytest.mark.parametrize(("outputs", "inputs", "rows"), SHAPES)
def test_results_are_those_of_the_linear_bit_for_bit(isa, threads, outputs, inputs, rows):
    random = np.random.default_rng(outputs)
    weight = random.normal(0, 0.02, (outputs, inputs)).astype(np.float32)
    bias = random.normal(0, 1, outputs).astype(np.float32) if outputs % 2 else None
    linear = CheckedLinear(weight, rows, random, bias)
    linear.x[:] = random.normal(0, 1, (rows, inputs))
    adversarial(linear.x)
    for _ in range(2):
        linear.begin()
        linear.answer()
        assert linear.finish()
        assert_same_bits(linear.out, linear.own_results())


@pytest.mark.parametrize("exponent", [-140, -80, -49, -48, -47, 0, 47, 48, 80, 120])
def test_scales_of_any_size_give_the_bits_of_a_division(isa, exponent):
    random = np.random.default_rng(3)
    weight = np.ldexp(random.normal(0, 1, (70, 64)), exponent).astype(np.float32)
    linear = CheckedLinear(weight, 15, random)
    for x_exponent in (-145, -60, -33, 0, 30, 63, 100):
        linear.x[:] = np.ldexp(random.normal(0, 1, (15, 64)), x_exponent - np.arange(15)[:, None]).astype(np.float32)
        linear.begin()
        linear.answer()
        assert linear.finish()
        assert_same_bits(linear.out, linear.own_results())


@pytest.mark.parametrize("bias", [np.nan, np.inf, FLOAT32_MAX])
def test_a_bias_that_is_no_number_gives_the_bits_of_the_linear(isa, bias):
    linear = honest(20, 8, 3, bias=np.full(20, bias, np.float32))
    assert linear.finish()
    assert_same_bits(linear.out, linear.own_results())


def test_m_is_the_quantised_row_in_the_field(isa, threads):
    linear = honest(5, 578, 9)
    adversarial(linear.x)
    linear.finish()
    copy = np.full((9, 578), 7, np.uint32)
    linear.begin(copy=copy)
    integers, _, _ = _native.quantise_rows(linear.x, linear.linear)
    np.testing.assert_array_equal(linear.m, integers.astype(np.int64) % FIELD)
    np.testing.assert_array_equal(copy, linear.m)


@pytest.mark.parametrize("outputs", [64, 65, 1026, 1027])
def test_a_copy_gets_the_words_of_y_as_they_were(isa, threads, outputs):
    linear = honest(outputs, 16, 5)
    lies = np.random.default_rng(1).integers(0, 2**32, (5, outputs), dtype=np.uint32)
    for y, holds in ((linear.y.copy(), True), (lies, False)):
        linear.y[:] = y
        copy = np.zeros_like(y)
        assert linear.finish(copy=copy) == holds
        np.testing.assert_array_equal(copy, y)
        linear.begin()


def test_a_row_that_is_no_number_is_checked_as_zeros():
    linear = honest(40, 16, 3)
    linear.finish()
    linear.x[1, 5] = np.nan
    linear.begin()
    assert not linear.m[1].any()
    linear.answer()
    assert linear.finish()
    assert_same_bits(linear.out[1], np.full(40, NAN))
    assert np.isfinite(linear.out[[0, 2]]).all()
    linear.begin()
    linear.y[1, 3] = 1
    assert not linear.finish()


@pytest.mark.parametrize("num_vectors", [1, 2, 3, 16])
def test_any_number_of_vectors_checks(isa, num_vectors):
    vectors = np.random.default_rng(2).integers(0, FIELD, (num_vectors, 130), dtype=np.uint32)
    linear = honest(130, 64, 5, vectors=vectors)
    assert linear.finish()
    linear.begin()
    linear.y[4, 129] ^= 1
    assert not linear.finish()


@pytest.mark.parametrize("word", [0, 1, FIELD // 2, FIELD // 2 + 1, FIELD - 1])
def test_vectors_of_extreme_words_hold_for_honest_products(isa, word):
    """Weights and integers of one sign: the largest sums that there are."""
    random = np.random.default_rng(0)
    outputs, inputs = 2000, 258
    linear = CheckedLinear(
        np.full((outputs, inputs), 127, np.float32), 5, random, vectors=np.full((2, outputs), word, np.uint32)
    )
    for sign in (-1, 1):
        linear.x[:] = sign
        linear.begin()
        linear.answer()
        assert linear.finish()
    linear.begin()
    linear.y[2, 7] += 1
    assert linear.finish() == (word == 0)


def one_more(linear: CheckedLinear) -> None:
    linear.y[1, 3] = (int(linear.y[1, 3]) + 1) % FIELD


def one_more_and_one_less(linear: CheckedLinear) -> None:
    one_more(linear)
    linear.y[1, 4] = (int(linear.y[1, 4]) - 1) % FIELD


def prime_more(linear: CheckedLinear) -> None:
    linear.y[1, 3] += FIELD


def the_prime_for_zero(linear: CheckedLinear) -> None:
    linear.y[2] = FIELD


def two_prime_for_zero(linear: CheckedLinear) -> None:
    linear.y[2] = 2 * FIELD


def all_ones(linear: CheckedLinear) -> None:
    linear.y[1, 3] = 2**32 - 1


def negative_looking(linear: CheckedLinear) -> None:
    """The same integers in two's complement."""
    linear.y[:] = centred(linear.y).astype(np.int32).view(np.uint32)


def swapped_rows(linear: CheckedLinear) -> None:
    linear.y[[0, 1]] = linear.y[[1, 0]]


def swapped_columns(linear: CheckedLinear) -> None:
    linear.y[:, [0, -1]] = linear.y[:, [-1, 0]]


def a_shifted_row(linear: CheckedLinear) -> None:
    linear.y[0] = np.roll(linear.y[0], 1)


def stale(linear: CheckedLinear) -> None:
    linear.y[:] = products(centred(linear.m)[::-1] + 1, linear.quantised)


def another_layers(linear: CheckedLinear) -> None:
    linear.y[:] = products(centred(linear.m), np.random.default_rng(9).permutation(linear.quantised))


def one_changed_weight(linear: CheckedLinear) -> None:
    linear.quantised[5, 6] += 1
    linear.answer()


def m_and_y_together(linear: CheckedLinear) -> None:
    linear.m[1, 2] = (int(linear.m[1, 2]) + 1) % FIELD
    linear.answer()


def a_multiple(linear: CheckedLinear) -> None:
    linear.y[0] = 2 * linear.y[0].astype(np.int64) % FIELD


def zeros(linear: CheckedLinear) -> None:
    linear.y[0] = 0


LIES = [
    one_more, one_more_and_one_less, prime_more, the_prime_for_zero, two_prime_for_zero, all_ones, negative_looking,
    swapped_rows, swapped_columns, a_shifted_row, stale, another_layers, one_changed_weight, m_and_y_together,
    a_multiple, zeros,
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_fails(isa, lie):
    linear = honest(70, 64, 5)
    linear.finish()
    linear.x[2] = 0
    linear.begin()
    linear.answer()
    truth = linear.y.copy()
    lie(linear)
    assert not linear.finish()
    linear.begin()
    linear.y[:] = truth
    assert linear.finish(), "what was false before is forgotten"


@pytest.mark.parametrize("outputs", [1025, 30_003])
def test_a_lie_fails_in_any_row_and_word(threads, outputs):
    linear = honest(outputs, 16, 5)
    for row in (0, 3, 4):
        for word in (0, 511, 512, outputs // 2, outputs - 1):
            linear.y[row, word] ^= 1 << 20
            assert not linear.finish()
            linear.y[row, word] ^= 1 << 20
            linear.begin()
    assert linear.finish()


def test_one_row_that_is_false_fails_a_block():
    linear = honest(33, 16, 64)
    for row in range(64):
        linear.y[row, row % 33] ^= 4
        assert not linear.finish()
        linear.y[row, row % 33] ^= 4
        linear.begin()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_change_of_words_fails(data):
    linear = honest(66, 8, 3, seed=data.draw(st.integers(0, 9)))
    places = st.tuples(st.integers(0, 2), st.integers(0, 65))
    changes = data.draw(st.dictionaries(places, st.integers(0, 2**32 - 1), min_size=1, max_size=8))
    before = linear.y.copy()
    for place, word in changes.items():
        linear.y[place] = word
    assert linear.finish() == bool((linear.y == before).all())


def test_out_is_made_of_the_words_that_were_checked(threads):
    """Somebody writes while they are read: what held is the honest result, and what was copied is what was used."""
    linear = honest(3001, 64, 16)
    right, expected = linear.y.copy(), linear.own_results()
    wrong = right.copy()
    wrong[:, ::97] = (wrong[:, ::97].astype(np.int64) + 1) % FIELD
    is_over = threading.Event()

    def scribble() -> None:
        while not is_over.is_set():
            linear.y[:] = wrong
            linear.y[:] = right

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        for round in range(200):
            copy = np.zeros_like(right) if round % 2 else None
            if linear.finish(copy=copy):
                assert_same_bits(linear.out, expected)
                assert copy is None or (copy == right).all()
            elif copy is not None:
                assert (copy != right).any()
                scale = linear.linear.scales / _native.quantise_rows(linear.x, linear.linear)[1][:, None]
                assert_same_bits(linear.out, centred(copy).astype(np.float32) * scale)
            linear.begin()
    finally:
        is_over.set()
        scribbler.join()


def test_blocks_are_finished_in_any_order():
    linear = honest(70, 16, 12)
    linear.finish()
    for first, rows in ((0, 4), (4, 1), (5, 7)):
        linear.begin(first, rows)
    linear.answer()
    linear.out[:] = 0
    for first, rows in ((4, 1), (5, 3), (0, 4), (8, 4)):
        assert linear.finish(first, rows)
    assert_same_bits(linear.out, linear.own_results())


def test_rows_keep_what_they_were_begun_with():
    """x and m of a row may change once it is begun; a row begun for one Linear is nothing to another's check."""
    linear = honest(70, 16, 4)
    linear.x[:], linear.m[:] = 5, 0
    assert linear.finish()


def test_a_row_is_begun_once_and_finished_once():
    linear = honest(10, 8, 4)
    with pytest.raises(ValueError, match="row 0 of the check was begun and is not finished"):
        linear.begin()
    assert linear.finish(1, 2)
    with pytest.raises(ValueError, match="row 1 of the check was not begun"):
        linear.finish()
    with pytest.raises(ValueError, match="row 3 of the check was begun and is not finished"):
        linear.begin(1, 3)
    assert linear.finish(0, 1), "a call that was refused changes nothing"
    assert linear.finish(3, 1)
    linear.begin(2, 0)
    assert linear.finish(2, 0), "no rows hold"
    fresh = CheckedLinear(np.ones((2, 2), np.float32), 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="row 1 of the check was not begun"):
        fresh.finish(1, 1)


def test_a_row_that_failed_is_finished():
    linear = honest(10, 8, 2)
    linear.y[0, 0] ^= 1
    assert not linear.finish()
    linear.begin()
    linear.answer()
    assert linear.finish()


def test_callers_at_once_work_on_rows_of_their_own():
    linear = honest(300, 64, 32)
    linear.finish()
    expected, failures = linear.own_results(), []

    def work(first: int) -> None:
        try:
            for _ in range(200):
                linear.begin(first, 8)
                if not linear.finish(first, 8):
                    failures.append(first)
        except ValueError as error:
            failures.append(error)

    callers = [threading.Thread(target=work, args=(first,)) for first in range(0, 32, 8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures
    assert_same_bits(linear.out, expected)


def test_callers_at_once_share_no_row():
    linear = honest(300, 64, 8)
    together = threading.Barrier(2)

    def begins(_: int) -> bool:
        together.wait()
        try:
            linear.begin()
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(2) as callers:
        for _ in range(100):
            assert linear.finish()
            assert sorted(callers.map(begins, range(2))) == [False, True]


def test_a_check_outlives_its_linear():
    linear = honest(70, 16, 3)
    expected = linear.own_results()
    linear.linear.set_rows(0, np.zeros((70, 16), np.float32))
    linear.linear.set_bias(np.ones(70, np.float32))
    del linear.linear
    assert linear.finish()
    assert_same_bits(linear.out, expected)


def test_what_a_check_reads_can_be_asked_for():
    linear = honest(70, 16, 3)
    linear.check.fetch()
    assert linear.finish()


def test_the_memory_of_a_check_is_its_vectors():
    linear = honest(640, 576, 8)
    vectors = 4 * 2 * (640 + 576)
    assert vectors + 4 * 640 <= linear.check.num_bytes <= vectors + 4 * 640 + 8 * 16


def test_what_a_check_refuses():
    random = np.random.default_rng(0)
    linear = CheckedLinear(np.ones((6, 4), np.float32), 3, random)
    good = np.ones((2, 6), np.uint32)
    for vectors, error, match in (
        (np.ones((2, 5), np.uint32), ValueError, "vectors: expected shape"),
        (good[0], ValueError, "vectors: expected shape"),
        (good.astype(np.int32), TypeError, "vectors: expected uint32"),
        (good.astype(np.float32), TypeError, "vectors: expected uint32"),
        (np.ones((2, 12), np.uint32)[:, ::2], ValueError, "vectors: expected a dense, aligned array"),
        (np.ones((0, 6), np.uint32), ValueError, "vectors: got 0, expected 1 to 16"),
        (np.ones((17, 6), np.uint32), ValueError, "vectors: got 17, expected 1 to 16"),
        (np.full((1, 6), FIELD, np.uint32), ValueError, r"vectors\[0, 0\]: expected less than 2\^31 - 1$"),
    ):
        with pytest.raises(error, match=match):
            _native.FieldCheck(linear.linear, vectors)
    check, slots = linear.check, linear.slots
    for x, m, first, rows, error, match in (
        (OUT, M, 0, 1, ValueError, "slot 3: its rows have 6 elements, expected 4"),
        (X, Y, 0, 1, ValueError, "slot 1: its rows have 6 elements, expected 4"),
        (M, M, 0, 1, TypeError, "x_slot: expected a slot of f32"),
        (X, X, 0, 1, TypeError, "m_slot: expected a slot of u32"),
        (X, M, 2, 2, IndexError, "of slot 2, which has 3"),
        (X, M, -1, 1, IndexError, "first_row: got -1"),
        (X, M, 0, -1, IndexError, "rows: got -1"),
        (9, M, 0, 1, IndexError, "slot 9 is not in the plan"),
        (-1, M, 0, 1, IndexError, "x_slot: got -1"),
    ):
        with pytest.raises(error, match=match):
            check.begin(slots, x, m, first, rows)
    check.begin(slots, X, M, 0, 3)
    for y, out, error, match in (
        (M, OUT, ValueError, "slot 0: its rows have 4 elements, expected 6"),
        (Y, X, ValueError, "slot 2: its rows have 4 elements, expected 6"),
        (OWN, OUT, TypeError, "y_slot: expected a slot of u32"),
        (Y, Y, TypeError, "out_slot: expected a slot of f32"),
    ):
        with pytest.raises(error, match=match):
            check.finish(slots, y, out, 0, 3)
    for copy, error, match in (
        (np.zeros((3, 5), np.uint32), ValueError, "copy: expected shape"),
        (np.zeros((2, 6), np.uint32), ValueError, "copy: expected shape"),
        (np.zeros((3, 6), np.int32), TypeError, "copy: expected uint32"),
        (np.frombuffer(bytes(72), np.uint32).reshape(3, 6), ValueError, "copy: expected a writeable array"),
    ):
        with pytest.raises(error, match=match):
            check.finish(slots, Y, OUT, 0, 3, copy)
    linear.answer()
    assert linear.finish()


def test_floats_lie_in_private_memory_only():
    """What a wrong number of a slot would put before the other side is refused."""
    linear = CheckedLinear(np.ones((4, 4), np.float32), 2, np.random.default_rng(0))
    memory = Arena((2, 4, F32), (2, 4, U32), own=((2, 4, F32), (2, 4, F32)))
    with pytest.raises(ValueError, match="x_slot: expected a slot of private memory"):
        linear.check.begin(memory.slots, 0, 1, 0, 2)
    linear.check.begin(memory.slots, 2, 1, 0, 2)
    with pytest.raises(ValueError, match="out_slot: expected a slot of private memory"):
        linear.check.finish(memory.slots, 1, 0, 0, 2)


def test_rows_that_share_a_word_are_not_written():
    memory = Arena((2, 3, U32), own=((2, 3, F32),))
    linear = _native.FieldLinear(4, 3)
    check = _native.FieldCheck(linear, np.ones((1, 4), np.uint32))
    with pytest.raises(ValueError, match="m_slot: a row takes 12 bytes, expected whole words of 8"):
        check.begin(memory.slots, 1, 0, 0, 1)
