"""What a process that holds keys forbids the system to do with its memory: to write it to a core, to show it to others.

    no cores        the kernel writes none and hands none to a program that `core_pattern` names: it asks for a process
                    that may be dumped, and the limit on the size is 0 beside it
    not dumpable    no process of the same user traces it, reads its memory or opens its descriptors; what tells of
                    these in /proc belongs to root from here on. Times and counts (stat, status, cmdline) stay readable

For the whole process and for good: a debugger and a profiler of the same user are shut out too. Root is not. Children
that it forks stay so; a program that it starts begins as any other, with the limit on cores alone.
"""

from __future__ import annotations

import ctypes
import os
import resource

from tsqp_shm.errors import TsqpError

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4


def harden() -> dict[str, bool]:
    """Has the kernel keep this process's memory to it. Doing so twice does nothing.

    Returns:
        What the system says afterwards: whether the process is still "dumpable", and whether it may still leave a
        "core". Both are False.

    Raises:
        TsqpError: the system refuses.
    """
    try:
        _process_control(_PR_SET_DUMPABLE, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hardening = examine()
    except (OSError, AttributeError) as error:
        raise TsqpError(f"this process cannot be kept from being dumped, so it makes no keys: {error}") from error
    if any(hardening.values()):
        raise TsqpError("the system says that this process can be dumped after it was told otherwise: it makes no keys")
    return hardening


def examine() -> dict[str, bool]:
    """What `harden` returns, without changing anything.

    Raises:
        OSError: the system does not say.
    """
    return {
        "dumpable": _process_control(_PR_GET_DUMPABLE, 0) != 0,
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0] != 0,
    }


def _process_control(option: int, argument: int) -> int:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, *4 * (ctypes.c_ulong,))
    prctl.restype = ctypes.c_int
    found = int(prctl(option, argument, 0, 0, 0))
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found
