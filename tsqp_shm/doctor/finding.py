"""What one check found, and the words for quantities."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tsqp_shm.printable import shown

GOOD, WARNING, BAD = "good", "warning", "bad"


@dataclass(frozen=True)
class Finding:
    """One check's result.

    Attributes:
        check: what was looked at.
        verdict: GOOD; WARNING: a session runs, but slower or less protected than it could; BAD: none runs.
        found: what there is.
        why: what follows from it; "" where nothing does.
        cure: what to do; "" where nothing is to be done.
    """

    check: str
    verdict: str
    found: str
    why: str = ""
    cure: str = ""

    def __post_init__(self) -> None:
        # UNTRUSTED: it may quote names, mounts and files that others have made.
        for field in fields(self):
            object.__setattr__(self, field.name, shown(getattr(self, field.name), lines=False))


def mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
