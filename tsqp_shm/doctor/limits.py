"""The limits of the process and of its container."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.finding import BAD, GOOD, WARNING, Finding, mib
from tsqp_shm.doctor.system import cgroup_limit, container
from tsqp_shm.errors import LimitError
from tsqp_shm.modes import MODES
from tsqp_shm.roles.resources import (
    NEEDED_DESCRIPTORS,
    NEEDED_THREADS,
    available_bytes,
    num_open_descriptors,
    require_descriptors,
    require_threads,
)


def examine_limits(config: EngineConfig, needed_bytes: int | None) -> Iterator[Finding]:
    """Args:
    needed_bytes: memory of the session's processes together; None: not known.
    """
    kind = container()
    yield Finding("container", GOOD, f"{kind}: limits may be lower than the host's" if kind else "none recognised")
    yield _memory(config, needed_bytes)
    yield _descriptors()
    yield _threads(config)


def _memory(config: EngineConfig, needed_bytes: int | None) -> Finding:
    limit_bytes = cgroup_limit("memory", "memory.limit_in_bytes", "memory.max")
    free_bytes = available_bytes()
    found = f"{mib(free_bytes)} available"
    found += "" if limit_bytes is None else f", the cgroup's limit is {mib(limit_bytes)}"
    if needed_bytes is None:
        return Finding("memory", GOOD, found)
    has_gpu = MODES[config.mode].has_gpu_process
    elsewhere = ", or --device cuda" if has_gpu else ""
    found += f", {'both processes need' if has_gpu else 'the session needs'} about {mib(needed_bytes)} on the CPU"
    if limit_bytes is not None and needed_bytes > limit_bytes:
        why = "the kernel kills a process of the cgroup when it goes beyond; pages of the arena count"
        return Finding("memory", BAD, found, why, f"docker run --memory, a smaller model{elsewhere}")
    if needed_bytes > free_bytes:
        why = "the machine would swap, or the kernel kill a process"
        return Finding("memory", WARNING, found, why, f"free memory, take a smaller model{elsewhere}")
    return Finding("memory", GOOD, found)


def _descriptors() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        require_descriptors(NEEDED_DESCRIPTORS)
    except LimitError as error:
        return Finding("file descriptors", BAD, error.reason, "a start is refused", "ulimit -n 1024")
    return Finding("file descriptors", GOOD, f"at most {limit:,}, {num_open_descriptors()} open")


def _threads(config: EngineConfig) -> Finding:
    needed = sum(config.threads()) + NEEDED_THREADS
    pids = cgroup_limit("pids", "pids.max", "pids.max")
    try:
        require_threads(needed)
    except LimitError as error:
        return Finding("thread limit", BAD, error.reason, "a start is refused", "ulimit -u, docker run --pids-limit")
    beside = "" if pids is None else f"; the cgroup allows {pids:,} in all"
    return Finding("thread limit", GOOD, f"{needed} started at once{beside}")
