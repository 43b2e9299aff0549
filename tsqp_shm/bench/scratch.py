"""Temporary folders of gigabytes, whose owner may be killed: who makes the next one removes them.

tsqp-shm-shape-XXXXXXXX/
    lock        says what made the folder, and is held while its owner lives
    model/      the owner's
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tsqp_shm.files import open_own, opened_own_folder
from tsqp_shm.shm.posix.locks import try_lock

PREFIX = "tsqp-shm-shape-"
LOCK_FILE = "lock"
_MARK = b"tsqp-shm scratch\n"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is gone after the block, or else after somebody else's block; dead owners' folders go first."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if _is_dead(folder):
                shutil.rmtree(folder)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    fd = None
    try:
        fd = open_own(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        # Before the mark, without which nobody takes the folder for one of these.
        try_lock(fd)
        os.write(fd, _MARK)
        (folder / "model").mkdir()
        yield folder / "model"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if fd is not None:
            os.close(fd)


def _is_dead(folder: Path) -> bool:
    """Whether it is such a folder of this user's that nobody holds."""
    with opened_own_folder(folder) as folder_fd:
        fd = open_own(LOCK_FILE, dir_fd=folder_fd, most_bytes=len(_MARK))
    try:
        return try_lock(fd) and os.read(fd, len(_MARK)) == _MARK
    finally:
        os.close(fd)
