"""A waker over any descriptor that carries bytes both ways: a socket pair, a Unix socket, a character device."""

from __future__ import annotations

import os
import select
import time

from tsqp_shm.shm.record_stream import RecordStream

# Of one read. Whatever the other side sends, less than this and a record is held here; the rest stays with the kernel,
# which stops the sender.
CHUNK_BYTES = 8192


class ByteStream(RecordStream):
    """One end; `shm.transport.Waker` says what the methods do.

    Args:
        fd: open for reading and writing; it is this object's to close.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        os.set_blocking(fd, False)
        self._fd = fd
        # The end of a record whose beginning the kernel has taken.
        self._unsent = b""
        self._has_ended = False

    def try_send(self, record: bytes) -> bool:
        if self._unsent and not self._flush():
            return False
        taken = self._write(record)
        # A record that is cut must not be: what is sent after its beginning is its end.
        self._unsent = record[taken:] if taken else b""
        return taken > 0

    def _flush(self) -> bool:
        self._unsent = self._unsent[self._write(self._unsent) :]
        return not self._unsent

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except (BlockingIOError, BrokenPipeError, ConnectionError):
            return 0

    def wait(self, timeout_ns: int) -> bool:
        if self._has_ended:
            # Of a stream that the other side has closed, poll would say at once that there is something to read.
            time.sleep(timeout_ns / 1e9)
            return False
        if self._unsent:
            # The other side may be waiting for the end of a record before it says anything.
            self._flush()
        # Rounded up: a slice that ends before the watch's next look is due would double the time between looks.
        return bool(self._poll(select.POLLIN, -(-timeout_ns // 1_000_000)))

    def _poll(self, events: int, timeout_ms: int) -> list[tuple[int, int]]:
        poll = select.poll()
        poll.register(self._fd, events)
        return poll.poll(timeout_ms)

    def _take(self) -> None:
        try:
            # UNTRUSTED: a copy of at most a chunk; what it holds is the caller's to check.
            chunk = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            chunk = b""
        self._has_ended = not chunk
        self._received += chunk

    def stranger(self) -> None:
        """There is none: both ends were handed out by who made the pair."""

    def close(self, linger_ms: int = 0) -> None:
        deadline = time.monotonic() + linger_ms / 1000
        while self._unsent and (left_s := deadline - time.monotonic()) > 0:
            self._poll(select.POLLOUT, int(left_s * 1000))
            self._flush()
        os.close(self._fd)
