"""Whether this process runs in an enclave or a confidential VM, and what that means for the doorbell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.finding import BAD, GOOD, Finding
from tsqp_shm.doctor.system import cpuinfo, read_text
from tsqp_shm.modes import MODES

CHECK = "enclave"
ENDPOINT = "--endpoint tcp://127.0.0.1:PORT or --doorbell spin"
ALONE_IN_VM = "the process lies inside it, and nothing of the session outside"
VM_MEANING = (
    "both processes lie inside it, so the doorbell works as elsewhere, and it is the device that is outside; "
    "in its confidential mode it refuses to register the arena (error 801), and slots go through pinned memory"
)


def examine_enclave(config: EngineConfig, root: Path = Path("/")) -> Iterator[Finding]:
    """Args:
    root: where dev and proc are looked for.
    """
    if (root / "dev/attestation").exists():
        yield _gramine(config, root)
        return
    vm = confidential_vm(root)
    if vm:
        meaning = VM_MEANING if MODES[config.mode].has_gpu_process else ALONE_IN_VM
        yield Finding(CHECK, GOOD, f"a confidential VM ({vm})", meaning)
    elif (root / "dev/sgx_enclave").exists():
        why = "SGX can be used, but this process is not in an enclave; run the TEE role under Gramine"
        yield Finding(CHECK, GOOD, "none; this machine has SGX", why)
    else:
        why = "whoever controls this machine can read the TEE process: good for development and measuring"
        yield Finding(CHECK, GOOD, "none, and no confidential VM", why)


def _gramine(config: EngineConfig, root: Path) -> Finding:
    kind = read_text(root / "dev/attestation/attestation_type").strip()
    found = f"Gramine (attestation: {kind or 'unknown'})"
    if not MODES[config.mode].has_gpu_process:
        return Finding(CHECK, GOOD, found, f"nothing of mode {config.mode} has to cross the enclave's border")
    needs_socket = config.doorbell != "spin"
    if needs_socket and not (config.endpoint or "").startswith("tcp://"):
        why = "a Unix-domain socket does not cross the enclave's border, so nobody would wake a side that sleeps"
        return Finding(CHECK, BAD, found, why, ENDPOINT)
    why = "the arena must be named in the manifest: an untrusted_shm mount of /dev/shm, and a fixed --session"
    return Finding(CHECK, GOOD, found, why)


def confidential_vm(root: Path = Path("/")) -> str:
    """Which kind this is; "" for none that can be recognised."""
    flags = set(cpuinfo(root).get("flags", "").split())
    if "tdx_guest" in flags or (root / "dev/tdx_guest").exists():
        return "Intel TDX"
    # A host that could start such guests shows the flags too, but no hypervisor.
    if (root / "dev/sev-guest").exists() or {"hypervisor", "sev_snp"} <= flags:
        return "AMD SEV-SNP"
    return "AMD SEV" if {"hypervisor", "sev"} <= flags else ""
