"""Every error this package raises, shaped by what the caller can do about it.

The facts are attributes; the message is built from them. `exit_code` is what the command line ends with.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class TsqpError(Exception):
    """Base of every error raised on purpose by this package."""

    exit_code = 1

    def again(self) -> Self:
        """An equal error without a traceback: one that were raised in two places would keep the frames of both."""
        error = type(self).__new__(type(self), *self.args)
        error.__dict__.update(self.__dict__)
        error.__cause__ = self.__cause__
        return error

    @classmethod
    def relayed(cls, message: str) -> TsqpError:
        """This error as another process of ours printed it: the message alone, without the facts."""
        error = cls.__new__(cls)
        Exception.__init__(error, message.removesuffix(f" {cls.hint()}"))
        return error

    @classmethod
    def entry(cls) -> str:
        """The heading of docs/troubleshooting.md that explains this error, as a link names it."""
        return "-".join(re.findall("[A-Z][a-z]*", cls.__name__)).lower()

    @classmethod
    def hint(cls) -> str:
        """Where to read on, as the command line adds it to the message; "" where the message says all."""
        return "" if cls is TsqpError else f"(see docs/troubleshooting.md#{cls.entry()})"


class ConfigError(TsqpError, ValueError):
    """A value the caller gave cannot be used; fix the call.

    Attributes:
        field: the option, argument or config field, as the caller spells it.
        value: what was given.
        expected: what would be right.
    """

    exit_code = 2

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field, self.value, self.expected = field, value, expected
        super().__init__(f"{field}: got {value!r}, expected {expected}")

    @classmethod
    def hint(cls) -> str:
        return ""


class RequestError(ConfigError):
    """One request is at fault (empty prompt, too long, a token id outside the vocabulary); the LLM stays usable."""

    exit_code = 1


class UnsupportedModel(TsqpError):
    """The checkpoint asks for something this runtime does not do.

    Attributes:
        field: the field of config.json.
        value: what the checkpoint says.
        supported: what is supported instead.
    """

    def __init__(self, field: str, value: object, supported: str) -> None:
        self.field, self.value, self.supported = field, value, supported
        super().__init__(f"unsupported model: {field} = {value!r}; supported: {supported}")


class ModelFileError(TsqpError):
    """A model folder or one of its files is missing, truncated or malformed.

    Attributes:
        path: the file or folder.
        reason: what is wrong with it.
    """

    def __init__(self, path: object, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(f"{path}: {reason}")


class DeviceError(TsqpError):
    """The compute device is not there or cannot hold what is asked of it.

    Attributes:
        device: the device as the caller named it.
        reason: what is wrong.
    """

    def __init__(self, device: str, reason: str) -> None:
        self.device, self.reason = device, reason
        super().__init__(f"device {device}: {reason}")


class ArenaError(TsqpError):
    """The shared-memory arena cannot be made or used.

    Attributes:
        name: the POSIX shared-memory name.
        reason: what is wrong and what to change.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"arena {name}: {reason}")


class ArenaTooSmall(ArenaError):
    """The shared-memory filesystem has no room for the arena.

    Attributes:
        needed_bytes: size of the arena.
        free_bytes: free space of the filesystem.
    """

    def __init__(self, name: str, needed_bytes: int, free_bytes: int, advice: str) -> None:
        self.needed_bytes, self.free_bytes = needed_bytes, free_bytes
        super().__init__(
            name,
            f"needs {needed_bytes:,} bytes of shared memory, {free_bytes:,} are free in /dev/shm; {advice}",
        )


class ArenaNotReady(ArenaError):
    """The arena does not exist yet or is not published yet; wait and retry."""


class ArenaMismatch(ArenaError):
    """The arena was made for something else; do not retry.

    Attributes:
        field: what differs.
        expected: the value of the own plan.
        found: the value in the header.
    """

    def __init__(self, name: str, field: str, expected: object, found: object) -> None:
        self.field, self.expected, self.found = field, expected, found
        super().__init__(name, f"{field} differs: expected {expected}, found {found}")


