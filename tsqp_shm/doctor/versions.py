"""Versions of Python and of the packages, and whether a CUDA device can pin the arena."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from tsqp_shm._version import __version__
from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.finding import BAD, GOOD, WARNING, Finding
from tsqp_shm.modes import MODES
from tsqp_shm.printable import quoted
from tsqp_shm.roles.inheritance import kept_apart

PACKAGES = ("numpy", "pyzmq", "tokenizers", "jinja2", "torch", "transformers")
# The classifiers of pyproject.toml are the one list of the Pythons that this package is tested with.
CLASSIFIER = "Programming Language :: Python :: 3."
# Loading torch from a cold disk takes long; a driver that hangs takes for ever.
PROBE_TIMEOUT_S = 60.0

# In a process of its own: torch is large, and a broken driver may crash or hang whoever asks it.
PROBE = """
import json, mmap, sys
import torch

facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
if torch.cuda.is_available():
    facts["devices"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    import numpy
    memory = mmap.mmap(-1, 1 << 20)
    address = numpy.frombuffer(memory, numpy.uint8).ctypes.data
    from tsqp_shm.gpu.pinning import CudaDriver
    torch.cuda.synchronize()
    driver = CudaDriver()
    facts["refusal"] = driver.register(address, 1 << 20)
    if not facts["refusal"]:
        driver.unregister(address)
json.dump(facts, sys.stdout)
"""


def examine_versions(config: EngineConfig) -> Iterator[Finding]:
    yield _python()
    yield _packages()
    if MODES[config.mode].has_gpu_process:
        yield from _device(config)


def package_versions() -> dict[str, str]:
    """Of those that are installed, without importing them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def tested_minors() -> list[int]:
    """The minor versions of Python 3 that the installed package names, ascending; none where it is not installed."""
    try:
        named = metadata.metadata("tsqp-shm").get_all("Classifier") or []
    except metadata.PackageNotFoundError:
        return []
    return sorted(int(line.removeprefix(CLASSIFIER)) for line in named if line.startswith(CLASSIFIER))


def _python() -> Finding:
    found = f"{platform.python_version()}, tsqp-shm {__version__}"
    minors = tested_minors()
    if not minors or sys.version_info[:2] in [(3, minor) for minor in minors]:
        return Finding("Python", GOOD, found)
    why = f"tested with 3.{minors[0]} to 3.{minors[-1]}"
    return Finding("Python", WARNING, found, why, "make an environment with one of those")


def _packages() -> Finding:
    found = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return Finding("packages", GOOD, found)


def _device(config: EngineConfig) -> Iterator[Finding]:
    if "torch" not in package_versions():
        why = "the GPU process needs it; the TEE process does not"
        yield Finding("torch", WARNING, "not installed", why, "pip install torch")
        return
    facts = probe_torch()
    if "failed" in facts:
        why = "the GPU process would fail in the same way"
        yield Finding("torch", BAD, facts["failed"], why, "python -c 'import torch; torch.cuda.is_available()'")
        return
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    yield Finding("torch", GOOD, f"{facts['torch']}, {built}")
    if not facts["devices"]:
        yield _no_device(config, built)
        return
    yield Finding("device", GOOD, ", ".join(facts["devices"]))
    refusal = facts["refusal"]
    if not refusal:
        yield Finding("pinning", GOOD, "the arena can be registered with the device")
    else:
        why = "slots are copied once more on their way to the device; a confidential-computing mode does that (801)"
        yield Finding("pinning", WARNING, refusal, why, "look for a limit on locked memory")


def _no_device(config: EngineConfig, built: str) -> Finding:
    if config.device.startswith("cuda"):
        why = f"--device {config.device} cannot be used: torch is {built}, or there is no driver"
        return Finding("device", BAD, "no CUDA device", why, "--device cpu, or a driver and a torch with CUDA")
    return Finding("device", GOOD, "the CPU: it computes on the slots in place, nothing is pinned")


def probe_torch(timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any]:
    """What torch says of itself and of its devices; {"failed": why} where it says nothing."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            capture_output=True,
            timeout=timeout_s,
            **kept_apart(),
        )
    except OSError as error:
        return {"failed": f"no process can be started: {error.strerror}"}
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {timeout_s:.0f} s"}
    # UNTRUSTED: torch is no part of what the TEE process trusts.
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": quoted(last)}
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"failed": "it answers with something else than it was asked"}
    return facts
