"""What lies under a name where others may lay something: opened without waiting or following a link; whose it is."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tsqp_shm.printable import shown

# Of what `os.open` says where no regular file lies, in words that fit behind a path.
_KINDS = {errno.ELOOP: "is a symbolic link", errno.ENXIO: "is no regular file", errno.EISDIR: "is a folder"}
# As many as Linux follows.
_MAX_LINKS = 40


class ForeignFile(OSError):
    """What has the name is not what this process looks for: a link, a pipe, a device, or another user's."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(errno.EPERM, reason, str(path))


def open_regular(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, dir_fd: int | None = None, follows_links: bool = False
) -> int:
    """A descriptor of a regular file.

    A pipe without a writer or a device would keep an ordinary `open` or `read` waiting; here it is refused at once.

    Args:
        flags: as of `os.open`; a file that is made has mode 0600.
        dir_fd: of the folder that `path` is relative to.
        follows_links: for a path that a person has chosen.

    Raises:
        ForeignFile: something else lies there.
        OSError: as `os.open`.
    """
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follows_links else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in _KINDS and not follows_links:
            raise ForeignFile(path, _KINDS[error.errno]) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ForeignFile(path, "is no regular file")
    return fd


def open_own(
    path: str | os.PathLike[str],
    flags: int = os.O_RDONLY,
    *,
    dir_fd: int | None = None,
    most_bytes: int | None = None,
) -> int:
    """`open_regular` of a file of this user, which holds so much at most.

    Raises:
        ForeignFile: it is none, or another user's, or too large.
        OSError: as `os.open`.
    """
    fd = open_regular(path, flags, dir_fd=dir_fd)
    status = os.fstat(fd)
    reason = ""
    if status.st_uid != os.geteuid():
        reason = f"belongs to user {status.st_uid}, not to user {os.geteuid()}"
    elif most_bytes is not None and status.st_size > most_bytes:
        reason = f"holds {status.st_size:,} bytes, more than the {most_bytes:,} that it may"
    if reason:
        os.close(fd)
        raise ForeignFile(path, reason)
    return fd


def make_file(path: Path) -> int:
    """A descriptor, to write, of a new file of mode 0600 in the place of a file or link that has the name: what was
    there may be another user's, or open to one.

    Raises:
        ForeignFile: what has the name is neither.
        OSError: it cannot be made, or what has the name cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise ForeignFile(path, "is no regular file")
        path.unlink()
    return open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file of mode 0600 in the place of whatever has the name: whoever looks finds one of the two, and whole. A
    process that is killed meanwhile changes nothing of it.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    # Of one process and one name, so that what a killed one left is removed.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with os.fdopen(make_file(part), "wb") as file:
        try:
            file.write(content)
            file.flush()
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def opened_own_folder(folder: Path) -> Iterator[int]:
    """A descriptor of a folder of this user, and of no link to one, for the block.

    Raises:
        ForeignFile: it is another user's.
        OSError: as `os.open`.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise ForeignFile(folder, "belongs to another user")
        yield fd
    finally:
        os.close(fd)


def is_named(path: str | os.PathLike[str], fd: int) -> bool:
    """Whether the open file is still what lies under that name."""
    try:
        named, opened = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return os.path.samestat(named, opened)


def lock_holder(fd: int) -> str:
    """Who holds the lock (`flock`) of a file, as far as the kernel says it to this process."""
    status = os.fstat(fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            # "1: FLOCK ADVISORY WRITE 4711 00:2f:8 0 EOF"; one that waits has "->" behind its number.
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == file and words[4].isdigit() and int(words[4]):
                return f"process {words[4]}{_command(int(words[4]))}"
    return "another process"


def _command(pid: int) -> str:
    try:
        # UNTRUSTED: a process names itself.
        return f" ({shown(Path(f'/proc/{pid}/comm').read_text(errors='replace').strip(), lines=False)})"
    except OSError:
        return ""


def replaceable_part(folder: Path) -> str | None:
    """What is wrong with the first folder or link on the way to a folder, itself included, in the place of which a user
    may put another who is neither this one nor root; None: nothing is.

    Raises:
        OSError: a part does not exist, or cannot be looked at.
    """
    at, ahead, num_links = Path("/"), list(reversed(folder.absolute().parts)), 0
    while ahead:
        # From the root itself on, and past links by hand, so that no folder is left out in which one lies.
        at = Path(os.path.normpath(at / ahead.pop()))
        status = at.lstat()
        is_link = stat.S_ISLNK(status.st_mode)
        is_open = not is_link and status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (os.geteuid(), 0) or is_open:
            return f"{at} is of user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"
        if is_link:
            num_links += 1
            if num_links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
            ahead += reversed(at.readlink().parts)
            at = at.parent
    return None
