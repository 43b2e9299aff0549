"""Every error this package raises, shaped by what the caller can do about it.

The facts are attributes; the message is built from them. `exit_code` is what the command line ends with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

# What an error shows and keeps of a value; a path has its place.
_MOST_CHARACTERS = 1000
_MOST_ITEMS = 8
_MOST_INTEGER = 10**20


class ForeignCause(Exception):
    """What an error of this package was raised from in another process, as text."""


class TsqpError(Exception):
    """Base of every error raised on purpose by this package.

    Pickle and copy give an equal one: class, message, attributes, notes. A cause that is not of this package crosses
    to another process as its text, as it may be of a class that does not.
    """

    exit_code = 1

    def again(self) -> Self:
        """An equal error without a traceback: one that were raised in two places would keep the frames of both."""
        error: Self = _made_again(type(self), self.args, self.__dict__, self.__cause__)
        return error

    # Not by calling the class, as exceptions do: it takes the facts, and `args` holds the message.
    def __reduce__(self) -> tuple[Any, ...]:
        cause = self.__cause__
        if cause is not None and not isinstance(cause, (TsqpError, ForeignCause)):
            cause = ForeignCause(f"{type(cause).__name__}: {_text(cause)}")
        return _made_again, (type(self), self.args, self.__dict__, cause)

    def __copy__(self) -> Self:
        return self.again()

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
        value: what was given; a description of it where it is no plain value.
        expected: what would be right.

    Example:
        >>> SamplingParams(top_p=2)
        Traceback (most recent call last):
        tsqp_shm.errors.ConfigError: top_p: got 2.0, expected a number, more than 0, at most 1
    """

    exit_code = 2

    def __init__(self, field: str, value: object, expected: str, *, is_mistyped: bool = False) -> None:
        self.field, self.value, self.expected = field, _fact(value), expected
        given = described(value)
        kind = type(value).__name__
        if is_mistyped and kind not in given:
            given += f" ({kind})"
        super().__init__(f"{field}: got {given}, expected {expected}")

    @classmethod
    def hint(cls) -> str:
        return ""


class RequestError(ConfigError):
    """One request is at fault (empty prompt, too long, a token id outside the vocabulary); the LLM stays usable.

    Example:
        >>> llm.generate([[5, 99999]])
        Traceback (most recent call last):
        tsqp_shm.errors.RequestError: prompts[0]: token 1: got 99999, expected a token id, 0 to 49151
    """

    exit_code = 1


class UnsupportedModel(TsqpError):
    """The checkpoint asks for something this runtime does not do.

    Attributes:
        field: the field of config.json.
        value: what the checkpoint says.
        supported: what is supported instead.
    """

    def __init__(self, field: str, value: object, supported: str) -> None:
        self.field, self.value, self.supported = field, _fact(value), supported
        super().__init__(f"unsupported model: {field} = {described(value)}; supported: {supported}")


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
        reason: what the system said, or who is in the way.
    """

    def __init__(
        self,
        path: object,
        reason: str,
        advice: str = "make room there, or set TSQP_SHM_RUNTIME_DIR to a folder that this user can write to",
    ) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(f"the session folder cannot be used: {path}: {reason}; {advice}")


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


class NumericsError(TsqpError):
    """A request's numbers are no numbers any more: an overflow of this model on this input. Others are not concerned.

    Attributes:
        where: what was looked at.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        super().__init__(f"{where} of this request are NaN or infinity: the model overflows on this input")


class IntegrityError(TsqpError):
    """The other process gave a result that is not the product of this model's weights; the session ends.

    No token of the pass in which it was found came out. How far it was off, in which row and what was asked, the error
    does not know: it is to be seen by whoever gave the result.

    Attributes:
        operation: the Linear, by its role ("qkv", "o", "gate_up", "down", "lm_head").
        layer: of the network; None for what belongs to no layer.
    """

    exit_code = 4

    def __init__(self, operation: str, layer: int | None) -> None:
        self.operation, self.layer = operation, layer
        where = operation if layer is None else f"{operation} of layer {layer}"
        super().__init__(f"a result of the gpu process is false: {where}")


