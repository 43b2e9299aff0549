"""What the check lets through, counted: every kind of false product, on the shapes of real models.

In every run a hundredth of it; `pytest -m long tests/test_tampering.py -s` prints the figures of the whole
(docs/security-evidence.md). The suite can fail: by one vector of small words the same lies come through, as often as
they must.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from checked_linear import FIELD, CheckedLinear, centred

from tsqp_shm import _native

# Outputs and inputs of SmolLM2-135M's q|k|v, o, gate|up and down.
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
ROWS = 48
ALPHA = 1e-6
SMALL = 251


class Session:
    """Rows of one Linear, begun and answered anew for each batch of lies, by new vectors."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        seed: int,
        num_vectors: int = 2,
        limit: int = FIELD,
        is_blinded: bool = False,
    ) -> None:
        self.random = np.random.default_rng(seed)
        self._num_vectors, self._limit = num_vectors, limit
        weight, other = self.random.normal(0, 0.02, (2, outputs, inputs)).astype(np.float32)
        self.linear = CheckedLinear(weight, ROWS, self.random)
        self.other = CheckedLinear(other, ROWS, self.random)
        if is_blinded:
            keys = _native.PadKeys(b"tampering", b"", 0, 1)
            self.linear.stock = _native.PadStock(keys, [self.linear.linear], 8 * ROWS, 1)
        self.answer(begins=True)

    def cross(self, first: int, rows: int) -> None:
        """Rows that were begun once more: as no pad blinds twice, other words cross."""
        self.linear.multiply(first, rows)
        self.other.m[first : first + rows] = self.linear.m[first : first + rows]
        self.other.multiply(first, rows)
        self.m[first : first + rows] = self.linear.m[first : first + rows]
        self.y[first : first + rows] = self.linear.y[first : first + rows]

    def answer(self, begins: bool = False) -> None:
        """New vectors and rows, which are checked once as they are."""
        linear = self.linear
        linear.draw(
            self.random.integers(0, self._limit, (self._num_vectors, linear.outputs), dtype=np.uint32),
        )
        if begins or self.random.integers(8) == 0:
            linear.x[:] = self.random.normal(0, 1, linear.x.shape)
            linear.x[: ROWS // 8, 0] = 1e4
        linear.begin()
        linear.multiply()
        assert linear.finish(), "an honest product was refused"
        self.m, self.y = linear.m.copy(), linear.y.copy()
        self.other.m[:] = linear.m
        self.other.multiply()
        # Distinct ones, so that what happens to one row says nothing of the next, whose vectors are the same.
        self.words = self.random.permutation(linear.outputs)[: 2 * ROWS].reshape(ROWS, 2)


Lie = Callable[[Session, int], None]


def add(words: np.ndarray, at: int, number: int) -> None:
    words[at] = (int(words[at]) + number) % FIELD


def one_more(session: Session, row: int) -> None:
    add(session.linear.y[row], session.words[row, 0], 1)


def one_more_and_one_less(session: Session, row: int) -> None:
    more, less = session.words[row]
    add(session.linear.y[row], more, 1)
    add(session.linear.y[row], less, -1)


def prime_more(session: Session, row: int) -> None:
    session.linear.y[row, session.words[row, 0]] += FIELD


def a_word_beyond(session: Session, row: int) -> None:
    session.linear.y[row, session.words[row, 0]] = session.random.integers(FIELD, 2**32)


def twos_complement(session: Session, row: int) -> None:
    """A negative number as another program would write it."""
    y = session.linear.y[row]
    at = int(np.argmax(y > FIELD // 2))
    y[at] += 2**31 + 1


def one_bit(session: Session, row: int) -> None:
    session.linear.y[row, session.words[row, 0]] ^= 1 << int(session.random.integers(31))


def any_word(session: Session, row: int) -> None:
    add(session.linear.y[row], session.words[row, 0], int(session.random.integers(1, FIELD)))


def any_row(session: Session, row: int) -> None:
    session.linear.y[row] = session.random.integers(0, FIELD, session.linear.outputs)


def zeros(session: Session, row: int) -> None:
    session.linear.y[row] = 0


def swapped_rows(session: Session, row: int) -> None:
    pair = row & ~1
    session.linear.y[[pair, pair + 1]] = session.y[[pair + 1, pair]]


def stale(session: Session, row: int) -> None:
    """The product of the row that was here before: another m of the same Linear."""
    session.linear.y[row] = session.y[(row + 7) % ROWS]


def another_layers(session: Session, row: int) -> None:
    session.linear.y[row] = session.other.y[row]


def one_changed_weight(session: Session, row: int) -> None:
    """The weight of an output and an input is one more or less."""
    integers = centred(session.m[row])
    inputs = np.flatnonzero(integers)
    change = int(integers[session.random.choice(inputs)]) * int(session.random.choice([-1, 1]))
    add(session.linear.y[row], session.words[row, 0], change)


def m_and_y_together(session: Session, row: int) -> None:
    """The arena holds another m, and its honest product."""
    linear, at = session.linear, int(session.random.integers(session.linear.inputs))
    add(linear.m[row], at, 1)
    linear.y[row] = (session.y[row] + linear.quantised[:, at].astype(np.int64)) % FIELD


def huge_but_legal(session: Session, row: int) -> None:
    session.linear.y[row, session.words[row, 0]] = FIELD // 2


LIES: list[Lie] = [
    one_more, one_more_and_one_less, prime_more, a_word_beyond, twos_complement, one_bit, any_word, any_row, zeros,
    swapped_rows, stale, another_layers, one_changed_weight, m_and_y_together, huge_but_legal,
]  # fmt: skip


def accepted(lie: Lie, sessions: list[Session], tries: int) -> int:
    """How many of so many rows are taken for honest after the lie."""
    found = done = 0
    for session in sessions * (-(-tries // (len(sessions) * ROWS))):
        session.answer()
        linear = session.linear
        for row in range(min(ROWS, tries - done)):
            first, rows = (row & ~1, 2) if lie is swapped_rows else (row, 1)
            linear.begin(first, rows)
            if linear.stock is not None:
                session.cross(first, rows)
            lie(session, row)
            found += linear.finish(first, rows)
            linear.m[first : first + rows] = session.m[first : first + rows]
            linear.y[first : first + rows] = session.y[first : first + rows]
            done += 1
    assert done == tries
    return found


def bounds(tries: int, share: float) -> tuple[int, int]:
    """Outside of which a number of hits lies by chance in one of 1 / ALPHA experiments at most."""
    logs = [
        math.lgamma(tries + 1)
        - math.lgamma(hits + 1)
        - math.lgamma(tries - hits + 1)
        + hits * math.log(share)
        + (tries - hits) * math.log1p(-share)
        for hits in range(tries + 1)
    ]
    below = np.cumsum(np.exp(logs))
    return int(np.searchsorted(below, ALPHA / 2)), int(np.searchsorted(below, 1 - ALPHA / 2))


def sessions(seed: int, **settings: int) -> list[Session]:
    return [Session(outputs, inputs, seed + i, **settings) for i, (outputs, inputs) in enumerate(SHAPES)]


def report(what: str, count: int, tries: int, begin: float) -> None:
    print(f"{what}: {count} of {tries:,} accepted, {time.perf_counter() - begin:.0f} s", flush=True)


def require_none(lie: Lie, tries: int, seed: int, *, is_blinded: bool = False) -> None:
    begin = time.perf_counter()
    count = accepted(lie, sessions(seed, is_blinded=is_blinded), tries)
    report(f"{lie.__name__}{', blinded' if is_blinded else ''}", count, tries, begin)
    assert count == 0


def require_share(lie: Lie, tries: int, seed: int) -> None:
    """By one vector of words below 251 these lies hold where a word is zero, or two are equal."""
    begin = time.perf_counter()
    count = accepted(lie, sessions(seed, num_vectors=1, limit=SMALL), tries)
    least, most = bounds(tries, 1 / SMALL)
    report(f"{lie.__name__}, one vector of words below {SMALL}, {least} to {most} expected", count, tries, begin)
    assert least <= count <= most


def require_honest(rows: int, seed: int, *, is_blinded: bool = False) -> None:
    """Rows of many sizes and shapes, by many vectors."""
    begin, done = time.perf_counter(), 0
    every = sessions(seed, is_blinded=is_blinded)
    while done < rows:
        for session in every:
            linear, random = session.linear, session.random
            linear.draw(random)
            scale = np.exp2(random.integers(-20, 20, (ROWS, 1))).astype(np.float32)
            linear.x[:] = np.roll(linear.x, int(random.integers(linear.inputs)), axis=1)
            linear.x *= scale / np.abs(linear.x).max(axis=1, keepdims=True)
            for _ in range(8):
                linear.x[:] = linear.x[random.permutation(ROWS)]
                linear.begin()
                linear.multiply()
                assert linear.finish(), "an honest product was refused"
                done += ROWS
    print(
        f"honest{', blinded' if is_blinded else ''}: {done:,} rows, no alarm, {time.perf_counter() - begin:.0f} s",
        flush=True,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = _native.get_num_threads()
    _native.set_num_threads(1)
    yield
    _native.set_num_threads(before)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_no_lie_is_accepted_of_a_thousand(lie):
    require_none(lie, 1000, seed=1)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_no_lie_about_blinded_rows_is_accepted(lie):
    require_none(lie, 100, seed=7, is_blinded=True)


@pytest.mark.long
@pytest.mark.parametrize("is_blinded", [False, True], ids=["clear", "blinded"])
@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_no_lie_is_accepted_of_a_hundred_thousand(lie, is_blinded):
    require_none(lie, 100_000, seed=2, is_blinded=is_blinded)


@pytest.mark.parametrize("lie", [one_more, one_more_and_one_less], ids=lambda lie: lie.__name__)
def test_one_small_vector_accepts_its_share_of_ten_thousand(lie):
    require_share(lie, 10_000, seed=3)


@pytest.mark.long
@pytest.mark.parametrize("lie", [one_more, one_more_and_one_less], ids=lambda lie: lie.__name__)
def test_one_small_vector_accepts_its_share_of_a_hundred_thousand(lie):
    require_share(lie, 100_000, seed=4)


def test_no_honest_row_is_refused_of_a_hundred_thousand():
    require_honest(100_000, seed=5)


@pytest.mark.long
def test_no_honest_row_is_refused_of_ten_million():
    require_honest(10_000_000, seed=6)


@pytest.mark.long
def test_no_honest_row_that_is_blinded_is_refused_of_a_million():
    require_honest(1_000_000, seed=8, is_blinded=True)