class SessionFolderError(TsqpError):
    """The folder in which sessions meet cannot be used.

    Attributes:
        path: the folder, or the file in it.
        reason: what the system said.
    """

    def __init__(self, path: object, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(
            f"the session folder cannot be used: {path}: {reason}; "
            "make room there, or set TSQP_SHM_RUNTIME_DIR to a folder that this user can write to"
        )


class LimitError(TsqpError):
    """The system grants this process too little of something.

    Attributes:
        limit: what there is too little of: "file descriptors", "threads", "disk space".
        reason: the figures, and what to change.
    """

    def __init__(self, limit: str, reason: str) -> None:
        self.limit, self.reason = limit, reason
        super().__init__(f"too few {limit}: {reason}" if limit.endswith("s") else f"too little {limit}: {reason}")


class SessionBusy(TsqpError):
    """A live session already has this name.

    Attributes:
        session: its name.
        owner_pid: the pid it wrote, if it could be read.
    """

    def __init__(self, session: str, owner_pid: int | None) -> None:
        self.session, self.owner_pid = session, owner_pid
        owner = f"pid {owner_pid}" if owner_pid else "another process"
        super().__init__(f"session {session!r} is in use by {owner}; stop it or choose another --session NAME")


class SlotOwnershipError(TsqpError):
    """A slot was used while it is handed over to the other side: a bug in the caller.

    Attributes:
        slot: its name.
        operation: the operation it is lent to.
    """

    def __init__(self, slot: str, operation: str) -> None:
        self.slot, self.operation = slot, operation
        super().__init__(f"slot {slot} is handed over to {operation}; wait for its completion first")


class ProtocolError(TsqpError):
    """The peer broke the protocol; the session ends.

    Attributes:
        field: the field of the record or the control page.
        expected: what was allowed.
        found: what came.
    """

    exit_code = 3

    def __init__(self, field: str, expected: object, found: object) -> None:
        self.field, self.expected, self.found = field, expected, found
        super().__init__(f"protocol error from the peer: {field}: expected {expected}, found {found}")


class PeerDied(TsqpError):
    """The other process is gone.

    Attributes:
        role: "gpu" or "tee".
        exit: how it ended ("exit code 1", "signal SIGKILL", "no heartbeat for 0.9 s").
        last_words: the end of what it printed, empty if unknown.
    """

    exit_code = 3

    def __init__(self, role: str, exit: str, last_words: str = "") -> None:
        self.role, self.exit, self.last_words = role, exit, last_words
        # Each line in its name: one that looks like this program's own is seen to be another's.
        quoted = "".join(f"\n{role}: {line}" for line in last_words.splitlines())
        tail = f"; its last words:{quoted}" if quoted else ""
        super().__init__(f"the {role} process died ({exit}){tail}")


class PeerTimeout(TsqpError):
    """The other process is alive but did not do its part before the deadline.

    Attributes:
        operation: what was waited for.
        slot: the slot involved, or "".
        waited_s: how long.
    """

    exit_code = 3

    def __init__(self, operation: str, slot: str, waited_s: float, heartbeat_age_s: float | None) -> None:
        self.operation, self.slot, self.waited_s = operation, slot, waited_s
        where = f" on slot {slot}" if slot else ""
        pulse = "never seen" if heartbeat_age_s is None else f"{heartbeat_age_s:.1f} s ago"
        super().__init__(
            f"timed out after {waited_s:.1f} s waiting for {operation}{where}; the peer's last heartbeat: {pulse}"
        )


class TraceError(TsqpError):
    """A trace cannot be made of what was recorded.

    Attributes:
        path: the trace, or the recording that is at fault.
        reason: what is wrong with it.
    """

    def __init__(self, path: object, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(f"trace {path}: {reason}")


class ContenderFailed(TsqpError):
    """A benchmark's contender cannot run, or did not to the end.

    Attributes:
        contender: its name.
        reason: what is wrong, and what to install if something is missing.
    """

    def __init__(self, contender: str, reason: str) -> None:
        self.contender, self.reason = contender, reason
        super().__init__(f"contender {contender}: {reason}")