class PadsExhausted(TsqpError):
    """There is no pad for what a request would send to the GPU process, and it is not to be computed here.

    Attributes:
        needed: rows.
        available: rows that there are pads for.
    """

    def __init__(self, needed: int, available: int, reason: str = "") -> None:
        self.needed, self.available = needed, available
        why = f" ({reason})" if reason else ""
        super().__init__(
            f"pads are needed for {needed} rows, and there are {available}{why}; raise --pad-stock or --pad-threads, "
            "or have the TEE compute what has none by --pads-out tee"
        )


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
        answered: where it is a step that took too long, how many of its operations were answered, and of how many asked
            by then.
    """

    exit_code = 3

    def __init__(
        self,
        operation: str,
        slot: str,
        waited_s: float,
        heartbeat_age_s: float | None,
        answered: tuple[int, int] | None = None,
    ) -> None:
        self.operation, self.slot, self.waited_s, self.answered = operation, slot, waited_s, answered
        where = f" on slot {slot}" if slot else ""
        pulse = "never seen" if heartbeat_age_s is None else f"{heartbeat_age_s:.1f} s ago"
        step = advice = ""
        if answered is not None:
            step = " in one step, {} of {} operations answered,".format(*answered)
            advice = "; raise --timeout, or lower --max-batch-tokens"
        super().__init__(
            f"timed out after {waited_s:.1f} s{step} waiting for {operation}{where}; "
            f"the peer's last heartbeat: {pulse}{advice}"
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


class EvidenceError(TsqpError):
    """Evidence, a transcript or the nonces of one cannot be written, or are not what they should be.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: object, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(f"{path}: {reason}")


class ContenderFailed(TsqpError):
    """A benchmark's contender cannot run, or did not to the end.

    Attributes:
        contender: its name.
        reason: what is wrong, and what to install if something is missing.
    """

    def __init__(self, contender: str, reason: str) -> None:
        self.contender, self.reason = contender, reason
        super().__init__(f"contender {contender}: {reason}")


def described(value: object) -> str:
    """A value in a few words on one line: itself where it is a plain and small one, else of which type it is."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        # One of thousands of digits cannot even be printed.
        return str(int(value)) if abs(value) < _MOST_INTEGER else f"an int of {int(value).bit_length()} bits"
    if isinstance(value, str):
        shown = repr(str.__str__(value[:_MOST_CHARACTERS]))
        return shown if len(value) <= _MOST_CHARACTERS else f"{shown[:-1]}...{shown[-1]}"
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple) and _are_few_and_plain(value):
        return repr(value)
    kind = type(value).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    if isinstance(value, (list, tuple, set, frozenset, dict, bytes)):
        return f"{article} {kind} of {len(value)}"
    return f"{article} {kind}"


def _fact(value: object) -> object:
    """A value as an error may hold it: nothing large, nothing that changes or that cannot cross to another process."""
    if isinstance(value, tuple) and type(value) is tuple and _are_few_and_plain(value):
        return value
    return value if _is_plain(value) else described(value)


def _are_few_and_plain(values: Sequence[object]) -> bool:
    return len(values) <= _MOST_ITEMS and all(_is_plain(value) for value in values)


def _is_plain(value: object) -> bool:
    if type(value) is int:
        return abs(value) < _MOST_INTEGER
    if type(value) is str:
        return len(value) <= _MOST_CHARACTERS
    return value is None or type(value) in (bool, float)


def _made_again(kind: type[Any], args: tuple[Any, ...], facts: Mapping[str, Any], cause: BaseException | None) -> Any:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    if "__notes__" in facts:
        # Or a note on one were a note on the other.
        error.__notes__ = list(facts["__notes__"])
    if cause is not None:
        # None as well would hide what is being handled where the error is raised next.
        error.__cause__ = cause
    return error


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""
