"""Sessions without another side: known by a name in the folder of sessions, and seen by a page that lies there.

    FOLDER/NAME/page    header and control page as an arena has them: what the session is, and how far

A regular file and no shared memory: nobody maps it, so that neither /dev/shm nor a lock on memory is needed, and who
cuts it short disturbs nobody.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tsqp_shm.files import open_own, opened_own_folder
from tsqp_shm.forks import leave_in_children
from tsqp_shm.shm import layout
from tsqp_shm.shm.invitation import page_with
from tsqp_shm.shm.posix.folder import PAGE_FILE, storing
from tsqp_shm.shm.posix.held_name import HeldName


class PosixRegister:
    """Args:
    session: its name; None: a new one.
    """

    def __init__(self, session: str | None = None) -> None:
        self._session = session

    def register(self) -> PosixRegistration:
        return PosixRegistration(HeldName.take(self._session))


class PosixRegistration:
    """A name and a page; `shm.transport.Registration` says what the methods do."""

    def __init__(self, held: HeldName) -> None:
        self.name = held.name
        self._held = held
        self._path = held.folder / PAGE_FILE
        self._fd: int | None = None
        leave_in_children(self)

    def publish(self, invitation: bytes) -> None:
        page = page_with(str(self._path), invitation)
        start = layout.HEADER_VERSION_OFFSET_BYTES
        with storing(self._path):
            self._fd = open_own(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            # Or a full disk would show in the middle of a session.
            os.posix_fallocate(self._fd, 0, len(page))
            # The version last, as in an arena: who looks sees "not ready" or a whole header.
            os.pwrite(self._fd, page[:start] + bytes(8) + page[start + 8 :], 0)
            os.pwrite(self._fd, page[start : start + 8], start)

    def tell(self, progress: bytes) -> None:
        # For display only: a step does not fail because it cannot be shown.
        with suppress(OSError):
            if self._fd is not None:
                os.pwrite(self._fd, progress, layout.PROGRESS_OFFSET_BYTES)

    def end(self) -> None:
        self._close()
        self._held.let_go()

    def leave_to_parent(self) -> None:
        """In a forked child, which is not the session's: it writes no progress of its own."""
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None


class PageGlance:
    """A look at a page through a read-only descriptor."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        OSError: there is none.
        """
        with opened_own_folder(folder) as folder_fd:
            self._fd = open_own(PAGE_FILE, dir_fd=folder_fd, most_bytes=layout.SUBMISSION_RING_OFFSET_BYTES)

    def read(self) -> bytes:
        # UNTRUSTED: for display only.
        return os.pread(self._fd, layout.SUBMISSION_RING_OFFSET_BYTES, 0).ljust(layout.SLOTS_OFFSET_BYTES, b"\0")

    @property
    def is_gone(self) -> bool:
        return os.fstat(self._fd).st_nlink == 0

    def close(self) -> None:
        os.close(self._fd)
