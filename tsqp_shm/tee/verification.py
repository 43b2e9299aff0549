"""What a forward pass computes before its checks have ended, and the one way out of it.

Within a pass later operations may depend on products that are not checked yet; nothing else may. So what leaves the
engine is `Unverified`, and it opens when every check of its pass has ended and held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from tsqp_shm.errors import IntegrityError
from tsqp_shm.shm.plan import Operation

T = TypeVar("T")
U = TypeVar("U")


class Kept(NamedTuple):
    """Rows of a product that this process has computed itself, where others of the pass go to the GPU process.

    Attributes:
        is_of_layer: whether the rows are the pass's; else those whose logits are wanted.
    """

    is_of_layer: bool
    first_row: int
    rows: int


class Products(NamedTuple):
    """What has become of the products of a pass.

    Attributes:
        checked: rows that came from the GPU process, and held.
    """

    checked: int
    kept: tuple[Kept, ...]

    def kept_of(self, rows: tuple[int, int], wanted: tuple[int, int]) -> int:
        """How many rows of products were computed here of these rows of the pass, and of these whose logits are wanted.

        Args:
            rows, wanted: the first, and the one behind the last.
        """
        total = 0
        for kept in self.kept:
            first, end = rows if kept.is_of_layer else wanted
            total += max(0, min(end, kept.first_row + kept.rows) - max(first, kept.first_row))
        return total


class Verification:
    """The checks of one forward pass; of a mode that checks nothing there are none.

    A failure does not break the pass off: it makes the submissions that it would have made, so that the other side
    cannot see at which product it was found out.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._kept: list[Kept] = []
        self._failure: Operation | None = None
        self._outstanding = 0
        self._has_ended = False

    def expect(self) -> None:
        """One more check will follow."""
        self._outstanding += 1

    def add(self, operation: Operation, rows: int, *, held: bool) -> None:
        """A check of so many rows has ended. Only the first failure is told."""
        self._outstanding -= 1
        self._rows += rows
        if not held and self._failure is None:
            self._failure = operation

    def keep(self, kept: Kept) -> None:
        """A product of the pass needs no check."""
        self._kept.append(kept)

    def end(self) -> Products:
        """The pass is over, and what it has computed can be opened.

        Raises:
            IntegrityError: a check failed.
        """
        self.require_no_failure()
        # Not by assert, here and below: an optimised Python would pass over it.
        if self._outstanding:
            raise AssertionError(f"{self._outstanding} checks of a pass have not ended with it")
        self._has_ended = True
        return Products(self._rows, tuple(self._kept))

    def require_no_failure(self) -> None:
        """Raises:
        IntegrityError: a check failed, whatever else has ended the pass.
        """
        if self._failure is not None:
            raise IntegrityError(self._failure.name.lower(), self._failure.layer)

    def require_ended(self) -> None:
        if not self._has_ended:
            raise AssertionError("a value of a pass was opened before the pass's checks had ended")


class Unverified(Generic[T]):
    """A value of a pass, which may be false."""

    __slots__ = ("_value", "_verification")

    def __init__(self, value: T, verification: Verification) -> None:
        self._value = value
        self._verification = verification

    def map(self, compute: Callable[[T], U]) -> Unverified[U]:
        """What is computed of it at once, in private memory, and may be false as well.

        Args:
            compute: tells nobody, counts nothing and hands nothing over.
        """
        return Unverified(compute(self._value), self._verification)

    def open(self) -> T:
        """The value, of a pass whose checks have all ended and held. To be asked for after it."""
        self._verification.require_ended()
        return self._value
