"""What a session tells `tsqp-shm top` where its arena may not: stock and rate of pads, and times.

    FOLDER/NAME/stats    a Unix socket of mode 0600; who connects gets one line of JSON, and the end

Nothing is read from whoever connects, and nobody is waited for: a line fits into what the kernel keeps of a connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsqp_shm.forks import leave_in_children
from tsqp_shm.shm.progress import MAX_STATS_BYTES, STATS_SOCKET

# As many may have connected and not been answered; a further one is refused by the kernel.
_BACKLOG = 64
_RETRY_S = 0.1
_CLOSE_S = 5.0
# Of SO_PEERCRED: pid, uid, gid.
_CREDENTIALS = struct.Struct("3i")


class Telling:
    """Tells until `close`, on a thread of its own.

    Args:
        folder: the session's.
        facts: what there is to be told, as plain values; asked on that thread, once for each who connects.

    Attributes:
        refusal: why nobody can ask, or "". A session does not fail because it cannot be watched.
    """

    def __init__(self, folder: Path, facts: Callable[[], dict[str, Any]]) -> None:
        self.path = folder / STATS_SOCKET
        self.refusal = ""
        self._facts = facts
        self._is_over = threading.Event()
        self._made: os.stat_result | None = None
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        leave_in_children(self)
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # Before it has a name: no moment passes in which others may connect, whatever the mask.
            os.fchmod(self._listener.fileno(), 0o600)
            self._listener.bind(str(self.path))
            self._made = self.path.lstat()
            self._listener.listen(_BACKLOG)
            self._thread = threading.Thread(target=self._tell, args=[self._listener], name="stats", daemon=True)
            self._thread.start()
        except (OSError, RuntimeError) as error:
            self._thread = None
            self.close()
            self.refusal = f"{self.path}: {error}"

    def close(self) -> None:
        """Ends the thread and removes the socket. Closing twice does nothing."""
        if self._listener is not None:
            self._is_over.set()
            # Wakes the thread that waits for a connection; closing alone would leave it there.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            if self._thread is not None:
                self._thread.join(_CLOSE_S)
            self._listener.close()
        if self._made is not None:
            # Somebody may have removed the folder, and another session begun in its place.
            with contextlib.suppress(OSError):
                if os.path.samestat(self._made, self.path.lstat()):
                    self.path.unlink()
        self._listener = self._thread = self._made = None

    def leave_to_parent(self) -> None:
        """In a forked child, which has no such thread: whoever connects would wait for an answer that never comes."""
        if self._listener is not None:
            self._listener.close()
        self._listener = self._thread = self._made = None

    def _tell(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                # It was closed; or for the moment there is no descriptor to spare.
                if self._is_over.wait(_RETRY_S):
                    return
                continue
            # For display only: whatever goes wrong here is over with this connection.
            with connection, contextlib.suppress(Exception):
                if _user_of(connection) == os.geteuid():
                    line = json.dumps(self._facts()).encode() + b"\n"
                    if len(line) <= MAX_STATS_BYTES:
                        connection.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _user_of(connection: socket.socket) -> int:
    """Who has connected, as the kernel noted it then."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])
