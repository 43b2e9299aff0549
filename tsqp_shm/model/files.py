"""The one way in which a file of a model folder is read.

A model folder comes from somebody else: under any name there may lie a FIFO that never ends, a device, a folder, a link
to one of these, or a file that fills the memory. Links are followed, because the Hugging Face cache is made of them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from tsqp_shm.errors import ModelFileError
from tsqp_shm.files import open_regular
from tsqp_shm.printable import quoted

# Well above what the largest real one has; a tokenizer.json has below 40 MB.
MAX_CONFIG_BYTES = 4 << 20
MAX_TOKENIZER_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_INDEX_BYTES = 64 << 20


class ModelFiles:
    """The small files of a model folder. A session reads some of them more than once, and some late: whatever it reads
    under a name is what it has read there first, or an error, so that one digest covers all that it has used.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # By name; None: it was not there.
        self._digests: dict[str, str | None] = {}

    @classmethod
    def of(cls, folder: Path | ModelFiles) -> ModelFiles:
        return folder if isinstance(folder, ModelFiles) else cls(folder)

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the folder has the name; see `is_there`.

        Raises:
            ModelFileError: it had not, when it was asked first.
        """
        found = is_there(self.path(name))
        if not found:
            self._require_same(name, None)
        return found

    def read(self, name: str, most_bytes: int) -> bytes:
        """Raises:
        ModelFileError: as `read_file`, or it is not what was read first.
        """
        content = read_file(self.path(name), most_bytes)
        self._require_same(name, hashlib.sha256(content).hexdigest())
        return content

    def digest(self, name: str) -> str | None:
        """The SHA-256 of a file in hexadecimal digits, as it was read first; it is read now where it was not before.
        None: there is none.

        Raises:
            ModelFileError: it cannot be read.
        """
        if name not in self._digests and self.has(name):
            self.read(name, MAX_TOKENIZER_BYTES)
        return self._digests[name]

    def _require_same(self, name: str, digest: str | None) -> None:
        if self._digests.setdefault(name, digest) != digest:
            raise ModelFileError(self.path(name), "is another one than was read before: it changes while it is used")


def is_there(path: Path) -> bool:
    """Whether the folder has the name, whatever it leads to: what is there but cannot be read is never passed over."""
    return os.path.lexists(path)


def open_file(path: Path) -> int:
    """Returns a descriptor of a regular file.

    Raises:
        ModelFileError: there is none, or something else.
    """
    try:
        # Looked at before it is opened, as opening a device may do something; what is opened is looked at again.
        found = path.stat().st_mode
        if not stat.S_ISREG(found):
            kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
            raise ModelFileError(path, f"not a file but {kinds.get(stat.S_IFMT(found), 'a device')}")
        return open_regular(path, follows_links=True)
    except FileNotFoundError as error:
        reason = "a link to nowhere" if is_there(path) else "no such file"
        raise ModelFileError(path, reason) from error
    except (OSError, ValueError) as error:
        raise ModelFileError(path, getattr(error, "strerror", None) or quoted(error)) from error


def read_file(path: Path, most_bytes: int) -> bytes:
    """Returns the content of a regular file.

    Raises:
        ModelFileError: it cannot be read, is no regular file, or larger than allowed.
    """
    with os.fdopen(open_file(path), "rb") as file:
        # Asked of the file before any memory is: what it grows to while it is read is left.
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > most_bytes:
            raise ModelFileError(path, f"larger than {most_bytes:,} bytes, which no such file of a model is")
        try:
            return file.read(size_bytes)
        except OSError as error:
            raise ModelFileError(path, error.strerror or quoted(error)) from error


def as_text(content: bytes, path: Path) -> str:
    """Args:
    path: of the file, for the error.

    Raises:
        ModelFileError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(path, f"not UTF-8: {error.reason} at byte {error.start}") from error
