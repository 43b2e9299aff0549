"""The seam between a session and what carries it: memory, a waker, a rendezvous and a lock.

Neither role names a transport: whoever starts one hands it in. `shm/posix/` joins two processes of one user on one
system, `shm/local.py` two threads of one process. What differs between transports stands behind the four protocols
here: how memory is made and mapped, what wakes a sleeper, where the two sides meet, and what keeps a name to one TEE.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tsqp_shm.errors import TsqpError


@dataclass(frozen=True)
class Residency:
    """How the memory's pages are held, for the bring-up report.

    Attributes:
        pages: number of 4 KiB pages, all of them backed and mapped.
        locked: kept from being swapped.
        locked_reason: why not, or "".
    """

    pages: int
    locked: bool
    locked_reason: str


class Memory(Protocol):
    """One side's mapping of the bytes that both sides share.

    Attributes:
        name: as it is shown in errors and in the bring-up report.
        buffer: the mapping, page-aligned; at least as long as was asked for.
        residency: how its pages are held.
    """

    @property
    def name(self) -> str: ...
    @property
    def buffer(self) -> mmap.mmap: ...
    @property
    def residency(self) -> Residency: ...

    def close(self) -> None:
        """Unmaps, and removes it where this side made it. Closing twice does nothing."""


class Waker(Protocol):
    """One end of a bounded stream of bytes: wakes the other side, and carries records where the doorbell wants it.

    UNTRUSTED: whatever comes out of it. However much the other side sends, an end holds less than a megabyte of it.
    """

    def try_send(self, record: bytes) -> bool:
        """Sends 64 bytes without waiting; False: nobody is there yet, or the stream is full."""

    def wait(self, timeout_ns: int) -> bool:
        """Sleeps until something is there, so long at most. Returns whether there is."""

    def receive(self, timeout_ns: int) -> bytes | None:
        """The next 64 bytes, waiting for them so long at most."""

    def discard(self) -> None:
        """Drops what came: it has done its work by waking this side."""

    def stranger(self) -> TsqpError | None:
        """Where this end has reached somebody who has not proved to be of the session: the error that says so."""

    def close(self, linger_ms: int = 0) -> None:
        """Closes the end; what was sent and has not left gets so long to do so."""


class Hold(Protocol):
    """The TEE's side of a session: its name, taken so that no other TEE has it, until `end`.

    One memory at a time, several one after the other: a GPU process that takes another's place gets a new one.

    Attributes:
        name: the session's, as a GPU process is told it.
        gpu_flags: the words by which `tsqp-shm gpu MODEL` finds this session; none where no other process can.
        endpoint: where the waker of the memory made last meets, as the invitation says it; "" where that is not said.
        folder: of the session, in which it may lay what this user's processes alone are to find; None: it has none.
    """

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def gpu_flags(self) -> tuple[str, ...]: ...
    @property
    def endpoint(self) -> str: ...

    def create_memory(self, size_bytes: int) -> Memory:
        """Memory of so many bytes at least, whose header says "not published".

        Raises:
            ArenaError: there is no room for it, or the system refuses.
        """

    def open_waker(self) -> Waker:
        """The TEE's end of the waker that belongs to the memory made last.

        Raises:
            ConfigError: the endpoint cannot be used.
        """

    def end(self) -> None:
        """Lets go of the name, and of whatever of the session is left. Ending twice does nothing."""


class Joined(Protocol):
    """The GPU process's side of a session that it has found alive.

    Attributes:
        name: of its memory, for errors.
        invitation: a private copy of what the TEE has put into the header page.
    """

    @property
    def name(self) -> str: ...
    @property
    def invitation(self) -> bytes: ...

    def map_memory(self, size_bytes: int) -> Memory:
        """The memory in which the invitation was found, of exactly this size where it has one.

        Raises:
            ArenaMismatch: it has another size.
        """

    def open_waker(self, endpoint: str) -> Waker:
        """The GPU process's end of the waker.

        Args:
            endpoint: what the invitation says of it.

        Raises:
            ConfigError: the endpoint cannot be used.
        """

    def close(self) -> None:
        """Lets go of what was held to join; memory and waker stay. Closing twice does nothing."""


class Glance(Protocol):
    """A look at a session from outside: it can change nothing, and holds up nobody."""

    def read(self) -> bytes:
        """A copy of header page, control page and rings as they are now. UNTRUSTED: for display only."""

    @property
    def is_gone(self) -> bool:
        """Whether what is looked at has ended; the session may have other memory by now."""

    def close(self) -> None: ...


class Transport(Protocol):
    """Carries sessions of one name; both sides of a session are made from transports that agree on it."""

    def begin(self) -> Hold:
        """Takes the name for a TEE.

        Raises:
            SessionBusy: a live TEE has it.
            TsqpError: what is needed for it cannot be had.
        """

    def join(self, timeout_s: float, notify: Callable[[str], None]) -> Joined:
        """Waits until a TEE has published a header there and its heartbeat moves; a dead one's is not taken.

        Args:
            notify: told once what is waited for, if it is not there at once.

        Raises:
            ArenaNotReady: no TEE was there in time.
            ArenaMismatch: the TEE's layout is another version's.
        """

    def glance(self) -> Glance:
        """A look from outside.

        Raises:
            ArenaNotReady: there is no memory, not yet or not any more.
        """


class Registration(Protocol):
    """The hold of a TEE that has no other side: its name, and a page for whoever looks at it from outside.

    Attributes:
        name: the session's.
    """

    @property
    def name(self) -> str: ...

    def publish(self, invitation: bytes) -> None:
        """Makes the page: what the header page of an arena would hold, and no progress yet.

        Raises:
            TsqpError: it cannot be made.
        """

    def tell(self, progress: bytes) -> None:
        """Writes how far the session is, as `Progress.pack` gives it."""

    def end(self) -> None:
        """Lets go of the name, and removes the page. Ending twice does nothing."""


@runtime_checkable
class Register(Protocol):
    """Where a session without another side is known by its name; in the place of a transport, as nothing is carried."""

    def register(self) -> Registration:
        """Takes the name.

        Raises:
            As `Transport.begin`.
        """
