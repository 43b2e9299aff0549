"""A server that runs, asleep but in its own turn."""

from __future__ import annotations

import http.client
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from tsqp_shm.bench.asleep import descendants, put_to_sleep, wake
from tsqp_shm.bench.child import peak_resident_bytes, processor_seconds
from tsqp_shm.bench.contenders import FIRM_STOP_S
from tsqp_shm.bench.serve.asked import Request
from tsqp_shm.bench.serve.keeper import POLITE_STOP_S
from tsqp_shm.bench.serve.load import HOST, Loaded, ask
from tsqp_shm.bench.serve.peers import Server, Setup
from tsqp_shm.descriptors import socket_pair
from tsqp_shm.errors import ContenderFailed
from tsqp_shm.roles.inheritance import kept_apart, kill_session
from tsqp_shm.roles.relay import Relay

_LOOK_S = 0.1
_PROBE_S = 5.0


class RunningServer:
    """Use `RunningServer.start`, then `wait_ready`; `stop` in the end.

    Attributes:
        peak_bytes: of all its processes together, shared pages counted in each; after a turn.
    """

    def __init__(
        self, server: Server, setup: Setup, port: int, keeper: subprocess.Popen[bytes], connection: socket.socket
    ) -> None:
        self.name, self.peak_bytes = server.name, 0
        self._server, self._setup, self._port = server, setup, port
        self._keeper, self._connection = keeper, connection
        assert keeper.stdout is not None
        self._relay = Relay(server.name, keeper.stdout, lambda line: None)
        self._pid = 0

    @classmethod
    def start(cls, server: Server, setup: Setup) -> RunningServer:
        """Starts it on a port that is free at this moment."""
        with socket.create_server((HOST, 0)) as probe:
            port = int(probe.getsockname()[1])
        ours, theirs = socket_pair()
        command = [sys.executable, "-m", "tsqp_shm.bench.serve.keeper", str(theirs.fileno())]
        with theirs:
            keeper = subprocess.Popen(
                [*command, *server.command(setup, port)],
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                **kept_apart(server.variables(setup)),
            )
        return cls(server, setup, port, keeper, ours)

    def wait_ready(self, timeout_s: float) -> None:
        """Until it says that it is healthy; then it is put to sleep.

        Raises:
            ContenderFailed: it has ended, or takes too long; with its log's last lines.
        """
        end_s = time.monotonic() + timeout_s
        while self._status() != 200:
            if self._keeper.poll() is not None:
                raise ContenderFailed(self.name, self._with_log("it has ended"))
            if time.monotonic() > end_s:
                raise ContenderFailed(self.name, self._with_log(f"it is not ready within {timeout_s:g} s"))
            time.sleep(_LOOK_S)
        self._connection.settimeout(_PROBE_S)
        with suppress(OSError, ValueError):
            self._pid = int(self._connection.recv(64))
        if not self._pid:
            raise ContenderFailed(self.name, self._with_log("it has ended"))
        put_to_sleep(self._pid)

    def turn(self, requests: Sequence[Request], clients: int, timeout_s: float) -> tuple[Loaded, float]:
        """Its answers, and the processor time of all its processes meanwhile.

        Raises:
            ContenderFailed: it has ended, or answers nothing.
        """
        wake(self._pid)
        pids = [self._pid, *descendants(self._pid)]
        before_s = _spent(pids)
        loaded = ask(self._port, requests, clients, lambda request: self._server.body(self._setup, request), timeout_s)
        pids = [self._pid, *descendants(self._pid)]
        cpu_s = _spent(pids) - before_s
        self.peak_bytes = sum(_peak(pid) for pid in pids)
        if self._keeper.poll() is not None or select.select([self._connection], [], [], 0)[0]:
            raise ContenderFailed(self.name, self._with_log("it has ended in its turn"))
        if all(answer.failure for answer in loaded.answers):
            raise ContenderFailed(self.name, self._with_log(f"no request was answered: {loaded.answers[0].failure}"))
        put_to_sleep(self._pid)
        return loaded, cpu_s

    def log(self) -> str:
        """The last lines that it printed."""
        return self._relay.last_words

    def stop(self) -> None:
        """Ends it and all that it has started."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(POLITE_STOP_S + FIRM_STOP_S)
        kill_session(self._keeper.pid)
        self._keeper.wait()
        self._relay.finish()

    def _status(self) -> int:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=_PROBE_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def _with_log(self, reason: str) -> str:
        if self._keeper.poll() is not None:
            self._relay.finish()
        log = self.log()
        return f"{reason}; its last words:\n{log}" if log else reason


def _spent(pids: Sequence[int]) -> float:
    total_s = 0.0
    for pid in pids:
        with suppress(OSError):
            total_s += processor_seconds(pid)
    return total_s


def _peak(pid: int) -> int:
    with suppress(OSError):
        return peak_resident_bytes(pid)
    return 0
