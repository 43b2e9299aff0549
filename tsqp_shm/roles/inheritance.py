"""What a child that is not trusted is given of its parent's, and what is kept from it.

It runs as the same user, so the system lets it open what that user may. But nothing comes to it by accident: no
terminal, no descriptor, no secret of the environment.

    standard input         empty, or a pipe of the parent's
    standard output, error pipes, which the parent reads and cleans (`relay`)
    other descriptors      a role's lifeline, and where a trace is made what it records in
    terminal, group        a session of its own, so no controlling terminal and no signal of the keyboard
    environment            the variables named here
    files it makes         its user's alone (umask); no core dumps
    folder                 the parent's, as paths on its command line may be relative
    priority, affinity,    the parent's
    other limits
    signals                what is ignored stays so; the child unblocks those that its parent's thread had blocked
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import fields
from typing import TypedDict

from tsqp_shm.config import EngineConfig, environment_variable

# By name: how programs are found, what language and folders they use, what torch, CUDA and this package read.
_NAMES = frozenset(
    {
        "HOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER",
        "XDG_CACHE_HOME", "XDG_RUNTIME_DIR",
        "LANG", "LANGUAGE", "LC_ADDRESS", "LC_ALL", "LC_COLLATE", "LC_CTYPE", "LC_IDENTIFICATION", "LC_MEASUREMENT",
        "LC_MESSAGES", "LC_MONETARY", "LC_NAME", "LC_NUMERIC", "LC_PAPER", "LC_TELEPHONE", "LC_TIME",
        "PYTHONDEVMODE", "PYTHONDONTWRITEBYTECODE", "PYTHONFAULTHANDLER", "PYTHONHASHSEED", "PYTHONHOME",
        "PYTHONMALLOC", "PYTHONNOUSERSITE", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "PYTHONUSERBASE", "PYTHONUTF8",
        "PYTHONWARNINGS", "VIRTUAL_ENV",
        "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES",
        "TSQP_SHM_ISA", "TSQP_SHM_RUNTIME_DIR",
        *(environment_variable(field.name) for field in fields(EngineConfig)),
    }
)  # fmt: skip
# By family, as each has more names than could be listed, and new ones with each version.
_PREFIXES = (
    "CUDA_", "CUBLAS_", "CUDNN_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_",
    "ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_",
    "ASAN_", "GLIBC_", "LSAN_", "MALLOC_", "TSAN_", "UBSAN_",
)  # fmt: skip
# Of a family's names these are none of the library's own.
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH", re.IGNORECASE)
PRIVATE_UMASK = 0o077
# The folder that a user happens to stand in is no place to import from.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


class KeptApart(TypedDict):
    """Arguments of `subprocess.Popen`."""

    env: dict[str, str]
    start_new_session: bool
    stdin: int
    umask: int


def kept_apart(variables: Mapping[str, str] | None = None, *, stdin: int = subprocess.DEVNULL) -> KeptApart:
    """How an untrusted child is started: `subprocess.Popen(command, **kept_apart(), stdout=..., stderr=...)`.

    Args:
        variables: to add to its environment.
        stdin: not this process's own.
    """
    return {
        "env": {**untrusted_environment(os.environ), **SAFE_PATH, **(variables or {})},
        # No terminal; Ctrl-C there is for this process, which then stops the child.
        "start_new_session": True,
        "stdin": stdin,
        "umask": PRIVATE_UMASK,
    }


def untrusted_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Of these variables those that an untrusted child may have. What is not known to be needed may be a secret."""
    return {name: value for name, value in environment.items() if name in _NAMES or _is_of_a_library(name)}


def _is_of_a_library(name: str) -> bool:
    return name.startswith(_PREFIXES) and not _SECRET.search(name)


def kill_session(pid: int) -> None:
    """Ends what is left of the session of a child that was kept apart: itself, and what it has started and left.

    One that has begun a session of its own is not reached.
    """
    # SAFETY: to be called before the child is waited for, or at once after: until all of its group are gone the kernel
    # gives the number to nobody else, and then not before it has given all the others.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def forbid_core_dump(pid: int) -> None:
    """A core of a child would lie in its parent's folder, prompts and all."""
    # From here and not between fork and exec, where Python code may run in no process that has threads.
    with contextlib.suppress(OSError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
