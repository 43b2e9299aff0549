"""What wakers over streams of bytes share: bytes are cut into records as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod

from tsqp_shm.shm import layout


class RecordStream(ABC):
    """The receiving half of a `shm.transport.Waker`, which says what the methods do."""

    def __init__(self) -> None:
        # What came and was not asked for yet: less than a record and a chunk.
        self._received = b""

    def receive(self, timeout_ns: int) -> bytes | None:
        if len(self._received) < layout.RECORD_BYTES and self.wait(timeout_ns):
            self._take()
        if len(self._received) < layout.RECORD_BYTES:
            return None
        record, self._received = self._received[: layout.RECORD_BYTES], self._received[layout.RECORD_BYTES :]
        return record

    def discard(self) -> None:
        # UNTRUSTED: a peer that sends without end must not keep this side here; an honest one has rung less often.
        for _ in range(layout.RING_DEPTH):
            if not self.wait(0):
                return
            self._take()
            self._received = b""

    @abstractmethod
    def wait(self, timeout_ns: int) -> bool: ...

    @abstractmethod
    def _take(self) -> None:
        """Adds to what was received what is there, at most a chunk."""
