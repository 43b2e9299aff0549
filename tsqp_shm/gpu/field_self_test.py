"""Before a device serves a session, its products are held against numpy's int64, with the operands that are hardest to
get right. The TEE would find a false one too, and could not say whether it was the device or an attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import numpy as np
from numpy.typing import NDArray

from tsqp_shm.errors import DeviceError
from tsqp_shm.gpu.field_digits import THREE_DIGITS, TWO_DIGITS
from tsqp_shm.model.field_weights import FIELD

Multiply = Callable[[NDArray[np.int8], NDArray[np.uint32]], NDArray[np.uint32]]
"""weight [N, K], m [R, K] -> y [R, N]."""


def reference(weight: NDArray[np.int8], m: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """y = m W mod p. Numerics: sums below 2^55, for as many inputs as there may be."""
    y: NDArray[np.uint32] = (m.astype(np.int64) % FIELD @ weight.astype(np.int64).T % FIELD).astype(np.uint32)
    return y


def require_exact(device: str, multiply: Multiply, inputs: Iterable[int]) -> None:
    """Runs the products of Linears with so many inputs: rows together, and a row alone.

    Raises:
        DeviceError: one bit is wrong, or there is no such product.
    """
    for size in sorted(set(inputs)):
        weight, m = extreme_weight(size), extreme_rows(size)
        expected = reference(weight, m)
        for rows in (slice(None), slice(0, 1), slice(len(m) - 1, None)):
            try:
                y = multiply(weight, m[rows])
            except RuntimeError as error:
                # As the tensor library says that a card has no such product.
                reason = str(error).strip().splitlines()[0]
                raise DeviceError(device, f"it has no integer products: {reason}") from error
            wrong = np.count_nonzero(y != expected[rows])
            if wrong:
                raise DeviceError(
                    device,
                    f"its integer products are not exact: of {expected[rows].size} results with {size} inputs {wrong} "
                    "are wrong, so it cannot serve a mode that checks them",
                )


def extreme_weight(inputs: int) -> NDArray[np.int8]:
    """Weights of one sign, of turns, and of any kind. Shapes: [N, inputs]; a 127 in each row, so that int8 is what
    quantising it gives."""
    signs = _signs(inputs)
    random = np.random.default_rng(inputs).integers(-127, 128, (2, inputs))
    random[:, 0] = 127
    return np.concatenate([127 * signs, random]).astype(np.int8)


def extreme_rows(inputs: int) -> NDArray[np.uint32]:
    """At the ends of each number of digits, with digits that are all -128, any, and words of no field element.

    Shapes: [R, inputs]."""
    random = np.random.default_rng(inputs)
    ends = (1, TWO_DIGITS, TWO_DIGITS + 1, 0x8080, THREE_DIGITS, THREE_DIGITS + 1, 0x808080, FIELD // 2)
    rows = [end * sign for end, sign in product(ends, _signs(inputs))]
    rows += [random.integers(-bound, bound + 1, inputs) for bound in (TWO_DIGITS, THREE_DIGITS, FIELD // 2)]
    beyond = [np.full(inputs, word) for word in (FIELD, 2**32 - 1)]
    return np.concatenate([np.array(rows) % FIELD, beyond]).astype(np.uint32)


def _signs(inputs: int) -> NDArray[np.int64]:
    """All of them positive, negative, and by turns."""
    ones = np.ones(inputs, np.int64)
    turns = ones.copy()
    turns[1::2] = -1
    return np.stack([ones, -ones, turns])
