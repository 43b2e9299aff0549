"""How the GPU process finds a TEE that lives: a published header, and a heartbeat beside it that moves."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from tsqp_shm import _native
from tsqp_shm.errors import ArenaMismatch, ArenaNotReady
from tsqp_shm.shm import layout
from tsqp_shm.shm.invitation import take_invitation

LOOK_INTERVAL_S = 0.02


class Candidate(Protocol):
    """Memory that may be a session's, of which header, control page and rings are mapped."""

    @property
    def name(self) -> str: ...
    @property
    def buffer(self) -> mmap.mmap: ...

    @property
    def is_gone(self) -> bool:
        """Whether no session begins in it any more, so that another has to be found."""

    def close(self) -> None: ...


Found = TypeVar("Found", bound=Candidate)


@dataclass(frozen=True)
class Sought:
    """What is waited for, in the words of who waits.

    Attributes:
        memory: its name.
        whom: "the TEE process of session 'x'".
        absence: "no TEE process began session 'x'".
        advice: what begins such a session.
    """

    memory: str
    whom: str
    absence: str
    advice: str


class _Sight(NamedTuple):
    """What one look at a published header found."""

    version: int
    epoch: int
    beat: int


def wait_for_tee(
    find: Callable[[], Found | None], sought: Sought, timeout_s: float, notify: Callable[[str], None]
) -> tuple[Found, bytes]:
    """Waits until a TEE that lives has published its header.

    A header alone proves nothing: one whose TEE was killed lies there until somebody removes it, in a device for ever.
    So it is taken only where the heartbeat changes between two looks at one epoch.

    Args:
        find: opens memory that may be the session's; None: there is none yet.
        notify: told once what is waited for, if no header is there at the first look.

    Returns:
        The memory, which is the caller's to close, and a private copy of the invitation in it.

    Raises:
        ArenaNotReady: no TEE was there in time.
        ArenaMismatch: the TEE's layout is another version's.
        ProtocolError: the memory was cut short meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    watched: _Watched[Found] | None = None
    told = False
    try:
        while True:
            if watched is not None and watched.candidate.is_gone:
                watched.close()
                watched = None
            if watched is None and (candidate := find()) is not None:
                watched = _Watched(candidate)
            if watched is not None and watched.is_alive():
                taken, invitation = watched.take()
                watched = None
                return taken, invitation
            is_published = watched is not None and watched.is_published
            if time.monotonic() > deadline:
                dead = "what is published there has no heartbeat; " if is_published else ""
                raise ArenaNotReady(sought.memory, f"{sought.absence} within {timeout_s:.0f} s; {dead}{sought.advice}")
            if not is_published and not told:
                notify(f"waiting up to {timeout_s:.0f} s for {sought.whom}")
                told = True
            time.sleep(LOOK_INTERVAL_S)
    finally:
        if watched is not None:
            watched.close()


class _Watched(Generic[Found]):
    """A candidate, and what the look before found in it."""

    def __init__(self, candidate: Found) -> None:
        self.candidate = candidate
        self._before: _Sight | None = None
        # Whoever may open the object may truncate it; then the next look raises ProtocolError.
        self._guard = _native.ArenaGuard(candidate.buffer)

    @property
    def is_published(self) -> bool:
        """Whether the look before found a header."""
        return self._before is not None

    def is_alive(self) -> bool:
        """Looks once more. Returns whether the heartbeat has moved meanwhile."""
        before, self._before = self._before, self._look()
        if before is None or self._before is None:
            return False
        return before._replace(beat=self._before.beat) == self._before and before.beat != self._before.beat

    def _look(self) -> _Sight | None:
        # UNTRUSTED: each word is read once and only compared.
        # SYNC POINT: load_word acquires; pairs with the release store of the version in `Arena.publish`.
        header = self.candidate
        version = _native.load_word(header.buffer, layout.HEADER_VERSION_OFFSET_BYTES)
        if version == 0:
            return None
        epoch = _native.load_word(header.buffer, layout.HEADER_EPOCH_OFFSET_BYTES)
        return _Sight(version, epoch, _native.load_word(header.buffer, layout.TEE_HEARTBEAT_OFFSET_BYTES))

    def take(self) -> tuple[Found, bytes]:
        """Hands the candidate over, with a copy of the invitation.

        Raises:
            ArenaMismatch: the layout is another version's.
        """
        version = self._before.version if self._before else 0
        if version != layout.VERSION:
            raise ArenaMismatch(self.candidate.name, "layout version", layout.VERSION, version)
        invitation = take_invitation(self.candidate)
        self._guard.release()
        return self.candidate, invitation

    def close(self) -> None:
        self._guard.release()
        self.candidate.close()
