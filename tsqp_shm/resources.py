"""What the system must grant a role before it begins: file descriptors and threads.

Without this check the first sign of a low limit may come late, and from a library: libzmq aborts the process when it
cannot start a thread.
"""

from __future__ import annotations

import os
import resource
import threading

from tsqp_shm.errors import LimitError

# Sockets, the arena, model files, pipes of children; a CUDA driver opens some thirty.
NEEDED_DESCRIPTORS = 48
# libzmq's two, the heartbeat, and a parent's listeners.
NEEDED_THREADS = 6


def require_resources(threads: int) -> None:
    """Holds the limits of this process against what a role needs.

    Args:
        threads: that the role computes with.

    Raises:
        LimitError: there are too few descriptors or threads.
    """
    require_descriptors(NEEDED_DESCRIPTORS)
    require_threads(threads + NEEDED_THREADS)


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
            thread = threading.Thread(target=done.wait, daemon=True)
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


def num_open_descriptors() -> int:
    """Those of this process, the one that reads the list not counted."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208
    except OSError:
        # Without a descriptor to spare the list cannot be read either.
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
