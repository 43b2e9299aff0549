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
from typing import Any

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
from tsqp_shm.printable import print_json, shown
from tsqp_shm.roles.resources import ISA_VARIABLE, available_bytes
from tsqp_shm.shm.posix.objects import SHM_FOLDER
from tsqp_shm.wrapping import beside

LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC, "memlock": resource.RLIMIT_MEMLOCK}
OTHER_VARIABLES = (
    ISA_VARIABLE, "TSQP_SHM_RUNTIME_DIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def print_environment(*, json_output: bool) -> int:
    """Prints the block, or the same facts as one JSON object. Returns the exit code."""
    facts = environment_facts()
    if json_output:
        print_json(facts)
        return 0
    for name, value in _block(facts).items():
        print(beside(f"{name:<11}", shown(value, lines=False), sys.stdout))
    return 0


def environment_facts() -> dict[str, Any]:
    """As plain values. None: there is none, or no limit."""
    return {
        "tsqp_shm": __version__,
        "python": {"implementation": platform.python_implementation(), "version": platform.python_version()},
        "packages": {**package_versions(), "libzmq": zmq.zmq_version()},
        "system": {
            "distribution": _distribution(),
            "linux": platform.release(),
            "libc": " ".join(platform.libc_ver()).strip() or None,
        },
        "processor": _processor(),
        "kernels": _kernels(),
        "cores": {"usable": len(os.sched_getaffinity(0)), "of": os.cpu_count(), "cgroup": cgroup_cores()},
        "memory": {
            "available_bytes": available_bytes(),
            "cgroup_bytes": cgroup_limit("memory", "memory.limit_in_bytes", "memory.max"),
        },
        "shared_memory": _shared_memory(),
        "limits": {name: _limit(number) for name, number in LIMITS.items()},
        "container": container() or None,
        "enclave": "Gramine" if Path("/dev/attestation").exists() else confidential_vm() or None,
        "mode": _mode(),
        "settings": _settings(),
    }


def _block(facts: dict[str, Any]) -> dict[str, str]:
    system, processor, cores, memory = (facts[name] for name in ("system", "processor", "cores", "memory"))
    granted_bytes, mode = memory["cgroup_bytes"], facts["mode"]
    granted = mib(granted_bytes) if granted_bytes else "no limit"
    return {
        "tsqp-shm": facts["tsqp_shm"],
        "python": f"{facts['python']['implementation']} {facts['python']['version']}",
        "packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        "system": f"{system['distribution']}, Linux {system['linux']}, {system['libc'] or 'unknown libc'}",
        "processor": f"{processor['name']}{', virtual' if processor['is_virtual'] else ''}",
        "kernels": facts["kernels"]["fault"] or f"{facts['kernels']['active']} of {', '.join(facts['kernels']['of'])}",
        "cores": f"{cores['usable']} of {cores['of']}, cgroup {cores['cgroup'] or 'no limit'}",
        "memory": f"{mib(memory['available_bytes'])} available, cgroup {granted}",
        "/dev/shm": _shown_memory(facts["shared_memory"]),
        "limits": ", ".join(
            f"{name} {'unlimited' if limit is None else limit}" for name, limit in facts["limits"].items()
        ),
        "container": facts["container"] or "none recognised",
        "enclave": facts["enclave"] or "none recognised",
        "mode": f"{mode['says'] or mode['name'] + ': there is none of this name.'} Others: {', '.join(mode['others'])}",
        "settings": " ".join(f"{name}={value}" for name, value in facts["settings"].items())
        or "none in the environment",
    }


def _distribution() -> str:
    names = [line for line in read_text("/etc/os-release").splitlines() if line.startswith("PRETTY_NAME=")]
    return names[0].partition("=")[2].strip('"') if names else "unknown distribution"


def _processor() -> dict[str, Any]:
    info = cpuinfo()
    is_virtual = "hypervisor" in info.get("flags", "").split()
    return {"name": info.get("model name", platform.machine()), "is_virtual": is_virtual}


def _kernels() -> dict[str, Any]:
    known = _native.instruction_sets()
    try:
        return {"active": _native.active_instruction_set(), "of": known, "fault": None}
    except ValueError as error:
        return {"active": None, "of": known, "fault": str(error)}


def _shared_memory() -> dict[str, Any]:
    mount = mount_of(SHM_FOLDER)
    facts: dict[str, Any] = {"kind": mount and mount.kind, "options": list(mount.options) if mount else []}
    try:
        status = os.statvfs(SHM_FOLDER)
    except OSError as error:
        return {**facts, "free_bytes": None, "size_bytes": None, "fault": error.strerror}
    free_bytes, size_bytes = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    return {**facts, "free_bytes": free_bytes, "size_bytes": size_bytes, "fault": None}


def _shown_memory(facts: dict[str, Any]) -> str:
    if facts["fault"] is not None:
        return str(facts["fault"])
    mount = f"{facts['kind']} ({','.join(facts['options'])})" if facts["kind"] else "not a mount"
    return f"{mount}, {mib(facts['free_bytes'])} of {mib(facts['size_bytes'])} free"


def _limit(number: int) -> int | None:
    value = resource.getrlimit(number)[0]
    return None if value == resource.RLIM_INFINITY else value


def _mode() -> dict[str, Any]:
    """What a start without --mode would take, and what it says of itself."""
    name = os.environ.get(environment_variable("mode"), EngineConfig.mode)
    says = MODES[name].line if name in MODES else None
    return {"name": name, "says": says, "others": [other for other in MODES if other != name]}


def _settings() -> dict[str, str]:
    names = [environment_variable(field.name) for field in fields(EngineConfig)]
    return {
        name: os.environ[name].replace(str(Path.home()), "~")
        for name in (*names, *OTHER_VARIABLES)
        if name in os.environ
    }
