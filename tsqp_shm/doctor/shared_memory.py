"""/dev/shm against what an arena needs, memory locks and huge pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from tsqp_shm.doctor.finding import BAD, GOOD, WARNING, Finding, mib
from tsqp_shm.doctor.system import has_swap, read_text
from tsqp_shm.roles.resources import lockable_bytes
from tsqp_shm.shm.posix.objects import SHM_FOLDER

CHECK = "shared memory"
# What Docker gives a container that asks for nothing; less than the default arena of all but the smallest models.
USUAL_CONTAINER_BYTES = 64 << 20
REMOUNT = f"docker run --shm-size, or mount -o remount,size=SIZE {SHM_FOLDER}"


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mounts."""

    kind: str
    options: tuple[str, ...]


def examine_shared_memory(arena_bytes: int | None) -> Iterator[Finding]:
    """Args:
    arena_bytes: what the arena of the session in question takes; None: not known.
    """
    yield _filesystem(arena_bytes)
    yield _memory_lock(arena_bytes)
    yield _huge_pages()


def _filesystem(arena_bytes: int | None) -> Finding:
    mount = mount_of(SHM_FOLDER)
    try:
        status = os.statvfs(SHM_FOLDER)
    except OSError as error:
        return Finding(
            CHECK, BAD, f"{SHM_FOLDER}: {error.strerror}", "the arena lies there",
            f"mkdir -p {SHM_FOLDER} && mount -t tmpfs -o mode=1777 tmpfs {SHM_FOLDER}",
        )  # fmt: skip
    if mount is None or mount.kind != "tmpfs":
        kind = mount.kind if mount else "no filesystem of its own"
        return Finding(
            CHECK, WARNING, f"{SHM_FOLDER} is {kind}, not tmpfs", "pages of the arena may be written to a disk",
            f"mount -t tmpfs -o mode=1777 tmpfs {SHM_FOLDER}",
        )  # fmt: skip
    if status.f_flag & os.ST_RDONLY:
        remedy = f"mount -o remount,rw {SHM_FOLDER}"
        return Finding(CHECK, BAD, f"{SHM_FOLDER} is read-only", "no arena can be made", remedy)
    if not os.access(SHM_FOLDER, os.W_OK | os.X_OK):
        found = f"{SHM_FOLDER} may not be written by user {os.geteuid()}"
        return Finding(CHECK, BAD, found, "no arena can be made", f"chmod 1777 {SHM_FOLDER}")
    if status.f_files and not status.f_favail:
        remedy = f"remove files there, or mount -o remount,nr_inodes=0 {SHM_FOLDER}"
        return Finding(CHECK, BAD, f"{SHM_FOLDER} takes no more files", "no arena can be made", remedy)
    return _room(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize, arena_bytes)


def _room(size_bytes: int, free_bytes: int, arena_bytes: int | None) -> Finding:
    found = f"{SHM_FOLDER}: {mib(free_bytes)} of {mib(size_bytes)} free"
    if arena_bytes is None:
        if free_bytes > USUAL_CONTAINER_BYTES:
            return Finding(CHECK, GOOD, found)
        why = "that is enough for small models only; `tsqp-shm doctor MODEL` says what yours needs"
        return Finding(CHECK, WARNING, found, why, REMOUNT)
    found += f", the arena takes {mib(arena_bytes)}"
    if arena_bytes <= free_bytes:
        return Finding(CHECK, GOOD, found)
    return Finding(
        CHECK, BAD, found, "the arena does not fit",
        f"lower --max-model-len, --max-batch-tokens or --tiles-in-flight; or {REMOUNT}",
    )  # fmt: skip


def _memory_lock(arena_bytes: int | None) -> Finding:
    limit_bytes = lockable_bytes()
    if limit_bytes is None:
        return Finding("memory lock", GOOD, "no limit for this user: the arena is locked")
    found = f"at most {mib(limit_bytes)} may be locked"
    if arena_bytes is not None and arena_bytes <= limit_bytes:
        return Finding("memory lock", GOOD, f"{found}, the arena takes {mib(arena_bytes)}")
    if not has_swap():
        return Finding("memory lock", GOOD, f"{found}; there is no swap, so nothing is swapped out in any case")
    if arena_bytes is not None:
        found += f", the arena takes {mib(arena_bytes)}"
    why = "an arena that is not locked may be swapped out: hidden states on a disk, and slow the next time"
    return Finding(
        "memory lock", WARNING, found, why, "ulimit -l unlimited, LimitMEMLOCK=infinity or --ulimit memlock=-1"
    )


def _huge_pages() -> Finding:
    mount = mount_of(SHM_FOLDER)
    asked = [option for option in mount.options if option.startswith("huge=")] if mount else []
    setting = read_text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = setting[setting.find("[") + 1 : setting.find("]")] if "[" in setting else "unknown"
    if chosen in ("force", "always") or (asked and asked[0] != "huge=never" and chosen != "deny"):
        return Finding("huge pages", GOOD, f"on for shared memory ({', '.join([*asked, f'shmem_enabled {chosen}'])})")
    return Finding(
        "huge pages", GOOD, f"off for shared memory (shmem_enabled {chosen}); the arena has pages of 4 KiB",
        "nothing needs them; larger pages take fewer entries of the TLB",
        f"to try them: mount -o remount,huge=within_size {SHM_FOLDER}",
    )  # fmt: skip


def mount_of(path: str) -> Mount | None:
    """The filesystem mounted at `path` itself; the last one, where several lie on each other."""
    found = None
    for line in read_text("/proc/self/mounts").splitlines():
        words = line.split()
        if len(words) > 3 and words[1] == path:
            found = Mount(words[2], tuple(words[3].split(",")))
    return found
