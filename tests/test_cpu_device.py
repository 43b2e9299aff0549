"""The GPU process's native kernels for a CPU device: decode without a GEMM library, and moves of whole heads."""

from __future__ import annotations

import numpy as np
import pytest

from tsqp_shm import _native
from tsqp_shm.model.weights import bfloat16_to_float32, float32_to_bfloat16

VECTOR_SETS = [name for name in _native.instruction_sets() if name != "scalar"]
DTYPES = ("bfloat16", "float32")
# One rounding to bfloat16 at the output; in float32 the order of additions is free.
TOLERANCE = {"bfloat16": 2**-8, "float32": 1e-5}


@pytest.fixture(params=VECTOR_SETS, autouse=True)
def instruction_set(request):
    before = _native.active_instruction_set()
    _native.use_instruction_set(request.param)
    if not _native.has_few_rows_kernels():
        pytest.skip(f"{request.param} has no kernels for few rows here")
    yield request.param
    _native.use_instruction_set(before)


def stored(values, dtype):
    """The values as the kernels take them, and what they are exactly."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return values, values.astype(np.float64)
    bits = float32_to_bfloat16(values)
    return bits, bfloat16_to_float32(bits).astype(np.float64)


def loaded(array):
    return (bfloat16_to_float32(array) if array.dtype == np.uint16 else array).astype(np.float64)


def assert_close(out, expected, magnitude, dtype):
    """Within the rounding of the output, and of the additions in proportion to what was added."""
    error = np.abs(loaded(out) - expected)
    assert np.all(error <= TOLERANCE[dtype] * np.abs(expected) + 1e-6 * magnitude), error.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (3, 15), (4, 16), (5, 17), (7, 31), (8, 33), (66, 97), (9, 576)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_that_of_float64(dtype, rows, outputs, inputs, has_bias):
    random = np.random.default_rng(rows * 1000 + inputs)
    x, exact_x = stored(random.normal(size=(rows, inputs)), dtype)
    weight, exact_weight = stored(random.normal(size=(outputs, inputs)), dtype)
    bias, exact_bias = stored(random.normal(size=outputs), dtype)
    out = np.zeros((rows, outputs), x.dtype)
    _native.few_rows_linear(x, weight, bias if has_bias else None, out)
    expected = exact_x @ exact_weight.T + (exact_bias if has_bias else 0)
    assert_close(out, expected, np.abs(exact_x) @ np.abs(exact_weight).T + 1, dtype)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_linear_is_the_same_on_any_number_of_threads(num_threads):
    random = np.random.default_rng(0)
    x, _ = stored(random.normal(size=(2, 512)), "bfloat16")
    weight, _ = stored(random.normal(size=(1001, 512)), "bfloat16")
    outs = []
    before = _native.get_num_threads()
    for threads in (1, num_threads):
        _native.set_num_threads(threads)
        outs.append(np.zeros((2, 1001), np.uint16))
        _native.few_rows_linear(x, weight, None, outs[-1])
    _native.set_num_threads(before)
    assert np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "heads", "dim"), [(1, 1, 2), (3, 3, 64), (2, 5, 24), (4, 1, 80)])
@pytest.mark.parametrize(("position", "start", "columns"), [(0, 0, 64), (63, 0, 64), (64, 0, 128), (200, 128, 128)])
def test_decode_scores_append_and_score(dtype, groups, heads, dim, position, start, columns):
    random = np.random.default_rng(dim)
    capacity, width = 256, groups * dim
    qk, exact_qk = stored(random.normal(size=(heads + 1) * width), dtype)
    value, _ = stored(random.normal(size=width), dtype)
    keys, _ = stored(random.normal(size=(groups, dim, capacity)), dtype)
    values, _ = stored(random.normal(size=(groups, capacity, dim)), dtype)
    untouched_keys, untouched_values = keys.copy(), values.copy()
    out = np.zeros(groups * heads * columns, qk.dtype)

    _native.decode_scores(qk, value, keys, values, position, start, out)

    untouched_keys[:, :, position] = qk[heads * width :].reshape(groups, dim)
    untouched_values[:, position] = value.reshape(groups, dim)
    assert np.array_equal(keys, untouched_keys)
    assert np.array_equal(values, untouched_values)
    query = exact_qk[: heads * width].reshape(groups, heads, dim)
    seen = loaded(keys)[:, :, start : start + columns]
    assert_close(out.reshape(groups, heads, columns), query @ seen, np.abs(query) @ np.abs(seen) + 1, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "heads", "dim"), [(1, 1, 2), (3, 3, 64), (2, 5, 24), (4, 1, 80)])
@pytest.mark.parametrize(("start", "columns"), [(0, 64), (64, 192)])
def test_decode_context_weighs_the_values(dtype, groups, heads, dim, start, columns):
    random = np.random.default_rng(dim)
    probabilities, exact = stored(random.random(groups * heads * columns), dtype)
    values, exact_values = stored(random.normal(size=(groups, 256, dim)), dtype)
    out = np.zeros(groups * heads * dim, values.dtype)
    _native.decode_context(probabilities, values, start, out)
    seen = exact_values[:, start : start + columns]
    exact = exact.reshape(groups, heads, columns)
    assert_close(out.reshape(groups, heads, dim), exact @ seen, exact @ np.abs(seen) + 1, dtype)


def test_what_does_not_fit_is_refused():
    keys, values = np.zeros((1, 8, 128), np.float32), np.zeros((1, 128, 8), np.float32)
    qk, value, out = np.zeros(16, np.float32), np.zeros(8, np.float32), np.zeros(64, np.float32)
    for bad in (
        lambda: _native.decode_scores(qk, value, keys, values, 128, 0, out),
        lambda: _native.decode_scores(qk, value, keys, values, 0, 65, out),
        lambda: _native.decode_scores(qk, value, keys, values, 0, 0, out[:63]),
        lambda: _native.decode_scores(qk[:15], value, keys, values, 0, 0, out),
        lambda: _native.decode_context(out, values, 65, np.zeros(8, np.float32)),
        lambda: _native.few_rows_linear(qk[None], np.zeros((4, 15), np.float32), None, np.zeros((1, 4), np.float32)),
        lambda: _native.few_rows_linear(
            qk[None, ::2], np.zeros((4, 8), np.float32), None, np.zeros((1, 4), np.float32)
        ),
        lambda: _native.gather_heads(np.zeros((4, 8), np.float32), np.zeros((2, 4, 5), np.float32)),
    ):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(TypeError):
        _native.few_rows_linear(qk[None], np.zeros((4, 16), np.uint16), None, np.zeros((1, 4), np.float32))


@pytest.mark.parametrize(("rows", "heads", "dim", "stride"), [(1, 1, 2, 2), (5, 3, 24, 100), (128, 9, 64, 768)])
def test_heads_are_gathered_and_scattered(rows, heads, dim, stride):
    source = np.arange(rows * stride, dtype=np.uint16).reshape(rows, stride)[:, : heads * dim]
    blocks = np.zeros((heads, rows, dim), np.uint16)
    _native.gather_heads(source, blocks)
    assert np.array_equal(blocks, source.reshape(rows, heads, dim).transpose(1, 0, 2))
    back = np.zeros((rows, stride), np.uint16)[:, : heads * dim]
    _native.scatter_heads(blocks, back)
    assert np.array_equal(back, source)
