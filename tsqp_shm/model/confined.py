"""The owner's end of the process in which what a model's author wrote is run (`model/confined_program.py`).

It is started when a tokenizer is read and kept, so that a prompt costs two passages of a pipe, some 0.1 ms. What ends
it (a deadline, memory, a crash of a library) is one error; the next request starts another.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

from tsqp_shm.model import confined_program
from tsqp_shm.model.confined_program import HEADER, MAX_ANSWER_BYTES
from tsqp_shm.model.files import printable

# To encode some text, to compile a template or to render it: a hundred times what real ones take.
DEADLINE_S = 5.0
# What the interpreter and the libraries map, and what of it a template may take.
_MEMORY_BYTES = 1 << 30
# A tokenizer.json takes up to some thirty times its size while it is read.
_MEMORY_PER_BYTE = 64
# What an interpreter needs to find its libraries, and a template the date.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ")

_owners: weakref.WeakSet[ConfinedProcess] = weakref.WeakSet()


class ConfinedError(Exception):
    """What was asked of the confined process failed there; the caller says whose fault that is."""


class NoProcessError(Exception):
    """The system starts no process."""


class ConfinedProcess:
    """Any thread may ask, one after the other."""

    def __init__(self, content_bytes: int = 0) -> None:
        """Args:
        content_bytes: size of the largest file that it will read.
        """
        self._memory_bytes = _MEMORY_BYTES + _MEMORY_PER_BYTE * content_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., ConfinedProcess] | None = None
        self._prepared: dict[bytes, tuple[bytes, float]] = {}
        _owners.add(self)

    def prepare(self, request: bytes, content: bytes, deadline_s: float = DEADLINE_S) -> None:
        """Asks for what later requests build upon; a process that is started anew is asked for it first.

        Raises:
            ConfinedError: it failed; `NoProcessError` as `ask`.
        """
        self.ask(request, content, deadline_s)
        self._prepared[request] = content, deadline_s

    def ask(self, request: bytes, content: bytes, deadline_s: float = DEADLINE_S) -> bytes:
        """Returns the answer.

        Raises:
            ConfinedError: the request failed, took too long or too much memory.
            NoProcessError: the system starts no process.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                # Somebody has ended it since, the kernel for instance, where memory ran out.
                self._stop()
            if self._process is None:
                self._start()
                for prepared, (prepared_content, seconds) in self._prepared.items():
                    self._exchange(prepared, prepared_content, seconds)
            return self._exchange(request, content, deadline_s)

    @property
    def pid(self) -> int | None:
        """None where it does not run."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Ends the process; it is started again where it is needed again."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        program = Path(confined_program.__file__)
        # -I: neither the folder it is started in nor what its user has installed is looked at for modules. What this
        # process has found its own in is: the libraries are the same.
        start = f"import runpy, sys; sys.path[:] = {sys.path!r}; runpy.run_path({str(program)!r}, run_name='__main__')"
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", start, str(self._memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={
                    "TOKENIZERS_PARALLELISM": "false",
                    **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                },
                # Ctrl-C goes to the whole group of the terminal, and must not end it.
                start_new_session=True,
            )
        except OSError as error:
            raise NoProcessError(f"the system starts no process: {error.strerror or printable(error)}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._process = process
        self._end = weakref.finalize(self, _end, process, os.getpid())

    def _exchange(self, request: bytes, content: bytes, deadline_s: float) -> bytes:
        try:
            end = time.monotonic() + deadline_s
            # Somewhat later than here, where the reason is known.
            seconds = f"{deadline_s + 1:8.2f}".encode()
            self._write(HEADER.pack(request, len(content)) + seconds + content, end)
            verdict, size = HEADER.unpack(self._read(HEADER.size, end))
            # UNTRUSTED: whoever breaks out of the sandbox in there says what he likes.
            if verdict not in (b"+", b"-") or size > MAX_ANSWER_BYTES:
                raise ConfinedError("the confined process does not answer in form")
            answer = self._read(size, end)
        except BaseException:
            # Whatever it was, a signal handler's exception included, the next answer would be this request's.
            self._stop()
            raise
        if verdict == b"-":
            raise ConfinedError(printable(answer.decode(errors="replace")))
        return answer

    def _write(self, content: bytes, end: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        left = memoryview(content)
        while left:
            self._wait(self._process.stdin.fileno(), select.POLLOUT, end)
            try:
                left = left[os.write(self._process.stdin.fileno(), left[: 1 << 20]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise ConfinedError(self._how_it_ended()) from None

    def _read(self, size: int, end: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        found = bytearray()
        while len(found) < size:
            self._wait(self._process.stdout.fileno(), select.POLLIN, end)
            try:
                piece = os.read(self._process.stdout.fileno(), min(size - len(found), 1 << 20))
            except BlockingIOError:
                continue
            if not piece:
                raise ConfinedError(self._how_it_ended())
            found += piece
        return bytes(found)

    def _wait(self, descriptor: int, event: int, end: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        left_s = end - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise ConfinedError("it takes longer than it may")

    def _how_it_ended(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            if code < 0:
                return f"the process that runs it ended by {signal.Signals(-code).name}"
            return f"the process that runs it ended with exit code {code}"
        return "the process that runs it does not answer"

    def _stop(self) -> None:
        self._process = None
        if self._end is not None:
            self._end()
            self._end = None

    def forget(self) -> None:
        """In a forked child: the process is the parent's, and so is the lock, which a thread of its may hold."""
        self._lock = threading.Lock()
        if self._end is not None:
            self._end.detach()
            self._end = None
        process, self._process = self._process, None
        if process is not None:
            # Only the descriptors: the parent's end must be the last for the process to end with the parent.
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            # Its Popen would wait for a child that this process has not.
            process.returncode = 0


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


def _forget_all() -> None:
    for owner in list(_owners):
        owner.forget()


os.register_at_fork(after_in_child=_forget_all)
