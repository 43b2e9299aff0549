"""`tsqp-shm env`: the block for a bug report.

Variables are named one by one, so none that holds a secret is shown; prompts are in none.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import fields
from pathlib import Path

import zmq

from tsqp_shm import _native
from tsqp_shm._version import __version__
from tsqp_shm.config import EngineConfig, environment_variable
from tsqp_shm.doctor.enclave import confidential_vm
from tsqp_shm.doctor.finding import mib
from tsqp_shm.doctor.shared_memory import mount_of
from tsqp_shm.doctor.system import cgroup_cores, cgroup_limit, container, cpuinfo, read_text
from tsqp_shm.doctor.versions import package_versions
from tsqp_shm.modes import MODES
from tsqp_shm.printable import shown
from tsqp_shm.roles.resources import ISA_VARIABLE, available_bytes
from tsqp_shm.shm.posix.objects import SHM_FOLDER
from tsqp_shm.wrapping import beside

LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC, "memlock": resource.RLIMIT_MEMLOCK}
OTHER_VARIABLES = (
    ISA_VARIABLE, "TSQP_SHM_RUNTIME_DIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def print_environment() -> int:
    """Returns the exit code."""
    packages = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    granted, limit_bytes = cgroup_cores(), cgroup_limit("memory", "memory.limit_in_bytes", "memory.max")
    rows = [
        ("tsqp-shm", __version__),
        ("python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("packages", f"{packages}, libzmq {zmq.zmq_version()}"),
        ("system", f"{_distribution()}, Linux {platform.release()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}"),
        ("processor", _processor()),
        ("kernels", _kernels()),
        ("cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}, cgroup {granted or 'no limit'}"),
        ("memory", f"{mib(available_bytes())} available, cgroup {mib(limit_bytes) if limit_bytes else 'no limit'}"),
        ("/dev/shm", _shared_memory()),
        ("limits", ", ".join(f"{name} {_limit(number)}" for name, number in LIMITS.items())),
        ("container", container() or "none recognised"),
        ("enclave", "Gramine" if Path("/dev/attestation").exists() else confidential_vm() or "none recognised"),
        ("mode", _mode()),
        ("settings", _settings()),
    ]
    for name, value in rows:
        print(beside(f"{name:<11}", shown(value, lines=False), sys.stdout))
    return 0


def _distribution() -> str:
    names = [line for line in read_text("/etc/os-release").splitlines() if line.startswith("PRETTY_NAME=")]
    return names[0].partition("=")[2].strip('"') if names else "unknown distribution"


def _processor() -> str:
    info = cpuinfo()
    virtual = ", virtual" if "hypervisor" in info.get("flags", "").split() else ""
    return f"{info.get('model name', platform.machine())}{virtual}"


def _kernels() -> str:
    try:
        return f"{_native.active_instruction_set()} of {', '.join(_native.instruction_sets())}"
    except ValueError as error:
        return str(error)


def _shared_memory() -> str:
    mount = mount_of(SHM_FOLDER)
    try:
        status = os.statvfs(SHM_FOLDER)
    except OSError as error:
        return str(error.strerror)
    size = f"{mib(status.f_bavail * status.f_frsize)} of {mib(status.f_blocks * status.f_frsize)} free"
    return f"{mount.kind} ({','.join(mount.options)}), {size}" if mount else f"not a mount, {size}"


def _limit(number: int) -> str:
    value = resource.getrlimit(number)[0]
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _mode() -> str:
    """What a start without --mode would take."""
    name = os.environ.get(environment_variable("mode"), EngineConfig.mode)
    others = ", ".join(other for other in MODES if other != name)
    return f"{MODES[name].line} Others: {others}" if name in MODES else f"{name}: there is none of this name"


def _settings() -> str:
    names = [environment_variable(field.name) for field in fields(EngineConfig)]
    chosen = [f"{name}={os.environ[name]}" for name in (*names, *OTHER_VARIABLES) if name in os.environ]
    return " ".join(chosen).replace(str(Path.home()), "~") or "none in the environment"
