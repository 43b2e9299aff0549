"""`python -m tsqp_shm.bench.serve.keeper DESCRIPTOR COMMAND...`: the parent of a server that may be asleep.

Who is stopped does not see its parent die. This process, which never sleeps, says the server's pid on the descriptor, a
socket, and ends the server and all that it has started when the other end closes, however it closes.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from contextlib import suppress

from tsqp_shm.bench.asleep import wake
from tsqp_shm.roles.inheritance import kill_session

POLITE_STOP_S = 10.0


def keep(connection: socket.socket, command: list[str]) -> int:
    """Returns the server's exit code."""
    connection.set_inheritable(False)
    process = subprocess.Popen(command)
    ended = os.pidfd_open(process.pid)
    connection.sendall(b"%d\n" % process.pid)
    ready, _, _ = select.select([connection.fileno(), ended], [], [])
    if ended not in ready:
        wake(process.pid, gently=False)
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(POLITE_STOP_S)
    return process.returncode if process.returncode is not None else 1


if __name__ == "__main__":
    try:
        code = keep(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
        # Nobody may be there to read it.
        with suppress(OSError):
            if code:
                print(f"exit code {code}", file=sys.stderr, flush=True)
    finally:
        # It leads the session, so this ends it as well.
        kill_session(os.getpid())
