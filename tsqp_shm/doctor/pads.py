"""What pads need: AES by the processor's instructions, memory that can be locked, a process without dumps, and room."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.finding import BAD, GOOD, WARNING, Finding, mib
from tsqp_shm.doctor.model import Need
from tsqp_shm.doctor.system import cpuinfo, has_swap, read_text
from tsqp_shm.errors import ConfigError
from tsqp_shm.pad_stock import stock_rows
from tsqp_shm.roles.inheritance import kept_apart
from tsqp_shm.roles.resources import available_bytes, lockable_bytes

# A trial where no model is named; the keys of a Linear take less than half a KiB.
SOME_LINEARS = 256
LOCK_CURE = "ulimit -l unlimited, LimitMEMLOCK=infinity or --ulimit memlock=-1"
HARDEN = "from tsqp_shm.hardening import harden; harden()"
HARDEN_TIMEOUT_S = 30.0


def examine_pads(config: EngineConfig, need: Need | None) -> Iterator[Finding]:
    """Args:
    need: of the model in question; None: of none.
    """
    yield _kernels()
    yield _keys(SOME_LINEARS if need is None else need.num_linears)
    yield _stock(config, need)
    yield _dumps()


def _kernels(root: Path = Path("/")) -> Finding:
    chosen = _native.pads_instruction_set()
    if chosen != "scalar":
        return Finding("pad kernels", GOOD, f"{chosen} draws and masks")
    has_aes = "aes" in cpuinfo(root).get("flags", "").split()
    why = "AES is computed without the processor's instructions for it, which takes many times as long"
    cure = "unset TSQP_SHM_ISA" if has_aes else "a processor with AES-NI, or a virtual machine that is shown them"
    return Finding("pad kernels", WARNING, "scalar draws and masks", why, cure)


def _keys(num_linears: int) -> Finding:
    try:
        keys = _native.PadKeys(b"doctor", b"", 0, num_linears)
    except OSError as error:
        why = "keys are kept in locked memory or not at all, so a start is refused"
        return Finding("keys", BAD, f"{num_linears} Linears: {error.strerror or error}", why, LOCK_CURE)
    del keys
    return Finding("keys", GOOD, f"{num_linears} made, in locked memory")


def _dumps() -> Finding:
    pattern = read_text("/proc/sys/kernel/core_pattern").strip()
    taker = f"kernel.core_pattern is {pattern!r}"
    try:
        # In a process of its own: this one is to stay as it is.
        done = subprocess.run(
            [sys.executable, "-c", HARDEN], capture_output=True, timeout=HARDEN_TIMEOUT_S, **kept_apart()
        )
        said = done.stderr.decode(errors="replace").strip().splitlines()
        refusal = (said or [f"exit code {done.returncode}"])[-1] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        refusal = str(error)
    if refusal:
        why = "whoever takes a core or traces the process would have its keys, so a start is refused"
        return Finding("dumps", BAD, refusal, why, "a system that knows PR_SET_DUMPABLE")
    why = "debuggers and profilers of this user are shut out as well; root is not"
    return Finding("dumps", GOOD, f"the TEE process leaves no core ({taker}) and lets no process of its user look", why)


def _stock(config: EngineConfig, need: Need | None) -> Finding:
    if need is None:
        return Finding("pad stock", GOOD, "its size depends on the model; `tsqp-shm doctor MODEL` says it")
    free_bytes = available_bytes()
    most_bytes = lockable_bytes()
    try:
        rows = stock_rows(
            config.pad_stock,
            need.pad_row_bytes,
            most_rows=need.max_model_len,
            free_bytes=free_bytes,
            lockable_bytes=most_bytes if config.lock_memory else None,
        )
    except ConfigError as error:
        return Finding("pad stock", BAD, str(error), "a start is refused", "another --pad-stock, or leave it out")
    size_bytes = rows * need.pad_row_bytes
    found = f"{rows:,} rows of {need.pad_row_bytes:,} bytes: {mib(size_bytes)} of {mib(free_bytes)} available"
    if rows < need.max_model_len and config.pad_stock is None:
        why = f"less than the {need.max_model_len:,} rows of a longest sequence: what has no pad is computed in the TEE"
        return Finding("pad stock", WARNING, found, why, "free memory, or lower --max-model-len")
    if config.lock_memory and most_bytes is not None and size_bytes > most_bytes:
        why = f"at most {mib(most_bytes)} may be locked, so it can be swapped out"
        return Finding("pad stock", WARNING, found, why, LOCK_CURE)
    if has_swap() and not config.lock_memory:
        why = "it can be swapped out, and whoever reads the disk later tells from it what was blinded"
        return Finding("pad stock", WARNING, found, why, "--lock-memory, or swapoff -a")
    return Finding("pad stock", GOOD, found)
