"""The contenders, and this process's hold on one that runs.

Each is a process of its own that loads the model once and lives to the end of the run: they take turns, so that
whatever else the machine does meets all of them, and a turn costs nothing but its repetition.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tsqp_shm
from tsqp_shm.bench.asleep import put_to_sleep, wake
from tsqp_shm.bench.cases import MODE_OF, Job, Turn
from tsqp_shm.descriptors import socket_pair
from tsqp_shm.errors import ConfigError, ContenderFailed
from tsqp_shm.modes import MODES
from tsqp_shm.printable import quoted, shown
from tsqp_shm.roles.inheritance import kept_apart, kill_session
from tsqp_shm.roles.relay import Relay

SCRIPTS = Path(tsqp_shm.__file__).parent.parent / "scripts"
# An answer has some 20 numbers and a row for each operation.
MAX_ANSWER_BYTES = 1 << 20
MAX_FAILED_LENGTH = 4000
NO_ANSWER = "it answers with something else than it was asked"
POLITE_STOP_S = 10.0
FIRM_STOP_S = 2.0


@dataclass(frozen=True)
class ContenderKind:
    """How to start one.

    Attributes:
        command: what Python is started with.
        needs: the packages it imports, with what installs them.
        environment: variables to add.
    """

    command: tuple[str, ...]
    needs: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...] = ()
    prefill_only: bool = False


_TORCH = ("torch", "pip install torch")
_TRANSFORMERS = ContenderKind(
    ("-m", "tsqp_shm.bench.transformers_whole"),
    (_TORCH, ("transformers", "pip install transformers")),
    (("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_VERBOSITY", "error")),
)
KINDS = {
    **{
        name: ContenderKind(("-m", "tsqp_shm.bench.ours"), (_TORCH,) if MODES[mode].has_gpu_process else ())
        for name, mode in MODE_OF.items()
    },
    "transformers-sdpa": _TRANSFORMERS,
    "transformers-eager": _TRANSFORMERS,
    "serialized": ContenderKind(
        (str(SCRIPTS / "serialized_baseline.py"),),
        (_TORCH, ("msgpack", "pip install msgpack")),
        # Its two processes take turns; threads that spin after their own turn would slow the other's.
        (("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0")),
        prefill_only=True,
    ),
}


def parse_contenders(text: str, new_tokens: int) -> list[str]:
    """Reads the value of --vs: names with commas between, or "none".

    Raises:
        ConfigError: no such contender, or one that cannot decode.
    """
    if text == "none":
        return []
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in KINDS or name in MODE_OF:
            allowed = ", ".join(kind for kind in KINDS if kind not in MODE_OF)
            raise ConfigError("vs", name, f"{allowed}, with commas between, or none")
        if new_tokens and KINDS[name].prefill_only:
            raise ConfigError("vs", name, "a contender that decodes: this one has no KV cache, so prefill only")
    return names


def require_installed(name: str) -> None:
    """Raises:
    ContenderFailed: what the contender needs is not here; the message says how to get it.
    """
    kind = KINDS[name]
    for package, advice in kind.needs:
        if importlib.util.find_spec(package) is None:
            raise ContenderFailed(name, f"it needs {package}: {advice}")
    script = Path(kind.command[0])
    if script.suffix == ".py" and not script.is_file():
        raise ContenderFailed(name, f"{script} is not there: run from a checkout of the repository")


class RunningContender:
    """A contender's process; use `RunningContender.start`.

    Attributes:
        job: what it was started with.
        device: what it says that it computes on.
    """

    def __init__(self, job: Job, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.job = job
        self.name = job.name
        self.device = ""
        self._process = process
        self._connection = connection
        self._heard = bytearray()
        assert process.stdout is not None
        self._relay = Relay(job.name, process.stdout, lambda line: None)

    @classmethod
    def start(cls, job: Job) -> RunningContender:
        """Starts the process, which then loads the model; `wait_ready` comes next."""
        kind = KINDS[job.contender]
        ours, theirs = socket_pair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *kind.command, job.to_json(), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                **kept_apart(dict(kind.environment)),
            )
        return cls(job, process, ours)

    def wait_ready(self, timeout_s: float) -> None:
        """Raises:
        ContenderFailed: it cannot run the job, has died, or takes too long.
        """
        ready = self._receive(timeout_s, "to load the model").get("ready")
        if not isinstance(ready, dict) or "device" not in ready:
            raise ContenderFailed(self.name, NO_ANSWER)
        self.device = quoted(ready["device"])
        if self.job.sleeps:
            put_to_sleep(self._process.pid)

    def repeat(self, turn: Turn, timeout_s: float) -> dict[str, Any]:
        """Has one repetition run. Returns its numbers; see `child.serve`.

        Raises:
            ContenderFailed: it has died or takes too long.
        """
        if self.job.sleeps:
            wake(self._process.pid)
        # If it has died, the answer that does not come says so better.
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(asdict(turn)).encode() + b"\n")
        answer = self._receive(timeout_s, "a repetition")
        if self.job.sleeps:
            put_to_sleep(self._process.pid)
        return answer

    def _receive(self, timeout_s: float, what: str) -> dict[str, Any]:
        line = self._receive_line(timeout_s, what)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ContenderFailed(self.name, NO_ANSWER)
        if "failed" in answer:
            raise ContenderFailed(self.name, shown(str(answer["failed"])[:MAX_FAILED_LENGTH]))
        return answer

    def _receive_line(self, timeout_s: float, what: str) -> bytes:
        # UNTRUSTED: the whole line has this time and so many bytes, in whatever pieces it comes.
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            left_s = deadline - time.monotonic()
            try:
                if left_s <= 0:
                    raise TimeoutError
                self._connection.settimeout(left_s)
                data = self._connection.recv(1 << 16)
            except TimeoutError:
                raise ContenderFailed(self.name, f"no answer within {timeout_s:g} s, waiting for {what}") from None
            except OSError:
                data = b""
            if not data:
                raise ContenderFailed(self.name, self._death())
            self._heard += data
            if len(self._heard) > MAX_ANSWER_BYTES:
                raise ContenderFailed(self.name, f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
        line, _, rest = self._heard.partition(b"\n")
        self._heard = rest
        return bytes(line)

    def _death(self) -> str:
        try:
            code: int | None = self._process.wait(FIRM_STOP_S)
        except subprocess.TimeoutExpired:
            code = None
        self._relay.finish()
        last = self._relay.last_words
        ended = "it closed its socket" if code is None else f"it ended with exit code {code}"
        return f"{ended}; its last words:\n{last}" if last else ended

    def stop(self) -> None:
        """Ends the process: closes the socket, then terminates, then kills."""
        # The process that was forked last may hold a copy of the socket for a moment; this is heard at once.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        if self.job.sleeps and self._process.poll() is None:
            wake(self._process.pid, gently=False)
        deadline = time.monotonic() + POLITE_STOP_S
        for act in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(max(FIRM_STOP_S, deadline - time.monotonic()))
                break
            except subprocess.TimeoutExpired:
                act()
        self._process.wait()
        kill_session(self._process.pid)
        self._relay.finish()
