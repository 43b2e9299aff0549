"""Products in the field of p = 2^31 - 1, as they cross between two processes, against numpy's int64."""

from __future__ import annotations

import numpy as np
import pytest
from field_reference import SUM_LIMIT, THREE_DIGITS, TWO_DIGITS, quantised_weights
from slot_memory import F32, U32, Arena

from tsqp_shm import _native

P = 2**31 - 1
HALF = P // 2
MOST_INPUTS = 66_311


def linear_of(weight: np.ndarray, bias: np.ndarray | None = None) -> _native.FieldLinear:
    linear = _native.FieldLinear(*weight.shape)
    linear.set_rows(0, weight.astype(np.float32))
    if bias is not None:
        linear.set_bias(bias)
    return linear


def multiply(linear: _native.FieldLinear, m: np.ndarray, outputs: int) -> np.ndarray:
    """What a Linear makes of rows that lie in the middle of a slot; rows beside them stay as they were."""
    memory = Arena((len(m) + 2, m.shape[1], U32), (len(m) + 2, outputs, U32))
    into, out = memory.view
    into[1:-1] = m
    out[:] = 77
    linear.multiply(memory.slots, 0, 1, 1, len(m))
    assert (out[[0, -1]] == 77).all()
    assert (into[1:-1] == m).all()
    return out[1:-1]


def reference(m: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Shapes: m [R, K] of any words; weight [N, K] of int8 -> [R, N] in [0, p). No sum reaches 2^55."""
    result: np.ndarray = (m.astype(np.int64) % P) @ weight.astype(np.int64).T % P
    return result


def centred(elements: np.ndarray) -> np.ndarray:
    integers = elements.astype(np.int64)
    return np.where(integers > HALF, integers - P, integers)


def adversarial_rows(weight: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rows of each number of digits and at their ends, of all words that there are."""
    inputs = weight.shape[1]
    signs = np.where(weight[0] < 0, -1, 1)
    ends = [0, 1, TWO_DIGITS, TWO_DIGITS + 1, THREE_DIGITS, THREE_DIGITS + 1, HALF]
    rows = [*(end * signs for end in ends), *(-end * signs for end in ends)]
    rows += [random.integers(-bound, bound + 1, inputs) for bound in (9, TWO_DIGITS, THREE_DIGITS, HALF)]
    for largest in (TWO_DIGITS, THREE_DIGITS, HALF):  # one word decides for its row
        row = random.integers(-9, 10, inputs)
        row[-1] = largest
        rows.append(row)
    words = np.array(rows) % P
    beyond = [np.full(inputs, word) for word in (P, P + 1, 2**31, 2 * P, 2**32 - 1)]
    return np.array([*words, *beyond, random.integers(0, 2**32, inputs)]).astype(np.uint32)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 2), (17, 63), (64, 64), (65, 66), (130, 577), (9, 3072)])
def test_a_product_in_the_field_is_the_reference(isa, threads, outputs, inputs):
    random = np.random.default_rng(outputs)
    linear = linear_of(random.normal(0, 0.02, (outputs, inputs)))
    weight = linear.quantised(0, outputs)
    m = adversarial_rows(weight, random)
    np.testing.assert_array_equal(multiply(linear, m, outputs), reference(m, weight))


