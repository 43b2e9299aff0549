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
from collections.abc import Callable, Sequence
from pathlib import Path

from tsqp_shm.descriptors import socket_pair
from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.forks import leave_in_children
from tsqp_shm.roles.inheritance import SAFE_PATH, forbid_core_dump, kept_apart, kill_session
from tsqp_shm.roles.lifeline import (
    LIFELINE_VARIABLE,
    READY_LINE,
    WANTED_LINE,
    Lines,
    dead_gpu_line,
    relayed_error,
    said_line,
)
from tsqp_shm.roles.private_arguments import ARGUMENTS_VARIABLE, hand_over
from tsqp_shm.roles.relay import Relay

# What every error line of the command begins with.
ERROR_PREFIX = "tsqp-shm: "
# A child that never stops talking is heard so far at a time.
MAX_HEARD_BYTES = 1 << 14
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
        self._hearing, self._sending = threading.Lock(), threading.Lock()
        self._unsent = b""
        self._said = Lines()
        self._is_ready = False
        self._has_come_up = False
        self._gpus_wanted = 0
        self._failure: TsqpError | None = None
        self._relay: Relay | None = None
        self._is_session_over = False
        leave_in_children(self)

    @classmethod
    def start(
        cls,
        role: str,
        arguments: Sequence[str],
        *,
        private_arguments: Sequence[str] = (),
        descriptors: Sequence[int] = (),
        takes_input: bool = False,
        listen: Callable[[str], None] | None = None,
    ) -> RoleProcess:
        """Starts `tsqp-shm ROLE ARGUMENTS` afresh.

        Args:
            private_arguments: more of them, which do not stand on its command line.
            descriptors: of this process, which the child has too, by the same numbers.
            takes_input: it has this process's standard input.
            listen: takes each line that the child prints, and keeps the child apart: it has nothing of this process's
                (`inheritance`), and what it has started ends with it. None for one that is trusted: it has this
                process's terminal and environment.
        """
        is_apart = listen is not None
        ours, theirs = socket_pair()
        handed_over = {ARGUMENTS_VARIABLE: hand_over(private_arguments)} if private_arguments else {}
        variables = {
            LIFELINE_VARIABLE: str(theirs.fileno()),
            **{name: str(descriptor) for name, descriptor in handed_over.items()},
        }
        command = [sys.executable, "-m", "tsqp_shm", role, *arguments]
        pass_fds = [theirs.fileno(), *handed_over.values(), *descriptors]
        try:
            if is_apart:
                process = subprocess.Popen(
                    command,
                    pass_fds=pass_fds,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    **kept_apart(variables),
                )
            else:
                process = subprocess.Popen(
                    command,
                    pass_fds=pass_fds,
                    stdin=None if takes_input else subprocess.DEVNULL,
                    env={**os.environ, **SAFE_PATH, **variables},
                )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for descriptor in handed_over.values():
                os.close(descriptor)
        child = cls(role, process, ours)
        if listen is not None and process.stdout is not None:
            forbid_core_dump(process.pid)
            child._relay = Relay(role, process.stdout, listen)
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative is a signal's number."""
        return self._ended(self._process.poll())

    def _ended(self, code: int | None) -> int | None:
        if code is not None and self._relay is not None and not self._is_session_over:
            self._is_session_over = True
            # What it has started and left behind would go on talking in its name.
            kill_session(self._process.pid)
        return code

    def death(self) -> TsqpError | None:
        """Why it ended, or None while it lives.

        Returns:
            The error that it said it would end with, in its name, if it has not come up yet and it is one that the
            caller can mend: as soon as it has said so, since its heartbeat stops before it is gone. Else PeerDied with
            its last words.
        """
        code = self.exit_code
        if not self._has_come_up:
            self._hear()
            if self._failure is not None:
                return self._failure.again()
        if code is None:
            return None
        self._finish_listening()
        if code < 0:
            with contextlib.suppress(ValueError):
                return PeerDied(self.role, f"signal {signal.Signals(-code).name}", self.last_words)
        return PeerDied(self.role, f"exit code {code}", self.last_words)

    def came_up(self) -> None:
        """The session has begun: from here on the child may not say what its end is to be called."""
        self._has_come_up = True

    def _finish_listening(self) -> None:
        if self._relay is not None:
            self._relay.finish()

    def _hear(self) -> None:
        """Takes in what the child has said on the lifeline meanwhile."""
        heard_bytes = 0
        with self._hearing, contextlib.suppress(OSError):
            while heard_bytes < MAX_HEARD_BYTES and (data := self._lifeline.recv(4096)):
                heard_bytes += len(data)
                for line in self._said.push(data):
                    self._heed(line)

    def _heed(self, line: bytes) -> None:
        # UNTRUSTED: a few fixed lines, of which a role has those that are its own; any other is forgotten.
        self._is_ready |= line == READY_LINE
        self._gpus_wanted += line == WANTED_LINE and self.role == "tee"
        # The last word counts: whoever says something else after it has not ended by it.
        self._failure = relayed_error(self.role, line)

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
        self._send(dead_gpu_line(number))

    def say(self, text: str) -> bool:
        """Has a child that has said that it is ready print a line, between lines of its own. Any thread may ask.

        Returns:
            Whether it does; False: it is not ready, or still has an earlier one to take.
        """
        return self.is_ready and self._send(b"") and (self._send(said_line(text)) or bool(self._unsent))

    def _send(self, line: bytes) -> bool:
        """Says a line without waiting; the rest of one that was not taken whole goes before the next.

        Returns:
            Whether all has been taken.
        """
        with self._sending:
            self._unsent += line
            try:
                self._unsent = self._unsent[self._lifeline.send(self._unsent) :]
            except BlockingIOError:
                pass
            except OSError:
                # It is gone.
                self._unsent = b""
                return False
            return not self._unsent

    @property
    def last_words(self) -> str:
        return "" if self._relay is None else self._relay.last_words

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit code, or None if it still runs after `timeout_s`."""
        try:
            return self._ended(self._process.wait(timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: signal.Signals) -> None:
        """Passes a signal on."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

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
        """In a forked child, whose role it is not: with a copy of the lifeline the role would outlive the parent that
        it is tied to."""
        self._lifeline.close()

    def kill(self) -> int:
        """Ends a child that has nothing to put in order any more, one that is stopped by a signal too."""
        self._lifeline.close()
        self._process.kill()
        code = self._process.wait()
        self._ended(code)
        self._finish_listening()
        return code


def peak_resident_bytes() -> int:
    """Peak resident memory of this process, shared pages that it has mapped included."""
    # Not getrusage where it can be helped: its figure survives exec, so a role would report its parent's peak.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
