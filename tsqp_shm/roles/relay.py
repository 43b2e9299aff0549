"""What an untrusted child prints, handed on line by line: at a bounded rate, whole lines of bounded length, printable.

Reading costs this process its interpreter, which a child that never stops printing would take from whatever else it
does. So a child may say much at once and little for ever. What is more is read away now and then, in large pieces that
nobody looks at, and counted.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any

from tsqp_shm.descriptors import socket_pair
from tsqp_shm.printable import shown

# Heard at once, and from then on; more is dropped until it may be heard at once again.
BURST_BYTES = 1 << 16
BYTES_PER_S = 1 << 14
# A short line costs as much as a longer one.
LINE_COST_BYTES = 64
# The child waits in its pipe meanwhile, so it can drop no more than a pipe holds in each.
TICK_S = 0.1
# A line is cut there.
MAX_LINE_BYTES = 4096
LAST_WORDS_LINES = 12
LAST_WORDS_LINE_LENGTH = 500
# Of what is dropped the end is kept: it may say why the child has died.
KEPT_BYTES = 4096
# What a dead child printed last is in the pipe already; what is printed after that is a grandchild's.
LAST_WORDS_S = 0.3
# For who takes the last lines.
_PATIENCE_S = 1.0


class Relay:
    """Listens to one child in a thread.

    Args:
        role: stands before each line.
        pipe: the child's; the relay closes it.
        listen: takes the lines.
    """

    def __init__(self, role: str, pipe: IO[Any], listen: Callable[[str], None]) -> None:
        self._role = role
        self._pipe = pipe
        self._listen = listen
        self._rest = b""
        self._last_lines: deque[str] = deque(maxlen=LAST_WORDS_LINES)
        self._allowance = float(BURST_BYTES)
        self._allowed_at = time.monotonic()
        self._over_at_s = math.inf
        # Readable as soon as the child has ended. By a shutdown and not by closing: a forked process has copies.
        self._end, self._has_ended = socket_pair()
        os.set_blocking(pipe.fileno(), False)
        # A daemon: nobody need tell it of the end.
        self._thread = threading.Thread(target=self._run, name=f"{role} relay", daemon=True)
        self._thread.start()

    @property
    def last_words(self) -> str:
        """The last lines, joined; they are the child's own."""
        return "\n".join(list(self._last_lines))

    def finish(self) -> None:
        """Hears the last lines of a child that has ended, in bounded time; nothing is handed on after that.

        Whatever else holds the other end of the pipe then writes to nobody.
        """
        self._over_at_s = min(self._over_at_s, time.monotonic() + LAST_WORDS_S)
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._thread.join(max(0.0, self._over_at_s + _PATIENCE_S - time.monotonic()))
        self._end.close()

    def _run(self) -> None:
        # This thread alone closes the pipe.
        with self._pipe, self._has_ended:
            while self._hear() and self._drop():
                pass
            self._say_rest()

    def _hear(self) -> bool:
        """Hands on what is printed until that is too much. Returns whether there may be more."""
        poll = select.poll()
        poll.register(self._pipe.fileno(), select.POLLIN)
        poll.register(self._has_ended.fileno(), select.POLLIN)
        while self._may_hear(at_least=1):
            ready = [descriptor for descriptor, _ in poll.poll()]
            if self._pipe.fileno() not in ready or time.monotonic() > self._over_at_s:
                return False
            data = os.read(self._pipe.fileno(), MAX_LINE_BYTES)
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._say(line)
            if len(self._rest) >= MAX_LINE_BYTES:
                self._say_rest()
            self._allowance -= max(len(data), len(lines) * LINE_COST_BYTES)
        return True

    def _may_hear(self, at_least: float) -> bool:
        now = time.monotonic()
        self._allowance = min(BURST_BYTES, self._allowance + (now - self._allowed_at) * BYTES_PER_S)
        self._allowed_at = now
        return self._allowance >= at_least

    def _drop(self) -> bool:
        """Reads away what is printed, until as much as at the beginning may be heard again.

        Returns:
            Whether there may be more.
        """
        buffer = memoryview(bytearray(1 << 16))
        dropped, kept, is_open = 0, self._rest, True
        end = select.poll()
        end.register(self._has_ended.fileno(), select.POLLIN)
        while is_open and not self._may_hear(at_least=BURST_BYTES):
            has_ended = bool(end.poll(TICK_S * 1000))
            try:
                # Without the interpreter, and to no new object.
                size = os.readv(self._pipe.fileno(), [buffer])
            except BlockingIOError:
                is_open = not has_ended
                continue
            dropped += size
            kept = (kept + bytes(buffer[max(0, size - KEPT_BYTES) : size]))[-KEPT_BYTES:]
            is_open = size > 0 and time.monotonic() < self._over_at_s
        if dropped:
            # Its last whole lines are said after all.
            last = kept.partition(b"\n")[2]
            dropped += len(self._rest) - len(last)
            self._listen(f"dropped {dropped:,} bytes of what the {self._role} process printed")
            *lines, self._rest = last.split(b"\n")
            for line in lines:
                self._say(line)
        return is_open

    def _say_rest(self) -> None:
        if self._rest:
            self._say(self._rest)
        self._rest = b""

    def _say(self, line: bytes) -> None:
        # UNTRUSTED: what another process prints is shown, so it must steer no terminal, and pass for nobody else's.
        for start in range(0, max(1, len(line)), MAX_LINE_BYTES):
            text = shown(line[start : start + MAX_LINE_BYTES].decode(errors="replace").rstrip("\r"), lines=False)
            self._last_lines.append(text[:LAST_WORDS_LINE_LENGTH])
            self._listen(f"{self._role}: {text}")
