"""The lifeline: one socket pair between a parent and a role that it started, and the few lines that are said on it.

The child says that it is ready, or which error it ends with. A parent that has started both roles tells the TEE process
when the GPU process has died, hands it what is to be said on the terminal that it writes to, and starts another GPU
process when the TEE process asks for one. The socket closes when
the process at either end dies, however it dies: so no orphan is left, and no pid has to be watched.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

from tsqp_shm.errors import (
    ArenaMismatch,
    ConfigError,
    DeviceError,
    LimitError,
    ModelFileError,
    PeerDied,
    TsqpError,
    UnsupportedModel,
)
from tsqp_shm.printable import shown

LIFELINE_VARIABLE = "TSQP_SHM_LIFELINE"
READY_LINE = b"ready\n"
WANTED_LINE = b"another gpu process\n"
DEAD_GPU_PREFIX = b"dead gpu process "
SAID_PREFIX = b"said "
FAILED_PREFIX = b"failed "
MAX_MESSAGE_LENGTH = 1000
# Longer than any line that either end says; of a line that is longer only the end is kept.
MAX_LINE_BYTES = 4 * MAX_MESSAGE_LENGTH + 64
# The SystemExit of a signal handler can come up in a finaliser, where Python drops it. So the child is asked again
# after this time: one that obeys at once has ended by then.
REPEAT_S = 1.5
# What a child may call the reason for its end; anything else it says counts as a death.
RELAYED_ERRORS = (ConfigError, DeviceError, LimitError, ModelFileError, UnsupportedModel, ArenaMismatch)


class Lifeline:
    """The child's end; `Lifeline.from_environment` also works where there is no parent."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection
        self._last_dead_gpu = -1
        self._listener: Callable[[str], None] | None = None

    @classmethod
    def from_environment(cls) -> Lifeline:
        descriptor = os.environ.pop(LIFELINE_VARIABLE, None)
        if descriptor is None:
            return cls(None)
        try:
            os.set_inheritable(int(descriptor), False)
            return cls(socket.socket(fileno=int(descriptor)))
        except (OSError, ValueError, OverflowError):
            raise ConfigError(LIFELINE_VARIABLE, descriptor, "nothing, as a parent of this package sets it") from None

    @property
    def has_parent(self) -> bool:
        return self._connection is not None

    def ready(self) -> None:
        """Tells the parent."""
        self._say(READY_LINE)

    def failed(self, error: TsqpError) -> None:
        """Tells the parent which error this process ends with, if it is one that the parent's user can mend."""
        if isinstance(error, RELAYED_ERRORS):
            self._say(failed_line(error))

    def listen(self, listener: Callable[[str], None]) -> None:
        """Has what the parent would say be said by this process, which knows where a line of the terminal begins.

        Args:
            listener: takes a line; called by the thread of `on_parent_gone`.
        """
        self._listener = listener

    def ask_for_gpu(self) -> None:
        """Asks the parent for another GPU process."""
        self._say(WANTED_LINE)

    def is_gpu_dead(self, number: int) -> bool:
        """Whether the parent has said so of its GPU process of that number, counted from 0."""
        return number <= self._last_dead_gpu

    def on_parent_gone(self, act: Callable[[], None]) -> None:
        """Listens to the parent in a thread; calls `act` there when it has died or has asked this process to end, and
        again as long as this process does not."""
        connection = self._connection
        if connection is None:
            return

        def listen() -> None:
            said = Lines()
            with contextlib.suppress(OSError):
                while data := connection.recv(4096):
                    for line in said.push(data):
                        self._heed(line)
            while True:
                act()
                time.sleep(REPEAT_S)

        threading.Thread(target=listen, daemon=True).start()

    def _heed(self, line: bytes) -> None:
        if line.startswith(SAID_PREFIX) and self._listener is not None:
            # UNTRUSTED: it may quote the GPU process.
            self._listener(shown(line.removeprefix(SAID_PREFIX).decode(errors="replace").rstrip("\n"), lines=False))
        number = line.removeprefix(DEAD_GPU_PREFIX).strip()
        if line.startswith(DEAD_GPU_PREFIX) and number.isdigit():
            self._last_dead_gpu = int(number)

    def _say(self, line: bytes) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sendall(line)


class ParentsGpu:
    """The GPU process where it is this process's sibling: their parent has started it, tells of its death, and starts
    another when it is asked."""

    def __init__(self, lifeline: Lifeline) -> None:
        self._lifeline = lifeline
        self._number = -1

    def start(self, session: object) -> ParentsGpu:
        """The next GPU process; the parent starts the first by itself."""
        self._number += 1
        if self._number > 0:
            self._lifeline.ask_for_gpu()
        return self

    def death(self) -> TsqpError | None:
        return PeerDied("gpu", "its parent says so") if self._lifeline.is_gpu_dead(self._number) else None

    def stop(self) -> None:
        """Its parent's to do."""

    def kill(self) -> None:
        """Its parent's to do, before it starts another."""

    def came_up(self) -> None:
        """Its parent is told that this process is ready."""


class Lines:
    """Cuts what comes in pieces into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, each with its end."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-MAX_LINE_BYTES:]
        return [line + b"\n" for line in lines]


def failed_line(error: TsqpError) -> bytes:
    message = shown(str(error), lines=False)[:MAX_MESSAGE_LENGTH]
    return FAILED_PREFIX + f"{type(error).__name__} {message}\n".encode()


def said_line(text: str) -> bytes:
    # Bounded, so that no end of it can pass for another line.
    return SAID_PREFIX + shown(text, lines=False)[:MAX_MESSAGE_LENGTH].encode(errors="replace") + b"\n"


def relayed_error(role: str, line: bytes) -> TsqpError | None:
    """The error that a role says it ends with, in that role's name; None if the line says no such thing."""
    kind, _, message = line.removeprefix(FAILED_PREFIX).rstrip(b"\n").partition(b" ")
    for error in RELAYED_ERRORS:
        if line.startswith(FAILED_PREFIX) and kind == error.__name__.encode():
            # UNTRUSTED: printable and bounded here too, whoever has said it.
            said = shown(message.decode(errors="replace"), lines=False)[:MAX_MESSAGE_LENGTH]
            return error.relayed(f"the {role} process says: {said}")
    return None


def dead_gpu_line(number: int) -> bytes:
    return DEAD_GPU_PREFIX + f"{number}\n".encode()
