"""What a session tells over its socket; `tee.telling` is the other end."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

from tsqp_shm.shm.progress import MAX_STATS_BYTES, STATS_SOCKET, WITHHELD

TIMEOUT_S = 0.5
_CREDENTIALS = struct.Struct("3i")
_CHUNK_BYTES = 1 << 14


class Pads(NamedTuple):
    """Counts are of pads, of rows of one Linear each, since the session began; those of the stock are rows of all.

    Attributes:
        burned: taken, and then not used.
        pads_per_s: made lately; None: not known yet.
        tee_products: rows of one Linear that the TEE has computed itself, as there was no pad.
        fault: what has ended the making of pads, or None.
    """

    stock_rows: int
    capacity_rows: int
    made: int
    used: int
    burned: int
    pads_per_s: float | None
    tee_products: int
    fault: str | None


class Told(NamedTuple):
    """Attributes:
    withheld: of `shm.progress.Progress`, by their names.
    """

    pads: Pads
    withheld: dict[str, int]


def tells(folder: Path) -> bool:
    """Whether the session in that folder has such a socket."""
    return os.path.lexists(folder / STATS_SOCKET)


def ask(folder: Path, timeout_s: float = TIMEOUT_S) -> Told | None:
    """What the session in that folder tells; None: nothing, or not within that time."""
    until = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(folder / STATS_SOCKET))
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():
                return None
            line = b""
            while len(line) <= MAX_STATS_BYTES:
                connection.settimeout(max(1e-3, until - time.monotonic()))
                chunk = connection.recv(_CHUNK_BYTES)
                if not chunk:
                    return _told(json.loads(line))
                line += chunk
    # UNTRUSTED: whatever process of this user has the socket; for display only.
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        pass
    return None


def _told(facts: Any) -> Told:
    """Raises:
    ValueError, TypeError, KeyError: it is not what a session tells.
    """
    pads = facts["pads"]
    fault = pads["fault"]
    if not isinstance(fault, (str, type(None))):
        raise TypeError("a fault that is no text")
    values = {name: _count(pads[name]) for name in Pads._fields if name not in ("pads_per_s", "fault")}
    rate = pads["pads_per_s"]
    if rate is not None and not math.isfinite(rate):
        raise ValueError("no rate")
    withheld = {name: _count(facts["withheld"][name]) for name in WITHHELD}
    return Told(Pads(**values, pads_per_s=rate, fault=fault), withheld)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError("no count")
    return value