def test_the_widest_rows_of_the_largest_words_are_exact(isa):
    """As many inputs as there may be, all weights at their ends: the largest sums of every number of digits."""
    weight = np.full((3, MOST_INPUTS), 127)
    weight[1] = -127
    weight[2, ::2] = -127
    linear = linear_of(weight)
    m = np.array([[end] * MOST_INPUTS for end in (1, TWO_DIGITS, THREE_DIGITS, HALF, P - HALF, P - TWO_DIGITS, P - 1)])
    m = np.concatenate([m, m * weight[2] // 127 % P]).astype(np.uint32)
    np.testing.assert_array_equal(multiply(linear, m, 3), reference(m, weight))


@pytest.mark.parametrize("above", [0, 1])
def test_sums_are_put_together_in_32_bits_only_while_they_fit(isa, above):
    """127 sum|c| is p - 8 at most: with one more in the row, the same weights sum to p + 119."""
    inputs = 600
    row = np.zeros(inputs, np.int64)
    row[:518] = TWO_DIGITS
    row[518] = (P - 1) // 127 - 518 * TWO_DIGITS + above
    assert 0 < row[518] <= TWO_DIGITS
    weight = np.full((2, inputs), 127)
    weight[1] = -127
    assert (127 * row.sum() >= P) == bool(above)
    m = np.array([row, -row]) % P
    np.testing.assert_array_equal(multiply(linear_of(weight), m.astype(np.uint32), 2), reference(m, weight))


def test_rows_together_are_rows_alone(isa, threads):
    """Several runs of blocks, whose rows have two digits, three or four."""
    random = np.random.default_rng(3)
    outputs, inputs, rows = 70, 1536, 331
    linear = linear_of(random.normal(0, 0.02, (outputs, inputs)))
    bounds = random.choice([9, TWO_DIGITS, THREE_DIGITS, HALF], rows, p=[0.3, 0.4, 0.2, 0.1])
    m = (random.integers(-HALF, HALF, (rows, inputs)) * (bounds / HALF)[:, None]).astype(np.int64) % P
    m = m.astype(np.uint32)
    together = multiply(linear, m, outputs)
    np.testing.assert_array_equal(together, reference(m, linear.quantised(0, outputs)))
    for begin, end in ((0, 1), (1, 3), (47, 50), (100, 200), (330, 331)):
        np.testing.assert_array_equal(multiply(linear, m[begin:end], outputs), together[begin:end])


def test_results_are_those_of_a_linear_that_was_applied(isa, threads):
    """What the TEE makes of y with the row's scale has the bits that it computes by itself."""
    random = np.random.default_rng(5)
    outputs, inputs, rows = 75, 583, 60
    weight, bias = random.normal(0, 0.02, (outputs, inputs)), random.normal(0, 1, outputs).astype(np.float32)
    x = random.normal(0, 1, (rows, inputs)).astype(np.float32)
    x[::3, 5] = 3e3  # three digits
    x[7] = 0
    linear = linear_of(weight, bias)
    memory = Arena((rows, inputs, F32), (rows, outputs, F32))
    memory.view[0][:] = x
    linear.apply(memory.slots, 0, 1, 0, rows)
    integers, scales, _ = _native.quantise_rows(x, linear)
    y = centred(multiply(linear, (integers.astype(np.int64) % P).astype(np.uint32), outputs))
    result = y.astype(np.float32) * (linear.scales / scales[:, None]) + bias
    np.testing.assert_array_equal(result.view(np.uint32), memory.view[1].view(np.uint32))


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("proof", ["sum", "squares"])
def test_a_row_at_the_bound_comes_back_and_one_above_it_would_not(isa, proof, step):
    """Why the quantiser has its rules: y is known modulo p, and is the sum itself only within +-(p - 1) / 2.

    Rows that lie as their weights do reach the bound of either proof. One step above it, past the quantiser, the sum
    wraps; the quantiser halves that row.
    """
    weight = np.ones((2, 66_000), np.int64)
    if proof == "sum":
        weight[0], inputs = 127, 300
        row = np.zeros(inputs, np.int64)
        row[:259] = TWO_DIGITS
        row[259] = (SUM_LIMIT - 1) // 127 - 259 * TWO_DIGITS + step
    else:
        inputs = 60_256
        weight[0, :256] = 127
        row = (256 + step) * weight[0, :inputs]
    weight = weight[:, :inputs]
    weight[1] = -weight[0]
    linear = linear_of(weight)
    np.testing.assert_array_equal(linear.quantised(0, 2), weight)
    m = (row % P).astype(np.uint32)[None]
    y = centred(multiply(linear, m, 2))[0]
    sums = weight @ row
    assert (y == sums).all() == (step == 0)
    assert (y == centred(sums % P)).all(), "modulo p it is right all the same"
    if step:
        assert row.max() == TWO_DIGITS, "its scale would be 1"
        assert _native.quantise_rows(row.astype(np.float32)[None], linear)[1][0] == 0.5


def test_what_a_product_in_the_field_refuses():
    linear = linear_of(np.ones((3, 4)))
    slots = Arena((2, 4, U32), (2, 3, U32), (2, 4, F32), (2, 3, F32)).slots
    linear.multiply(slots, 0, 1, 0, 2)
    for into, out in ((2, 1), (0, 3), (2, 3)):
        with pytest.raises(TypeError, match="a product in the field takes and gives u32"):
            linear.multiply(slots, into, out, 0, 1)
    with pytest.raises(TypeError, match="a Linear of w8 takes and gives f32"):
        linear.apply(slots, 0, 1, 0, 1)
    with pytest.raises(ValueError, match="slot 1: its rows have 3 elements, expected 4"):
        linear.multiply(slots, 1, 0, 0, 1)
    with pytest.raises(IndexError, match="of slot 0, which has 2"):
        linear.multiply(slots, 0, 1, 1, 2)
    with pytest.raises(ValueError, match="out_slot: expected another slot"):
        linear.multiply(slots, 0, 0, 0, 1)


def test_scales_and_bias_take_no_part_in_it():
    random = np.random.default_rng(7)
    weight = random.normal(0, 1, (5, 9)).astype(np.float32)
    m = random.integers(0, P, (2, 9)).astype(np.uint32)
    y = multiply(linear_of(weight, np.full(5, 7, np.float32)), m, 5)
    np.testing.assert_array_equal(y, reference(m, quantised_weights(weight)[0]))
