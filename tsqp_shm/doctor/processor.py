"""Instruction sets, and cores against threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.finding import BAD, GOOD, WARNING, Finding
from tsqp_shm.doctor.system import cgroup_cores
from tsqp_shm.errors import ConfigError
from tsqp_shm.gpu import _products
from tsqp_shm.modes import MODES
from tsqp_shm.roles.resources import ISA_VARIABLE, require_instruction_set


def examine_processor(config: EngineConfig) -> Iterator[Finding]:
    try:
        require_instruction_set()
    except ConfigError as error:
        yield Finding("instruction sets", BAD, str(error), "a start is refused", f"unset {ISA_VARIABLE}")
    else:
        yield _instruction_sets()
        if MODES[config.mode].has_gpu_process:
            yield _cpu_products()
    yield _cores(config)
    yield _threads(config)


def _instruction_sets() -> Finding:
    sets, active = _native.instruction_sets(), _native.active_instruction_set()
    found = f"{active} kernels chosen of {', '.join(sets)}"
    if active != sets[-1]:
        why = f"{ISA_VARIABLE}={active} keeps the TEE from its widest kernels"
        return Finding("instruction sets", WARNING, found, why, f"unset {ISA_VARIABLE}")
    if sets == ["scalar"]:
        why = "softmax, norms and SiLU go one element at a time"
        return Finding("instruction sets", WARNING, found, why, "use a processor with AVX2 or AVX-512")
    return Finding("instruction sets", GOOD, found)


def _cpu_products() -> Finding:
    panels = _products.panel_kernels(_native.active_instruction_set())
    if panels is not None:
        return Finding("products", GOOD, f"{panels} kernels, where the GPU process's device is the CPU")
    why = "this project's own kernels need wider instructions than the ones in use"
    return Finding("products", GOOD, "a GEMM library's, where the GPU process's device is the CPU", why)


def _cores(config: EngineConfig) -> Finding:
    has_gpu = MODES[config.mode].has_gpu_process
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    granted = cgroup_cores()
    found = f"{usable} of {present} may be used"
    if granted is not None and granted < usable:
        threads = max(1, int(granted))
        fewer = f"--tee-threads {threads}" + (f" --gpu-threads {threads}" if has_gpu else "")
        return Finding(
            "cores", WARNING, f"{found}, and the cgroup grants the time of {granted:g}",
            "threads on the others are stopped in the middle of their work until the next period",
            f"docker run --cpus {usable}, or {fewer}",
        )  # fmt: skip
    if usable == 1 and has_gpu:
        return Finding(
            "cores", WARNING, found, "both processes share it, and whoever waits takes it from whoever works",
            "taskset -c 0,1, docker run --cpus 2, or a larger machine",
        )  # fmt: skip
    return Finding("cores", GOOD, found)


def _threads(config: EngineConfig) -> Finding:
    cores = len(os.sched_getaffinity(0))
    tee, gpu = config.threads()
    found = f"{tee} for the TEE process" + (f", {gpu} for a GPU process on the CPU" if gpu else "")
    if max(tee, gpu) > cores:
        why = f"more threads than the {cores} core(s) only wait for each other"
        flags = "--tee-threads and --gpu-threads" if gpu else "--tee-threads"
        return Finding("threads", WARNING, found, why, f"leave out {flags}")
    return Finding("threads", GOOD, found)
