"""How much may be under way at once. Asked on the event loop alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tsqp_shm.serve.refusal import Refusal


class Admission:
    """Admission is by whole sequences: each completion has a place in the batch, or in the queue for one.

    Attributes:
        under_way: completions that run or wait.
        is_draining: nothing new is taken.
    """

    def __init__(self, max_num_seqs: int, max_queue: int) -> None:
        self.under_way = 0
        self.is_draining = False
        self._most = max_num_seqs + max_queue

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Raises:
        Refusal: there are not so many.
        """
        if self.is_draining:
            raise Refusal(
                503, "the server is about to end", kind="server_error", code="draining", headers={"Retry-After": "5"}
            )
        if count > self._most:
            raise Refusal(400, f"{count} completions in one request, and {self._most} places", code="too_many")
        if self.under_way + count > self._most:
            raise _later("the queue is full", "queue_full")
        self.under_way += count
        try:
            yield
        finally:
            self.under_way -= count


class HeldBytes:
    """Of the bodies of requests that are being read or answered."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0

    def take(self, count: int) -> None:
        """Raises:
        Refusal: all requests together would hold too many.
        """
        if self._held + count > self._most:
            raise _later("too many bytes of requests at once", "busy")
        self._held += count

    def give_back(self, count: int) -> None:
        self._held -= count


def _later(reason: str, code: str) -> Refusal:
    return Refusal(429, reason, kind="server_error", code=code, headers={"Retry-After": "1"})
