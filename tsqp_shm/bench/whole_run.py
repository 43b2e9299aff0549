"""A contender that runs once, from its start to its end, and whose text is what it has to say."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Mapping
from typing import NamedTuple

from tsqp_shm.bench.contenders import POLITE_STOP_S
from tsqp_shm.errors import ContenderFailed
from tsqp_shm.roles.inheritance import kept_apart, kill_session
from tsqp_shm.roles.relay import Relay

# Of a contender whose text is a few tokens.
MAX_TEXT_BYTES = 1 << 16


class WholeRun(NamedTuple):
    """Attributes:
    first_s: from its start to its first text.
    """

    text: bytes
    first_s: float


def run_whole(
    name: str, command: list[str], variables: Mapping[str, str], timeout_s: float, most_bytes: int = MAX_TEXT_BYTES
) -> WholeRun:
    """Raises:
    ContenderFailed: it gives no text or too much, fails, or takes too long.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kept_apart(dict(variables)),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    relay = Relay(name, process.stderr, lambda line: None)
    try:
        found = _read(name, process.stdout.fileno(), started, timeout_s, most_bytes)
        process.wait(max(0.0, started + timeout_s - time.perf_counter()))
    except subprocess.TimeoutExpired:
        raise _late(name, timeout_s) from None
    finally:
        _end(process)
        relay.finish()
    if not found.text.strip() or process.returncode:
        said = f"exit code {process.returncode}, no text; its last words:\n{relay.last_words}"
        raise ContenderFailed(name, said.rstrip())
    return found


def _read(name: str, descriptor: int, started: float, timeout_s: float, most_bytes: int) -> WholeRun:
    text, first_s = b"", 0.0
    # UNTRUSTED: all of it has this time and so many bytes, in whatever pieces it comes.
    while len(text) <= most_bytes:
        left_s = started + timeout_s - time.perf_counter()
        if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
            raise _late(name, timeout_s)
        if not text:
            first_s = time.perf_counter() - started
        piece = os.read(descriptor, MAX_TEXT_BYTES)
        if not piece:
            return WholeRun(text, first_s)
        text += piece
    raise ContenderFailed(name, f"a text of more than {most_bytes:,} bytes")


def _late(name: str, timeout_s: float) -> ContenderFailed:
    return ContenderFailed(name, f"not at its end within {timeout_s:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    for act in (process.terminate, process.kill):
        if process.poll() is None:
            act()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLITE_STOP_S)
    kill_session(process.pid)
    if process.stdout is not None:
        process.stdout.close()
