"""A Linear whose products somebody else makes, its check, and the slots between the two."""

from __future__ import annotations

import numpy as np
from slot_memory import F32, U32, Arena

from tsqp_shm import _native

FIELD = 2**31 - 1
M, Y, X, OUT, OWN = range(5)


class CheckedLinear:
    """m and y lie in an arena, x and the results in private memory.

    Attributes:
        m, y, x, out: [rows, ...], as numpy sees the slots.
        quantised: [outputs, inputs], integers as float64, in which every sum here is exact too.
        stock: of which rows that are begun take pads; None: they cross as they are.

    Args:
        weight: [outputs, inputs] f32.
        vectors: [V, outputs] u32; None: two, by `random`.
    """

    def __init__(
        self,
        weight: np.ndarray,
        rows: int,
        random: np.random.Generator,
        bias: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
    ) -> None:
        self.outputs, self.inputs = weight.shape
        self.rows = rows
        self.linear = _native.FieldLinear(self.outputs, self.inputs)
        self.linear.set_rows(0, weight)
        if bias is not None:
            self.linear.set_bias(bias)
        self.quantised = self.linear.quantised(0, self.outputs).astype(np.float64)
        memory = Arena(
            (rows, self.inputs, U32),
            (rows, self.outputs, U32),
            own=((rows, self.inputs, F32), (rows, self.outputs, F32), (rows, self.outputs, F32)),
        )
        self.slots = memory.slots
        self.m, self.y, self.x, self.out, self._own = memory.view
        self.stock: _native.PadStock | None = None
        self.draw(random if vectors is None else vectors)

    def draw(self, vectors: np.ndarray | np.random.Generator) -> None:
        """A check by other vectors; of a generator it takes two."""
        if isinstance(vectors, np.random.Generator):
            vectors = vectors.integers(0, FIELD, (2, self.outputs), dtype=np.uint32)
        self.check = _native.FieldCheck(self.linear, vectors)

    def begin(self, first_row: int = 0, rows: int | None = None, copy: np.ndarray | None = None) -> None:
        rows = self.rows if rows is None else rows
        pads = None
        if self.stock is not None:
            assert self.stock.wait(0, rows, 30.0)
            pads = self.stock.take(0, rows)
        self.check.begin(self.slots, X, M, first_row, rows, copy, pads)

    def finish(self, first_row: int = 0, rows: int | None = None, copy: np.ndarray | None = None) -> bool:
        return self.check.finish(self.slots, Y, OUT, first_row, self.rows if rows is None else rows, copy)

    def answer(self) -> None:
        """The honest products of all rows of m, by plain integers."""
        self.y[:] = products(centred(self.m), self.quantised)

    def multiply(self, first_row: int = 0, rows: int | None = None) -> None:
        """The same by this package."""
        self.linear.multiply(self.slots, M, Y, first_row, self.rows if rows is None else rows)

    def own_results(self) -> np.ndarray:
        """What the Linear makes of x by itself."""
        self.linear.apply(self.slots, X, OWN, 0, self.rows)
        return self._own.copy()


def products(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Elements of the field. Shapes: rows [R, K] of integers, weights [N, K] -> [R, N] int64."""
    return (rows.astype(np.float64) @ weights.T).astype(np.int64) % FIELD


def centred(words: np.ndarray) -> np.ndarray:
    """Elements of the field as int64 around zero."""
    integers = words.astype(np.int64)
    integers[integers > FIELD // 2] -= FIELD
    return integers


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def honest(outputs: int, inputs: int, rows: int, seed: int = 0, **settings: np.ndarray) -> CheckedLinear:
    """Begun and answered, each by the rules."""
    random = np.random.default_rng(seed)
    linear = CheckedLinear(random.normal(0, 0.02, (outputs, inputs)).astype(np.float32), rows, random, **settings)
    linear.x[:] = random.normal(0, 1, (rows, inputs))
    linear.begin()
    linear.answer()
    return linear
