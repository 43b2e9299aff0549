"""What a child that is not trusted is given of its parent's, and what is kept from it.

It runs as the same user, so the system lets it open what that user may. But nothing comes to it by accident: no
terminal, no descriptor, no secret of the environment.

    standard input         empty
    standard output, error one pipe, which the parent reads and cleans (`relay`)
    other descriptors      the lifeline alone
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
import resource
from collections.abc import Mapping

# By name: how programs are found, what language and folders they use, what torch, CUDA and this package read.
_NAMES = frozenset(
    {
        "HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER",
        "XDG_CACHE_HOME", "XDG_RUNTIME_DIR",
        "PYTHONDEVMODE", "PYTHONDONTWRITEBYTECODE", "PYTHONFAULTHANDLER", "PYTHONHASHSEED", "PYTHONHOME",
        "PYTHONMALLOC", "PYTHONNOUSERSITE", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "PYTHONUSERBASE", "PYTHONUTF8",
        "PYTHONWARNINGS", "VIRTUAL_ENV",
    }
)  # fmt: skip
_PREFIXES = (
    "LC_", "TSQP_SHM_",
    "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "TORCH", "PYTORCH_",
    "ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_",
    "ASAN_", "GLIBC_", "LSAN_", "MALLOC_", "TSAN_", "UBSAN_",
)  # fmt: skip
PRIVATE_UMASK = 0o077


def untrusted_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Of these variables those that an untrusted child may have. What is not known to be needed may be a secret."""
    return {name: value for name, value in environment.items() if name in _NAMES or name.startswith(_PREFIXES)}


def forbid_core_dump(pid: int) -> None:
    """A core of a child would lie in its parent's folder, prompts and all."""
    # From here and not between fork and exec, where Python code may run in no process that has threads.
    with contextlib.suppress(OSError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
