"""What a role needs of the system before it begins: file descriptors, threads, and the kernels it was told to use.

Without this check the first sign of a low limit may come late, and from a library: libzmq aborts the process when it
cannot start a thread.
"""

from __future__ import annotations

import os
import resource
import threading
from contextlib import suppress
from pathlib import Path

from tsqp_shm.errors import ConfigError, LimitError

ISA_VARIABLE = "TSQP_SHM_ISA"

# Sockets, the arena, model files, pipes of children; a CUDA driver opens some thirty.
NEEDED_DESCRIPTORS = 48
# libzmq's two, the heartbeat, and a parent's listeners.
NEEDED_THREADS = 6
# Whoever has it may lock what he likes.
_CAP_IPC_LOCK = 14
# Those that are started for a trial end by themselves after so long, where a signal handler keeps them from being told.
TRIAL_S = 2.0


def require_resources(threads: int) -> None:
    """Holds the limits of this process against what a role needs.

    Args:
        threads: that the role computes with.

    Raises:
        LimitError: there are too few descriptors or threads.
        ConfigError: TSQP_SHM_ISA names no instruction set of this processor.
    """
    require_descriptors(NEEDED_DESCRIPTORS)
    require_threads(threads + NEEDED_THREADS)
    require_instruction_set()


def require_descriptors(number: int) -> None:
    """Raises:
    LimitError: fewer than `number` can still be opened.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return
    used = num_open_descriptors()
    if limit - used < number:
        raise LimitError(
            "file descriptors",
            f"the limit is {limit}, {used} are open and {number} more are needed; "
            f"raise it with ulimit -n {used + number} or LimitNOFILE",
        )


def require_threads(number: int) -> None:
    """Starts so many threads at once and lets them end: whoever else counts towards the limit is counted too.

    Raises:
        LimitError: the system refused one.
    """
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(number):
            thread = threading.Thread(target=done.wait, args=[TRIAL_S], daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        raise LimitError(
            "threads",
            f"{number} more are needed and the system granted {len(started)}; raise ulimit -u, the pids limit of the "
            "container (docker run --pids-limit) or TasksMax, or lower --tee-threads and --gpu-threads",
        ) from None
    finally:
        done.set()
        for thread in started:
            thread.join()


def require_instruction_set() -> None:
    """Raises:
    ConfigError: TSQP_SHM_ISA names no instruction set of this processor.
    """
    # Not at the top: the command line must not load native code before it knows what it is to do.
    from tsqp_shm import _native

    try:
        _native.active_instruction_set()
    except ValueError:
        names = ", ".join(_native.instruction_sets())
        raise ConfigError(ISA_VARIABLE, os.environ.get(ISA_VARIABLE), f"one that this machine has: {names}") from None


def num_open_descriptors() -> int:
    """Those of this process, the one that reads the list not counted."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208
    except OSError:
        # Without a descriptor to spare the list cannot be read either.
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def available_bytes() -> int:
    """Of memory, what the system says is free or can be made so, as far as a cgroup grants it."""
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, IndexError), Path("/proc/meminfo").open(encoding="ascii") as lines:
        free_bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    # UNTRUSTED: of the system's making, for sizes only. A container sees its own cgroup as the root.
    with suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        for folder in {Path("/sys/fs/cgroup", own), Path("/sys/fs/cgroup")}:
            with suppress(OSError, ValueError):
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                free_bytes = min(free_bytes, max(0, limit - used))
    return free_bytes


def lockable_bytes() -> int | None:
    """Of memory, what this process may lock in all; None: the system sets it no limit."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY or _has_capability(_CAP_IPC_LOCK) else limit


def _has_capability(number: int) -> bool:
    with suppress(OSError, ValueError, IndexError), Path("/proc/self/status").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False
