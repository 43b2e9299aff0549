"""What the kernel says of this process and its cgroup, read from /proc and /sys.

Nothing here fails: what cannot be read is "" or None.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_FOLDER = Path("/sys/fs/cgroup")
# Version 1 writes "no limit" as the largest number of whole pages.
NO_LIMIT = 1 << 62


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def cpuinfo(root: Path = Path("/")) -> dict[str, str]:
    """The fields of the first processor."""
    fields: dict[str, str] = {}
    for line in read_text(root / "proc/cpuinfo").splitlines():
        if not line.strip() and fields:
            break
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def has_swap() -> bool:
    """Where the kernel does not say: True."""
    lines = read_text("/proc/swaps").splitlines()
    return len(lines) != 1


def cgroup_limit(controller: str, version_1: str, version_2: str) -> int | None:
    """The smallest limit on the way from this process's cgroup up to the root; None: none is set.

    Args:
        controller: of version 1, "memory" or "pids".
        version_1, version_2: the file that holds the limit.
    """
    limits = [
        int(text)
        for folder, file in _cgroup_folders(controller, version_1, version_2)
        if (text := read_text(folder / file).strip()).isdigit()
    ]
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def cgroup_cores() -> float | None:
    """How many cores' time the cgroup grants; None: no limit."""
    shares = []
    for folder, file in _cgroup_folders("cpu", "cpu.cfs_quota_us", "cpu.max"):
        words = read_text(folder / file).split()
        words += [] if file == "cpu.max" else read_text(folder / "cpu.cfs_period_us").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            shares.append(int(words[0]) / int(words[1]))
    return min(shares, default=None)


def _cgroup_folders(controller: str, version_1: str, version_2: str) -> list[tuple[Path, str]]:
    found = []
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots, file = [CGROUP_FOLDER, CGROUP_FOLDER / "unified"], version_2
        elif controller in controllers.split(","):
            roots, file = [CGROUP_FOLDER / controllers, CGROUP_FOLDER / controller], version_1
        else:
            continue
        # In a container the path may be the host's, with nothing of that name here; the root always is.
        inside = Path(path.lstrip("/"))
        for root in roots:
            found += [(root / folder, file) for folder in (inside, *inside.parents)]
    return found


def container() -> str:
    """The kind of container this process is in; "" for none that can be recognised."""
    if Path("/.dockerenv").exists():
        return "Docker"
    if Path("/run/.containerenv").exists():
        return "Podman"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "Kubernetes"
    lines = read_text("/proc/1/environ").split("\0")
    return next((line.removeprefix("container=") for line in lines if line.startswith("container=")), "")
