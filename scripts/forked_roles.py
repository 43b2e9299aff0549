"""Sessions whose processes are forked from this one instead of executed, and one of which may be doomed.

Everything else is the real thing: the commands, their signals, lifelines, arena, sockets and model.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import tsqp_shm.console.run
import tsqp_shm.gpu.plain
import tsqp_shm.roles.launch
import tsqp_shm.roles.process
from tsqp_shm import cli
from tsqp_shm.roles.lifeline import Lifeline
from tsqp_shm.roles.private_arguments import handed_over
from tsqp_shm.shm import doorbell
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.protocol import Opcode, Record
from tsqp_shm.tee.submission import SubmissionQueue

OWNERS = {"Session": Session, "PosixTransport": PosixTransport, "Arena": Arena, "Lifeline": Lifeline}
# However it goes, it has ended by then.
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Attributes:
        victim: "tee", "gpu" or "launch"; "": nobody is killed.
        step: an opcode, whose record it sends, or a function, which it calls.
        target: of the opcode's record; None: any.
        count: the how-manyth time.
        after: after it, and not before.
        after_s: no step, but so long after the process has begun.
    """

    victim: str
    step: str = ""
    target: int | None = None
    count: int = 1
    after: bool = False
    after_s: float | None = None

    def __str__(self) -> str:
        if not self.victim:
            return "nobody"
        if self.after_s is not None:
            return f"{self.victim} after {self.after_s:.3f} s"
        step = self.step if self.target is None else f"{self.step} of {self.target}"
        return f"{self.victim} {'after' if self.after else 'before'} {step}" + f" {self.count}" * (self.count > 1)


@dataclass
class Ending:
    """How a session went. Times on the monotonic clock.

    Attributes:
        codes: exit codes of the processes that were started from here.
        told_s: when somebody said that a process had died.
        ended_s: when the last process had ended.
        alive: roles that had not ended at the deadline, and were killed then.
        left: what was found in /dev/shm and in the folder of sessions.
    """

    began_s: float
    codes: dict[str, int] = field(default_factory=dict)
    stdout: str = ""
    stderr: str = ""
    killed_s: float | None = None
    told_s: float | None = None
    ended_s: float = 0.0
    alive: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class ForkedPopen(subprocess.Popen[bytes]):
    """A Popen whose child does not execute its command, but is it."""

    marks = -1
    moment = Moment("")

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> None:
        if [*command[1:3]] != ["-m", "tsqp_shm"]:
            # Of the processes that a role starts, one is no role: that in which it encodes texts.
            super().__init__(command, env=env, **options)
            return
        keep = {0, 1, 2, self.marks, *options.get("pass_fds", ())}
        # A function that runs in the child before it would execute, and from which it does not come back.
        super().__init__(command, env=env, preexec_fn=lambda: self._become(command[3:], env, keep), **options)

    def _become(self, arguments: Sequence[str], environment: Mapping[str, str] | None, keep: set[int]) -> NoReturn:
        code: object = 1
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # As every Python does when it starts.
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:  # noqa: PTH208
                # One of them was the folder's own, by which they were listed.
                with contextlib.suppress(OSError):
                    if descriptor not in keep:
                        os.close(descriptor)
            gc.enable()
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            role = arguments[0]
            os.write(self.marks, f"began {role} {os.getpid()} {time.monotonic()}\n".encode())
            if role == self.moment.victim and self.moment.step:
                _doom(self.moment, self.marks)
            code = cli.main([*arguments, *handed_over()])
        except SystemExit as exit_:
            code = exit_.code
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code if isinstance(code, int) else 1)


def run_session(model: Path, session: str, flags: Iterable[str], moment: Moment, *, apart: bool = False) -> Ending:
    """Runs one session to its end, whatever happens in it.

    Args:
        apart: the two roles alone, as in two terminals, and no launch.
    """
    common = [str(model), "--session", session, "--timeout", "3" if apart else "10"]
    commands = {"launch": [*common, *flags]}
    if apart:
        commands = {"gpu": [*common, "-q"], "tee": [*common, *flags]}
    return _Watched(moment, session).run(commands)


