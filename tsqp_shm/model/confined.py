"""The owner's end of the process in which what a model's author wrote is run (`model/confined_program.py`).

It is started when a tokenizer is read and kept, so that a prompt costs two passages of a socket, some 0.1 ms. What ends
it (a deadline, memory, a crash of a library) is one error; the next request starts another.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from tsqp_shm.descriptors import socket_pair
from tsqp_shm.forks import leave_in_children
from tsqp_shm.model import confined_program
from tsqp_shm.model.confined_program import HEADER, MAX_ANSWER_BYTES
from tsqp_shm.printable import quoted

# To encode some text, to compile a template or to render it: a hundred times what real ones take.
DEADLINE_S = 4.0
# How long a request waits for those of other threads: far longer than texts take that are no attack.
_TURN_S = 10.0
# A process that is started anew may take so much longer to prepare than the first one has.
_SLOWER = 3
# What the interpreter and the libraries map, and what of it a template may take.
_MEMORY_BYTES = 1 << 30
# A tokenizer.json takes some twelve times its size while it is read. The largest that is read may take 2 GiB.
_MEMORY_PER_BYTE = 32
# What an interpreter needs to find its libraries, and a template the date.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ")


class ConfinedError(Exception):
    """What was asked of the confined process failed there; the caller says whose fault that is."""


class NoProcessError(Exception):
    """The system starts no process."""


class ConfinedProcess:
    """Any thread may ask, one after the other. Who waits too long for its turn gets an error, and disturbs nobody."""

    def __init__(self, content_bytes: int = 0) -> None:
        """Args:
        content_bytes: size of the largest file that it will read.
        """
        self._memory_bytes = _MEMORY_BYTES + _MEMORY_PER_BYTE * content_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        # Over which nothing is said: the process ends when this end of it closes.
        self._life: socket.socket | None = None
        self._end: weakref.finalize[..., ConfinedProcess] | None = None
        self._prepared: dict[bytes, tuple[bytes, float]] = {}
        leave_in_children(self)

    def prepare(self, request: bytes, content: bytes, deadline_s: float = DEADLINE_S) -> None:
        """Asks for what later requests build upon; a process that is started anew is asked for it first.

        Raises:
            ConfinedError: it failed; `NoProcessError` as `ask`.
        """
        with self._turn():
            began = time.monotonic()
            self._ask(request, content, deadline_s)
            self._prepared[request] = content, time.monotonic() - began

    def ask(self, request: bytes, content: bytes, deadline_s: float = DEADLINE_S) -> bytes:
        """Returns the answer.

        Args:
            deadline_s: for the request, from its turn on. Where the process has to be started anew, what is prepared in
                it shares the deadline, which is longer by a multiple of what that took before.

        Raises:
            ConfinedError: the request failed, took too long or too much memory, or waited too long for its turn.
            NoProcessError: the system starts no process.
        """
        with self._turn():
            return self._ask(request, content, deadline_s)

    @property
    def pid(self) -> int | None:
        """None where it does not run."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Ends the process, whatever another thread waits for there; it is started again where it is needed again."""
        is_held = False
        while not is_held:
            process = self._process
            if process is not None:
                process.kill()
            # Not once and for all: who waits for a turn has another process started.
            is_held = self._lock.acquire(timeout=0.05)
        try:
            self._stop()
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_TURN_S):
            raise ConfinedError(f"requests before it have kept the process that runs it for more than {_TURN_S:g} s")
        try:
            yield
        finally:
            self._lock.release()

    def _ask(self, request: bytes, content: bytes, deadline_s: float) -> bytes:
        if self._process is not None and self._process.poll() is not None:
            # Somebody has ended it since, the kernel for instance, where memory ran out.
            self._stop()
        end = time.monotonic() + deadline_s
        if self._process is None:
            self._start()
            end += _SLOWER * sum(took_s for _, took_s in self._prepared.values())
            for prepared, (prepared_content, _) in self._prepared.items():
                self._exchange(prepared, prepared_content, end)
        return self._exchange(request, content, end)

    def _start(self) -> None:
        program = Path(confined_program.__file__)
        # -I, -S: modules are looked for where this process has found its own, so that the libraries are the same, and
        # neither in the folder it is started in nor by what its user has installed. -B: it writes no file.
        path = [folder for folder in sys.path if folder]
        start = f"import runpy, sys; sys.path[:] = {path!r}; runpy.run_path({str(program)!r}, run_name='__main__')"
        # No pipe: writing to one whose reader has gone is a signal, which an embedding program may have made deadly.
        ours, theirs = socket_pair()
        life, their_life = socket_pair()
        with theirs, their_life:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-ISB", "-c", start, str(self._memory_bytes)],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=their_life.fileno(),
                    env={
                        "TOKENIZERS_PARALLELISM": "false",
                        **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                    },
                    # Ctrl-C goes to the whole group of the terminal, and must not end it.
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                life.close()
                reason = error.strerror or quoted(error)
                raise NoProcessError(f"the system starts no process: {reason}") from error
        self._process, self._channel, self._life = process, ours, life
        self._end = weakref.finalize(self, _end, process, (ours, life), os.getpid())

    def _exchange(self, request: bytes, content: bytes, end: float) -> bytes:
        try:
            # Somewhat later than here, where the reason is known.
            seconds = f"{max(end - time.monotonic(), 0) + 1:8.2f}".encode()
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
            raise ConfinedError(quoted(answer.decode(errors="replace")))
        return answer

    def _write(self, content: bytes, end: float) -> None:
        left = memoryview(content)
        while left:
            with self._within(end) as channel:
                left = left[channel.send(left, socket.MSG_NOSIGNAL) :]

    def _read(self, size: int, end: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            with self._within(end) as channel:
                piece = channel.recv(min(size - len(found), 1 << 20))
            if not piece:
                raise ConfinedError(self._how_it_ended())
            found += piece
        return bytes(found)

    @contextlib.contextmanager
    def _within(self, end: float) -> Iterator[socket.socket]:
        """The channel, to be used once until then."""
        assert self._channel is not None
        try:
            self._channel.settimeout(max(end - time.monotonic(), 0.001))
            yield self._channel
        except TimeoutError:
            # A signal handler may raise one as well.
            if time.monotonic() < end:
                raise
            raise ConfinedError("it takes longer than it may") from None
        except (BrokenPipeError, ConnectionResetError):
            raise ConfinedError(self._how_it_ended()) from None

    def _how_it_ended(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            if code >= 0:
                return f"the process that runs it ended with exit code {code}"
            with contextlib.suppress(ValueError):
                return f"the process that runs it ended by {signal.Signals(-code).name}"
            # Of the real-time signals only two have a name.
            return f"the process that runs it ended by signal {-code}"
        return "the process that runs it does not answer"

    def _stop(self) -> None:
        self._process = self._channel = self._life = None
        if self._end is not None:
            self._end()
            self._end = None

    def leave_to_parent(self) -> None:
        """In a forked child: the process is the parent's, and so is the lock, which a thread of its may hold."""
        self._lock = threading.Lock()
        if self._end is not None:
            self._end.detach()
            self._end = None
        for ours in (self._channel, self._life):
            if ours is not None:
                # The parent's end must be the last for the process to end with the parent.
                ours.close()
        if self._process is not None:
            # Its Popen would wait for a child that this process has not.
            self._process.returncode = 0
        self._process = self._channel = self._life = None


def _end(process: subprocess.Popen[bytes], ours: tuple[socket.socket, ...], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        for end in ours:
            end.close()
        process.wait()
