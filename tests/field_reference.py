"""The arithmetic of the protected modes in plain numpy: int64 sums, float32 where a rule rounds.

Written from the rules alone (docs/architecture.md, "The arithmetic w8"), one row at a time, and shares no code with
`native/field/`.
"""

from __future__ import annotations

import numpy as np

TWO_DIGITS, THREE_DIGITS = 32_639, 8_355_711
SUM_LIMIT = 2**30 - 1
FLOAT32_MAX = np.finfo(np.float32).max
NAN = np.array([0x7FC00000], np.uint32).view(np.float32)[0]


def quantised_weights(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shapes: weight [N, K] f32 -> int8 [N, K] as int64, scales [N] f32."""
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    scales[scales == 0] = 1
    quotients = (weight / scales[:, None]).astype(np.float32)
    return np.clip(np.rint(quotients), -127, 127).astype(np.int64), scales


def scale_of(largest: np.float32, bound: int) -> np.float32:
    """The largest float32 s with s * largest <= bound: the product of two float32 is exact in float64."""
    if largest == 0:
        return np.float32(1)
    exact = float(largest)
    with np.errstate(over="ignore"):
        scale = min(np.float32(bound / exact), FLOAT32_MAX)
    while float(scale) * exact > bound:
        scale = np.nextafter(scale, np.float32(0))
    while scale < FLOAT32_MAX and float(np.nextafter(scale, np.float32(np.inf))) * exact <= bound:
        scale = np.nextafter(scale, np.float32(np.inf))
    return scale


def largest_squares(weight: np.ndarray) -> int:
    """The largest sum of an output's squares. Shapes: weight [N, K] of int8."""
    return int(np.einsum("nk,nk->n", weight, weight).max())


def quantised_row(x: np.ndarray, squares: int, first_bound: int = TWO_DIGITS) -> tuple[np.ndarray, np.float32]:
    """Shapes: x [K] f32 -> integers [K], scale.

    Args:
        squares: of the weights, `largest_squares`.
    """
    if not np.isfinite(x).all():
        return np.zeros(len(x), np.int64), NAN

    def rounded(scale: np.float32) -> np.ndarray:
        return np.rint(x * scale).astype(np.int64)

    largest = np.abs(x).max()
    scale = scale_of(largest, first_bound)
    integers = rounded(scale)
    if len(x) * int(np.abs(integers).max()) > 256 * int(np.abs(integers).sum()):
        scale = scale_of(largest, THREE_DIGITS)
        integers = rounded(scale)
    most = (SUM_LIMIT**2 - 1) // squares if squares else None
    while not (
        127 * int(np.abs(integers).sum()) < SUM_LIMIT or most is None or int((integers * integers).sum()) <= most
    ):
        scale = np.float32(scale / np.float32(2))
        integers = rounded(scale)
    return integers, scale


def product(
    x: np.ndarray,
    weight: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray | None = None,
    first_bound: int = TWO_DIGITS,
) -> np.ndarray:
    """Shapes: x [R, K] f32; weight [N, K] of int8; scales, bias [N] f32 -> [R, N] f32.

    The weights are int64, or float64, in which every sum here is exact too.
    """
    squares = largest_squares(weight)
    rows = [quantised_row(row, squares, first_bound) for row in x]
    sums = np.array([integers for integers, _ in rows], weight.dtype) @ weight.T
    assert np.abs(sums).max() < SUM_LIMIT
    row_scales = np.array([scale for _, scale in rows], np.float32)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        out: np.ndarray = sums.astype(np.float32) * (scales / row_scales)
        if bias is not None:
            out += bias
    out[np.isnan(out)] = NAN
    return out
