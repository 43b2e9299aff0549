"""What a forward pass computes before its checks have ended, and the one way out of it.

Within a pass later operations may depend on products that are not checked yet; nothing else may. So what leaves the
engine is `Unverified`, and it opens when every check of its pass has ended and held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from tsqp_shm.errors import IntegrityError
from tsqp_shm.shm.plan import Operation

T = TypeVar("T")
U = TypeVar("U")


class Verification:
    """The checks of one forward pass; of a mode that checks nothing there are none.

    Attributes:
        rows: how many rows of products were checked so far.

    A failure does not break the pass off: it makes the submissions that it would have made, so that the other side
    cannot see at which product it was found out.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._failure: Operation | None = None
        self._outstanding = 0
        self._has_ended = False

    def expect(self) -> None:
        """One more check will follow."""
        self._outstanding += 1

    def add(self, operation: Operation, rows: int, *, held: bool) -> None:
        """A check of so many rows has ended. Only the first failure is told."""
        self._outstanding -= 1
        self.rows += rows
        if not held and self._failure is None:
            self._failure = operation

    def end(self) -> None:
        """The pass is over, and what it has computed can be opened.

        Raises:
            IntegrityError: a check failed.
        """
        self.require_no_failure()
        # Not by assert, here and below: an optimised Python would pass over it.
        if self._outstanding:
            raise AssertionError(f"{self._outstanding} checks of a pass have not ended with it")
        self._has_ended = True

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
