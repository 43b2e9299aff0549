"""A parent's hold on a role that it started; see `lifeline` for the child's hold on its parent."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.roles.lifeline import (
    LIFELINE_VARIABLE,
    READY_LINE,
    RELAYED_ERRORS,
    WANTED_LINE,
    Lines,
    dead_gpu_line,
    failed_line,
)

# What every error line of the command begins with.
ERROR_PREFIX = "tsqp-shm: "
LAST_WORDS_LINES = 12
# A child that never stops talking is heard so far at a time.
MAX_HEARD_BYTES = 1 << 16
MAX_LINE_BYTES = 4096
# A role that was told to stop needs this long at most to let go of a device.
POLITE_STOP_S = 5.0
FIRM_STOP_S = 2.0
# What a dead child printed last is in the pipe already; only a grandchild can keep the pipe open.
LAST_WORDS_S = 0.3


class RoleProcess:
    """A child process that plays one role; use `RoleProcess.start`."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], lifeline: socket.socket) -> None:
        self.role = role
        self._process = process
        self._lifeline = lifeline
        self._lifeline.setblocking(False)
        self._said = Lines()
        self._is_ready = False
        self._gpus_wanted = 0
        self._failure: type[TsqpError] | None = None
        self._last_lines: deque[str] = deque(maxlen=LAST_WORDS_LINES)
        self._listener: threading.Thread | None = None
        self._listened = False
        _started.add(self)

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
        self._finish_listening()
        self._hear()
        # A library may have the last word at exit: the error is the last line that says it is one.
        said = [line.removeprefix(ERROR_PREFIX) for line in list(self._last_lines) if line.startswith(ERROR_PREFIX)]
        if self._failure is not None and said:
            return self._failure.relayed(said[-1])
        if code < 0:
            with contextlib.suppress(ValueError):
                return PeerDied(self.role, f"signal {signal.Signals(-code).name}", self.last_words)
        return PeerDied(self.role, f"exit code {code}", self.last_words)

    def _finish_listening(self) -> None:
        """Waits for the last lines of a child that has ended; once, however often it is asked."""
        if self._listener is not None and not self._listened:
            self._listener.join(timeout=LAST_WORDS_S)
            self._listened = True

    def _hear(self) -> None:
        """Takes in what the child has said on the lifeline meanwhile."""
        heard_bytes = 0
        with contextlib.suppress(OSError):
            while heard_bytes < MAX_HEARD_BYTES and (data := self._lifeline.recv(4096)):
                heard_bytes += len(data)
                # UNTRUSTED: a few fixed lines, compared and not parsed; any other is forgotten.
                for line in self._said.push(data):
                    self._is_ready |= line == READY_LINE
                    self._gpus_wanted += line == WANTED_LINE
                    # The last word counts: whoever says something else after it has not ended by it.
                    self._failure = next((kind for kind in RELAYED_ERRORS if line == failed_line(kind)), None)

    @property
    def is_ready(self) -> bool:
        """Whether the child has said so."""
        self._hear()
        return self._is_ready

    @property
    def gpus_wanted(self) -> int:
        """How often the child has asked for another GPU process."""
        self._hear()
        return self._gpus_wanted

    def tell_of_dead_gpu(self, number: int) -> None:
        """Tells a TEE process that the GPU process of that number, counted from 0, has died."""
        with contextlib.suppress(OSError):
            self._lifeline.sendall(dead_gpu_line(number))

    @property
    def last_words(self) -> str:
        return "\n".join(list(self._last_lines))

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
            return self.kill()
        self._finish_listening()
        return code

    def leave_to_parent(self) -> None:
        """In a forked child, whose role it is not."""
        self._lifeline.close()

    def kill(self) -> int:
        """Ends a child that has nothing to put in order any more, one that is stopped by a signal too."""
        self._lifeline.close()
        self._process.kill()
        code = self._process.wait()
        self._finish_listening()
        return code


# A forked child lets go of its copies of the lifelines: with one the role would outlive the parent that it is tied to.
_started: weakref.WeakSet[RoleProcess] = weakref.WeakSet()


def _after_fork() -> None:
    for role in list(_started):
        role.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process, shared pages that it has mapped included."""
    # Not getrusage where it can be helped: its figure survives exec, so a role would report its parent's peak.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
