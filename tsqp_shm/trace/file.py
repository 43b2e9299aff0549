"""The trace of a session, as whoever starts its roles makes it: their recordings in, one file out.

The recordings go to memory files of this process, of which each role is given its own: none has a name that could be
left behind, and nobody has to look into this process, which may forbid that. They are put together by `tsqp-shm trace`
in a process of its own, so that neither a TEE process nor a launch reads what the GPU process wrote.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tsqp_shm.descriptors import memory_file
from tsqp_shm.errors import ConfigError, TraceError
from tsqp_shm.files import open_regular
from tsqp_shm.roles.inheritance import kept_apart
from tsqp_shm.roles.process import ERROR_PREFIX
from tsqp_shm.trace.recorder import require_least_wait

MERGE_TIMEOUT_S = 120


class TraceFile:
    """FILE, to be written when the block is left.

    Args:
        roles: that are to leave a recording.
        report: takes a line about each recording.
        least_wait_us: waits that are shorter are left out.

    Raises:
        ConfigError: it cannot be written; before the block.
        TraceError: the trace cannot be made; after the block, if that ended well.
    """

    def __init__(self, path: Path, roles: Sequence[str], report: Callable[[str], None], least_wait_us: int = 0) -> None:
        require_least_wait(path, least_wait_us)
        self.path = path
        self._least_wait_us = least_wait_us
        self._report = report
        is_new = not self.path.exists()
        try:
            # What is there already stays until there is something to take its place.
            fd = open_regular(self.path, os.O_WRONLY | os.O_CREAT, follows_links=True)
        except OSError as error:
            raise ConfigError("trace", str(path), f"a file that can be written ({error.strerror})") from None
        # What this object has made, and may remove if nothing comes of it.
        self._made = os.fstat(fd) if is_new else None
        os.close(fd)
        self._memory = {role: memory_file(f"tsqp-shm-trace-{role}", b"") for role in roles}

    def recording(self, role: str) -> Path:
        """Where that role writes its recording: in this process, and in one that has been given `descriptor`."""
        return Path(f"/proc/self/fd/{self._memory[role]}")

    def descriptor(self, role: str) -> int:
        """What that role is given; it has the same number there."""
        return self._memory[role]

    def arguments(self, role: str) -> list[str]:
        """What that role is started with."""
        return ["--trace", str(self.recording(role)), "--trace-min-wait-us", str(self._least_wait_us)]

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        written = [role for role, descriptor in self._memory.items() if os.fstat(descriptor).st_size]
        try:
            problem = self._merge(written) if written else "no process left a recording"
        finally:
            for descriptor in self._memory.values():
                os.close(descriptor)
        if problem is not None and self._made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(self.path.lstat(), self._made):
                    self.path.unlink()
        if problem is None and len(written) < len(self._memory):
            problem = f"holds the {written[0]} process alone: the other left no recording"
        # Where the session itself went wrong, that is what has to be said.
        if problem is not None and kind is None:
            raise TraceError(self.path, problem)

    def _merge(self, written: list[str]) -> str | None:
        """Returns what went wrong."""
        command = [sys.executable, "-m", "tsqp_shm", "trace", str(self.path.absolute())]
        try:
            merged = subprocess.run(
                [*command, *(str(self.recording(role)) for role in written)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=MERGE_TIMEOUT_S,
                pass_fds=[self.descriptor(role) for role in written],
                # Ctrl-C ends the run, and the trace of it is made nevertheless.
                **kept_apart(),
            )
        except subprocess.TimeoutExpired:
            return f"was not made within {MERGE_TIMEOUT_S} s"
        said = merged.stderr.decode(errors="replace").strip()
        if merged.returncode:
            return said.removeprefix(ERROR_PREFIX)[:500]
        for line in said.splitlines():
            self._report(f"trace {self.path}: {line}")
        return None
