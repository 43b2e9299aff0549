"""Role processes: a parent's hold on a child it started, and the child's on its parent.

Between the two lies one socket pair, the lifeline. The child writes a line to it when it is ready; its end closes when
either dies, however it dies, so no orphan is left and no pid has to be watched.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

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

LIFELINE_VARIABLE = "TSQP_SHM_LIFELINE"
READY_LINE = b"ready\n"
# What a child may call the reason for its end; anything else it says counts as a death.
RELAYED_ERRORS = (ConfigError, DeviceError, LimitError, ModelFileError, UnsupportedModel, ArenaMismatch)
# What every error line of the command begins with.
ERROR_PREFIX = "tsqp-shm: "
LAST_WORDS_LINES = 12
MAX_LINE_BYTES = 4096
# A role that was told to stop needs this long at most to let go of a device.
POLITE_STOP_S = 5.0
FIRM_STOP_S = 2.0


class RoleProcess:
    """A child process that plays one role; use `RoleProcess.start`."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], lifeline: socket.socket) -> None:
        self.role = role
        self._process = process
        self._lifeline = lifeline
        self._lifeline.setblocking(False)
        self._heard = b""
        self._last_lines: deque[str] = deque(maxlen=LAST_WORDS_LINES)
        self._listener: threading.Thread | None = None

    @classmethod
    def start(
        cls,
        role: str,
        arguments: Sequence[str],
        *,
        listen: Callable[[str], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> RoleProcess:
        """Starts `tsqp-shm ROLE ARGUMENTS` afresh; nothing is inherited but the lifeline.

        Args:
            listen: takes each line of the child's stderr; None leaves stderr the parent's own.
            environment: variables to add.
        """
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tsqp_shm", role, *arguments]
        with theirs:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                # The folder that a user happens to stand in is no place to import from.
                env={
                    **os.environ,
                    "PYTHONSAFEPATH": "1",
                    **(environment or {}),
                    LIFELINE_VARIABLE: str(theirs.fileno()),
                },
                stdin=None if listen is None else subprocess.DEVNULL,
                stderr=None if listen is None else subprocess.PIPE,
                # Ctrl-C goes to the whole foreground group; a role that is listened to is stopped by its parent.
                start_new_session=listen is not None,
            )
        child = cls(role, process, ours)
        if listen is not None and process.stderr is not None:
            child._listener = threading.Thread(target=child._listen, args=(process.stderr, listen), daemon=True)
            child._listener.start()
        return child

    def _listen(self, stderr: BinaryIO, listen: Callable[[str], None]) -> None:
        # This thread alone closes the pipe: a grandchild may hold the other end open for longer than `stop` waits.
        with stderr:
            # UNTRUSTED: what another role prints is shown, so a line has an end and must not steer a terminal.
            for line in iter(partial(stderr.readline, MAX_LINE_BYTES), b""):
                text = "".join(c if c.isprintable() else "?" for c in line.decode(errors="replace").rstrip("\r\n"))
                self._last_lines.append(text[:500])
                listen(text)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative is a signal's number."""
        return self._process.poll()

    def death(self) -> TsqpError | None:
        """Why it ended, or None while it lives.

        Returns:
            The error it said it would end with, if it is one that the caller can mend; else PeerDied with its last
            words.
        """
        code = self.exit_code
        if code is None:
            return None
        if self._listener is not None:
            self._listener.join(timeout=1.0)
        for kind in RELAYED_ERRORS:
            # UNTRUSTED: one of a few fixed lines, compared and not parsed.
            if self._hear().endswith(_failed_line(kind)) and self._last_lines:
                return kind.relayed(self._last_lines[-1].removeprefix(ERROR_PREFIX))
        if code < 0:
            with contextlib.suppress(ValueError):
                return PeerDied(self.role, f"signal {signal.Signals(-code).name}", self.last_words)
        return PeerDied(self.role, f"exit code {code}", self.last_words)

    def _hear(self) -> bytes:
        """What the child has said on the lifeline so far."""
        with contextlib.suppress(OSError):
            self._heard += self._lifeline.recv(256)
        return self._heard

    @property
    def is_ready(self) -> bool:
        """Whether the child has said so."""
        return READY_LINE in self._heard or READY_LINE in self._hear()

    @property
    def last_words(self) -> str:
        return "\n".join(self._last_lines)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit code, or None if it still runs after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def interrupt(self) -> None:
        """Passes Ctrl-C on."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def stop(self) -> int:
        """Ends the child: closes the lifeline, then terminates, then kills. Returns the exit code."""
        self._lifeline.close()
        code = self.wait(POLITE_STOP_S)
        if code is None:
            self._process.terminate()
            code = self.wait(FIRM_STOP_S)
        if code is None:
            self._process.kill()
            code = self._process.wait()
        if self._listener is not None:
            self._listener.join(timeout=1.0)
        return code


class Lifeline:
    """The child's end; `Lifeline.from_environment` also works where there is no parent."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    @classmethod
    def from_environment(cls) -> Lifeline:
        descriptor = os.environ.pop(LIFELINE_VARIABLE, None)
        if descriptor is None:
            return cls(None)
        os.set_inheritable(int(descriptor), False)
        return cls(socket.socket(fileno=int(descriptor)))

    @property
    def has_parent(self) -> bool:
        return self._connection is not None

    def ready(self) -> None:
        """Tells the parent."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sendall(READY_LINE)

    def failed(self, error: TsqpError) -> None:
        """Tells the parent which error this process ends with, if it is one that the parent's user can mend."""
        if self._connection is not None and isinstance(error, RELAYED_ERRORS):
            with contextlib.suppress(OSError):
                self._connection.sendall(_failed_line(type(error)))

    def on_parent_gone(self, act: Callable[[], None]) -> None:
        """Calls `act` in a thread once the parent has died or has asked this process to end."""
        connection = self._connection
        if connection is None:
            return

        def watch() -> None:
            with contextlib.suppress(OSError):
                while connection.recv(16):
                    pass
            act()

        threading.Thread(target=watch, daemon=True).start()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process, shared pages that it has mapped included."""
    # Not getrusage where it can be helped: its figure survives exec, so a role would report its parent's peak.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _failed_line(kind: type[TsqpError]) -> bytes:
    return f"failed {kind.__name__}\n".encode()