class _Watched:
    """The processes of one session, and what is seen of them."""

    def __init__(self, moment: Moment, session: str) -> None:
        self._moment = moment
        self._session = session
        self._ending = Ending(time.monotonic())
        self._selector = selectors.DefaultSelector()
        self._alive: dict[str, int] = {}
        self._kill_at: float | None = None
        self._said = {"stdout": b"", "stderr": b"", "marks": b""}

    def run(self, commands: Mapping[str, Sequence[str]]) -> Ending:
        deadline = time.monotonic() + DEADLINE_S
        pipes = {name: os.pipe() for name in self._said}
        for name, (reading, _) in pipes.items():
            self._selector.register(reading, selectors.EVENT_READ, name)
        ForkedPopen.marks, ForkedPopen.moment = pipes["marks"][1], self._moment
        tsqp_shm.roles.process.subprocess.Popen = ForkedPopen  # type: ignore[misc]
        try:
            started = {
                role: ForkedPopen(
                    [sys.executable, "-m", "tsqp_shm", role, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=pipes["stdout"][1],
                    stderr=pipes["stderr"][1],
                    start_new_session=True,
                )
                for role, arguments in commands.items()
            }
        finally:
            tsqp_shm.roles.process.subprocess.Popen = ForkedPopen.__mro__[1]  # type: ignore[misc]
        for _, writing in pipes.values():
            os.close(writing)
        # The pipes of marks end with the last process that has one.
        while self._selector.get_map() and time.monotonic() < deadline:
            self._look(deadline)
        self._ending.ended_s = time.monotonic()
        for role, pidfd in self._alive.items():
            self._ending.alive.append(role)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self._ending.codes = {role: process.wait() for role, process in started.items()}
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()
        self._ending.stdout, self._ending.stderr = (self._said[name].decode() for name in ("stdout", "stderr"))
        folder = sessions_folder() / self._session
        places = [Path("/dev/shm" + arena_name(self._session)), folder, *folder.glob("*")]
        self._ending.left = [str(path) for path in places if path.exists()]
        return self._ending

    def _look(self, deadline: float) -> None:
        until = deadline if self._kill_at is None else self._kill_at
        for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
            self._see(key.fd, key.data)
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_at = None
            pidfd = self._alive.get(self._moment.victim)
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                self._ending.killed_s = time.monotonic()

    def _see(self, descriptor: int, name: str) -> None:
        if name in self._said:
            data = os.read(descriptor, 65536)
            if not data:
                self._forget(descriptor)
            self._said[name] += data
            if name == "marks":
                *lines, self._said[name] = self._said[name].split(b"\n")
                for line in lines:
                    self._mark(*line.decode().split())
            elif name == "stderr" and self._ending.told_s is None and b"process died (" in self._said[name]:
                self._ending.told_s = time.monotonic()
        else:
            self._forget(descriptor)
            self._alive.pop(name)

    def _mark(self, what: str, role: str, pid: str, at_s: str) -> None:
        if what == "dies":
            self._ending.killed_s = float(at_s)
            return
        try:
            pidfd = os.pidfd_open(int(pid))
        except ProcessLookupError:
            return
        self._alive[role] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, role)
        if role == self._moment.victim and self._moment.after_s is not None:
            self._kill_at = float(at_s) + self._moment.after_s

    def _forget(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)


def _doom(moment: Moment, marks: int) -> None:
    """Has this process kill itself at a step."""
    calls = 0

    def pass_by() -> None:
        nonlocal calls
        calls += 1
        if calls == moment.count:
            os.write(marks, f"dies {moment.victim} {os.getpid()} {time.monotonic()}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def around(original: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if counts(*arguments, **keywords) and not moment.after:
                pass_by()
            result = original(*arguments, **keywords)
            if counts(*arguments, **keywords) and moment.after:
                pass_by()
            return result

        return call

    if moment.step in Opcode.__members__:
        opcode = Opcode[moment.step]

        def submits(queue: SubmissionQueue, submitted: Opcode, *_: object, **request: Any) -> bool:
            return submitted == opcode and moment.target in (None, request.get("target", 0))

        def completes(bell: doorbell.Doorbell, submission: bytes, *_: object) -> bool:
            record = Record.unpack(submission)
            return record.opcode == opcode and moment.target in (None, record.target)

        # Each side's last call in Python before its record is handed over.
        if moment.victim == "tee":
            SubmissionQueue.submit = around(SubmissionQueue.submit, submits)  # type: ignore[method-assign]
        for kind in (doorbell.AdaptiveDoorbell, doorbell.ZmqDoorbell, doorbell.SpinDoorbell):
            kind.complete = around(kind.complete, completes)  # type: ignore[method-assign]
        return
    owner_name, _, name = moment.step.rpartition(".")
    owner: Any = OWNERS.get(owner_name, tsqp_shm.gpu.plain)
    wrapped = around(getattr(owner, name), lambda *arguments, **keywords: True)
    is_bound = isinstance(inspect.getattr_static(owner, name), (classmethod, staticmethod))
    setattr(owner, name, staticmethod(wrapped) if is_bound else wrapped)
