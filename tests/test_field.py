"""The arithmetic `w8` as Python sees it, bit for bit against plain int64 and float32, on every instruction set.

The reference is `field_reference.py`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from field_reference import (
    FLOAT32_MAX,
    SUM_LIMIT,
    TWO_DIGITS,
    largest_squares,
    product,
    quantised_row,
    quantised_weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_memory import F32, Arena

from tsqp_shm import _native

MOST_INPUTS = 66_311


def reference_row(x: np.ndarray, quantised: np.ndarray) -> tuple[np.ndarray, np.float32, int]:
    """The integers of a row, its scale, and how many digits hold them."""
    integers, scale = quantised_row(x, largest_squares(quantised.astype(np.int64)))
    return integers, scale, 3 if np.abs(integers).max() > TWO_DIGITS else 2


def reference_apply(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return product(x, *quantised_weights(weight), bias)


def linear_of(weight: np.ndarray, bias: np.ndarray | None = None) -> _native.FieldLinear:
    linear = _native.FieldLinear(*weight.shape)
    linear.set_rows(0, weight)
    if bias is not None:
        linear.set_bias(bias)
    return linear


def apply(linear: _native.FieldLinear, x: np.ndarray, outputs: int) -> np.ndarray:
    """What a Linear makes of rows that lie in the middle of a slot; rows beside them stay as they were."""
    memory = Arena((len(x) + 2, x.shape[1], F32), (len(x) + 2, outputs, F32))
    into, out = memory.view
    into[1:-1] = x
    out[:] = -7.5
    linear.apply(memory.slots, 0, 1, 1, len(x))
    assert (out[[0, -1]] == -7.5).all()
    return out[1:-1]


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def rows_with_sum_of_squares(total: int, inputs: int) -> np.ndarray:
    """Integers up to 32,639, which is among them, so that their scale is 1, with exactly this sum of squares."""
    row = np.zeros(inputs, np.int64)
    row[0] = TWO_DIGITS
    even = math.isqrt((total - TWO_DIGITS**2) // (inputs - 32))
    row[1 : inputs - 31] = even
    left = total - int((row**2).sum())
    for at in range(inputs - 31, inputs):
        row[at] = min(math.isqrt(left), TWO_DIGITS)
        left -= int(row[at]) ** 2
    assert left == 0
    return row.astype(np.float32)


def adversarial_rows(inputs: int, random: np.random.Generator) -> np.ndarray:
    normal = random.normal(0, 1, (14, inputs)).astype(np.float32)
    normal[0] = 0
    normal[1] = -0.0
    normal[2] = 0
    normal[2, -1] = -3.25  # one-hot
    normal[3, inputs // 2] = 1e4  # a peak: three digits
    normal[4] *= np.float32(1e-40)
    normal[5] = np.float32(1e-45)
    normal[6] = normal[6] / np.abs(normal[6]).max() * FLOAT32_MAX
    normal[7] = np.copysign(FLOAT32_MAX, normal[7])
    normal[8, 0] = np.nan
    normal[9, -1] = -np.inf
    normal[10] = np.exp(8 * normal[10])
    normal[11] = 0.5  # quotients that are ties
    normal[11, 0] = TWO_DIGITS
    normal[12] = 1
    normal[13] = np.rint(1e4 * normal[13])
    return normal


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 2), (17, 63), (64, 64), (65, 66), (130, 577), (9, 3072)])
def test_a_linear_is_the_reference_bit_for_bit(isa, threads, outputs, inputs):
    random = np.random.default_rng(outputs)
    weight = random.normal(0, 0.02, (outputs, inputs)).astype(np.float32)
    weight[outputs // 2] = 0
    bias = random.normal(0, 1, outputs).astype(np.float32) if outputs % 2 else None
    x = adversarial_rows(inputs, random)
    assert_same_bits(apply(linear_of(weight, bias), x, outputs), reference_apply(x, weight, bias))


@pytest.mark.parametrize("inputs", [8192, 40_000, MOST_INPUTS])
def test_wide_rows_are_halved_until_no_sum_can_wrap(isa, inputs):
    random = np.random.default_rng(inputs)
    weight = random.choice(np.array([-1, 1], np.float32), (3, inputs))
    x = np.stack([weight[0], -weight[0], random.normal(0, 1, inputs).astype(np.float32), np.ones(inputs, np.float32)])
    x[3, 0] = 1e6
    linear = linear_of(weight)
    xq, scales, digits = _native.quantise_rows(x, linear)
    assert np.abs(xq[0]).max() < TWO_DIGITS // 2, "the row was to be halved"
    for row, found, scale, of_row in zip(x, xq, scales, digits, strict=True):
        expected = reference_row(row, linear.quantised(0, 3))
        np.testing.assert_array_equal(found, expected[0])
        assert (scale, of_row) == expected[1:]
    assert_same_bits(apply(linear, x, 3), reference_apply(x, weight, None))


@pytest.mark.parametrize("above", [0, 1])
def test_the_first_proof_holds_up_to_its_bound(isa, above):
    """127 sum|xq| is 2^30 - 4 at most: with one more in the row, a sum of weights of 127 could be 2^30 + 123."""
    inputs = 300
    row = np.zeros(inputs, np.int64)
    row[:259] = TWO_DIGITS
    row[259] = (SUM_LIMIT - 1) // 127 - 259 * TWO_DIGITS + above
    assert 0 < row[259] <= TWO_DIGITS
    weight = np.ones((2, inputs), np.float32)
    weight[1] = -1
    x = row.astype(np.float32)[None]
    linear = linear_of(weight)
    _, scales, _ = _native.quantise_rows(x, linear)
    assert scales[0] == (0.5 if above else 1)
    assert_same_bits(apply(linear, x, 2), reference_apply(x, weight, None))


@pytest.mark.parametrize("above", [0, 1])
def test_the_second_proof_holds_up_to_its_bound(isa, above):
    inputs = 8192
    random = np.random.default_rng(5)
    weight = random.normal(0, 0.02, (5, inputs)).astype(np.float32)
    linear = linear_of(weight)
    squares = int((linear.quantised(0, 5).astype(np.int64) ** 2).sum(axis=1).max())
    row = rows_with_sum_of_squares((SUM_LIMIT**2 - 1) // squares + above, inputs)
    assert 127 * np.abs(row.astype(np.int64)).sum() >= SUM_LIMIT, "the first proof was not to hold"
    _, scales, _ = _native.quantise_rows(row[None], linear)
    assert scales[0] == (0.5 if above else 1)
    assert_same_bits(apply(linear, row[None], 5), reference_apply(row[None], weight, None))


def test_the_largest_sum_of_digits_fits(isa):
    """All digits 255, all weights of one sign, as many inputs as there may be: the sums of a digit row end at 2^31."""
    inputs = MOST_INPUTS
    weight = np.full((2, inputs), 127, np.float32)
    weight[1] = -127
    x = np.full((1, inputs), -1, np.float32)  # xq + 2^15 has a low digit that is large
    x[0, :4] = [TWO_DIGITS, -TWO_DIGITS, TWO_DIGITS, -TWO_DIGITS]
    assert_same_bits(apply(linear_of(weight), x, 2), reference_apply(x, weight, None))


def test_rows_together_are_rows_alone(isa, threads):
    """Several runs of blocks, some of their rows with three digits, some not numbers."""
    random = np.random.default_rng(3)
    outputs, inputs, rows = 70, 1536, 331
    weight = random.normal(0, 0.02, (outputs, inputs)).astype(np.float32)
    x = random.normal(0, 1, (rows, inputs)).astype(np.float32)
    x[random.random(rows) < 0.3, 5] = 3e3
    x[::50, 7] = np.nan
    linear = linear_of(weight)
    together = apply(linear, x, outputs)
    assert np.isnan(together[::50]).all()
    assert np.isfinite(together[np.arange(rows) % 50 != 0]).all()
    for begin, end in ((0, 1), (1, 3), (47, 50), (100, 200), (330, 331)):
        assert_same_bits(apply(linear, x[begin:end], outputs), together[begin:end])
    assert_same_bits(together[:60], reference_apply(x[:60], weight, None))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_row_is_quantised_as_the_rules_say(data):
    inputs = data.draw(st.sampled_from([1, 2, 5, 64, 129, 1000]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    exponents = data.draw(st.tuples(st.integers(-149, 127), st.integers(0, 60)))
    x = np.ldexp(random.uniform(-1, 1, inputs), exponents[0] - random.integers(0, exponents[1] + 1, inputs))
    values = data.draw(st.lists(st.floats(width=32), max_size=inputs))
    x[: len(values)] = values
    rows = x.astype(np.float32)[None]
    weight = random.normal(0, 1, (2, inputs)).astype(np.float32)
    linear = linear_of(weight)
    before = _native.active_instruction_set()
    try:
        for name in _native.instruction_sets():
            _native.use_instruction_set(name)
            xq, scales, digits = _native.quantise_rows(rows, linear)
            expected = reference_row(rows[0], linear.quantised(0, 2))
            np.testing.assert_array_equal(xq[0], expected[0])
            assert_same_bits(scales, expected[1][None])
            assert digits[0] == expected[2]
            assert_same_bits(apply(linear, rows, 2), reference_apply(rows, weight, None))
    finally:
        _native.use_instruction_set(before)


@pytest.mark.parametrize("is_bf16", [False, True], ids=["f32", "bf16"])
def test_weights_are_quantised_row_by_row(isa, threads, is_bf16):
    random = np.random.default_rng(11)
    outputs, inputs = 150, 83
    weight = random.normal(0, 1, (outputs, inputs)).astype(np.float32)
    weight *= np.exp2(random.integers(-140, 100, outputs)).astype(np.float32)[:, None]
    weight[:6] = [[0], [1e-45], [2e-43], [FLOAT32_MAX], [-1], [127]]
    weight[6] = np.arange(inputs) + 0.5  # quotients that are ties
    weight[6, 0] = 127
    bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
    if is_bf16:
        weight = (bits.astype(np.uint32) << 16).view(np.float32)
    linear = _native.FieldLinear(outputs, inputs)
    for begin, end in ((0, 1), (1, 70), (70, 128), (128, 150)):
        linear.set_rows(begin, bits[begin:end] if is_bf16 else weight[begin:end])
    quantised, scales = quantised_weights(weight)
    np.testing.assert_array_equal(linear.quantised(0, outputs), quantised)
    np.testing.assert_array_equal(linear.quantised(63, 3), quantised[63:66])
    assert_same_bits(linear.scales, scales)
    x = random.normal(0, 1, (3, inputs)).astype(np.float32)
    assert_same_bits(apply(linear, x, outputs), reference_apply(x, weight, None))


def test_weights_that_are_set_again_are_forgotten():
    """The largest weights decide how far a row may reach; once they are gone they decide no longer."""
    inputs = 4096
    linear = linear_of(np.ones((1, inputs), np.float32))
    x = np.ones((1, inputs), np.float32)
    halved, _, _ = _native.quantise_rows(x, linear)
    narrow = np.zeros((1, inputs), np.float32)
    narrow[0, 0] = 1
    linear.set_rows(0, narrow)
    whole, _, _ = _native.quantise_rows(x, linear)
    assert (halved[0, 0], whole[0, 0]) == (2040, TWO_DIGITS)
    assert_same_bits(apply(linear, x, 1), reference_apply(x, narrow, None))


def test_a_linear_that_nothing_was_set_of_gives_its_bias():
    linear = _native.FieldLinear(3, 5)
    bias = np.array([1, -2, 3], np.float32)
    linear.set_bias(bias)
    np.testing.assert_array_equal(apply(linear, np.ones((2, 5), np.float32), 3), [bias, bias])


def test_weights_take_a_byte_each():
    linear = _native.FieldLinear(640, 576)
    assert 640 * 576 <= linear.num_bytes <= 640 * (576 + 16)


def test_what_a_linear_refuses():
    with pytest.raises(ValueError, match=r"inputs: got 66312, expected 1 to 66311"):
        _native.FieldLinear(1, MOST_INPUTS + 1)
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="got 0"):
            _native.FieldLinear(*sizes)
    linear = _native.FieldLinear(3, 4)
    weight = np.ones((3, 4), np.float32)
    with pytest.raises(IndexError, match=r"outputs \[1, \+3\) of a Linear that has 3"):
        linear.set_rows(1, weight)
    with pytest.raises(IndexError, match="first_output: got -1"):
        linear.set_rows(-1, weight)
    with pytest.raises(ValueError, match="weight: expected shape"):
        linear.set_rows(0, np.ones((3, 5), np.float32))
    with pytest.raises(TypeError, match="weight: expected float32"):
        linear.set_rows(0, weight.astype(np.float64))
    with pytest.raises(IndexError, match="of a Linear that has 3"):
        linear.quantised(2, 2**40)
    with pytest.raises(ValueError, match="bias: expected shape"):
        linear.set_bias(np.ones(4, np.float32))
    weight[1, 2] = np.inf
    with pytest.raises(ValueError, match="weight: row 1 of the Linear holds a NaN or an infinity"):
        linear.set_rows(0, weight)
    slots = Arena((2, 4, F32), (2, 3, F32)).slots
    with pytest.raises(ValueError, match="slot 1: its rows have 3 elements, expected 4"):
        linear.apply(slots, 1, 0, 0, 1)
    with pytest.raises(IndexError, match="of slot 0, which has 2"):
        linear.apply(slots, 0, 1, 1, 2)
    with pytest.raises(ValueError, match="out_slot: expected another slot"):
        linear.apply(slots, 0, 0, 0, 1)
