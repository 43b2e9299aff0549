"""What one process did and when: slices of time in a bounded private buffer, written out whole at the end.

Both processes stamp with `time.perf_counter_ns`, which on Linux is CLOCK_MONOTONIC: one clock for all processes of a
host, so two recordings of one host lie on one time line as they are.

A recording is fixed binary records and not JSON: a role writes it in a moment when it ends, and whoever puts two
together checks numbers and does not parse what the GPU process wrote.

    byte 0     magic, role, pid, names, slots, linears, events, dropped, least_wait_ns      (`_HEADER`)
    byte 56    of each kind of wait those that were left out: how many, and their time      (`_LEFT_OUT`)
    byte 136   names of slices, then of slots                       24 bytes of ASCII each, padded with zeros
    then       the network's Linears by their index: name, layer, or all ones
    then       events: begin_ns, end_ns, name, and the first 40 bytes of the doorbell's record it belongs to, or zeros
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tsqp_shm.config import require_range
from tsqp_shm.errors import ConfigError, TraceError
from tsqp_shm.files import open_regular
from tsqp_shm.shm.plan import MAX_LINEARS, Operation, Plan

# 32 MiB, of which the system backs what is used: some 900 tokens of a decode of 30 layers.
CAPACITY = 1 << 19
# A day.
MOST_LEAST_WAIT_US = 86_400_000_000
ROLES = {"tee": 1, "gpu": 2}
NO_RECORD = b""

# `nap` lies between two waits, the others within one.
WAITS = ("wait", "nap", "spin", "yield", "park")

_MAGIC = b"TSQPTRC3"
_HEADER = struct.Struct("<8sIIIII4xQQQ")
_LEFT_OUT = struct.Struct(f"<{2 * len(WAITS)}Q")
_NAMES_BYTE = _HEADER.size + _LEFT_OUT.size
_LINEAR = struct.Struct("<24sI")
_NO_LAYER = 0xFFFFFFFF
_EVENT = struct.Struct("<QQII40s")
_DOORBELL = struct.Struct("<QQHHHHIIII")
_NAME_BYTES = 24
_NAME = re.compile(rb"([A-Za-z0-9_. -]{1,24})\0*")
_MAX_NAMES = 4096


class Event(NamedTuple):
    """One slice of time. Of the doorbell's record it belongs to: sequence 0 where there is none."""

    begin_ns: int
    end_ns: int
    name: str
    sequence: int
    epoch: int
    opcode: int
    target: int
    in_slot: int
    out_slot: int
    first_row: int
    rows: int
    first_segment: int
    num_segments: int


class LeftOut(NamedTuple):
    """Waits of one kind that were too short to be recorded. Units: nanoseconds, all of them together."""

    num_waits: int
    time_ns: int


class Recorder:
    """Takes slices until its buffer is full; those that come later are counted.

    Args:
        least_wait_ns: waits that are shorter are counted and summed up, and not recorded.

    Attributes:
        dropped: slices for which there was no room.
        rung: the record that was rung last; what this process computes itself comes after it.
    """

    def __init__(self, role: str, capacity: int = CAPACITY, least_wait_ns: int = 0) -> None:
        self.role = role
        self.dropped = 0
        self._least_wait_ns = least_wait_ns
        self._left_out = dict.fromkeys(WAITS, LeftOut(0, 0))
        self.rung = NO_RECORD
        self._slot_names: Sequence[str] = ()
        self._linears: Sequence[Operation] = ()
        self._buffer = bytearray(capacity * _EVENT.size)
        self._used_bytes = 0
        self._names: dict[str, int] = {}

    def describe(self, plan: Plan) -> None:
        """Takes the names of what records hold the numbers of."""
        self._slot_names = [slot.name for slot in plan.slots]
        self._linears = plan.linear_operations

    def slice(self, name: str, begin_ns: int, end_ns: int, record: bytes = NO_RECORD) -> None:
        """Records one slice.

        Args:
            record: the doorbell's record it belongs to.

        Units: nanoseconds of `time.perf_counter_ns`.
        """
        used_bytes = self._used_bytes
        if used_bytes == len(self._buffer):
            self.dropped += 1
            return
        index = self._names.setdefault(name, len(self._names))
        # Of the record's 64 bytes the packing takes the first 40.
        _EVENT.pack_into(self._buffer, used_bytes, begin_ns, end_ns, index, 0, record)
        self._used_bytes = used_bytes + _EVENT.size

    def wait(self, kind: str, begin_ns: int, end_ns: int, record: bytes = NO_RECORD) -> None:
        """Records one slice in which this process waited, of one of `WAITS`, unless it is too short."""
        if end_ns - begin_ns >= self._least_wait_ns:
            self.slice(kind, begin_ns, end_ns, record)
        else:
            num_waits, time_ns = self._left_out[kind]
            self._left_out[kind] = LeftOut(num_waits + 1, time_ns + end_ns - begin_ns)

    def write(self, out: BinaryIO) -> None:
        """Writes it whole or, where nothing was recorded, not at all.

        A signal that is to end this process does not cut it short: a role told to stop gets one as a rule.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self._write(out)
        except (SystemExit, KeyboardInterrupt):
            out.seek(0)
            self._write(out)
            raise

    def _write(self, out: BinaryIO) -> None:
        if not self._used_bytes:
            return
        names = [name.encode().ljust(_NAME_BYTES, b"\0") for name in (*self._names, *self._slot_names)]
        linears = [_LINEAR.pack(name.encode(), _NO_LAYER if layer is None else layer) for name, layer in self._linears]
        events = self._used_bytes // _EVENT.size
        counts = len(self._names), len(self._slot_names), len(linears), events, self.dropped, self._least_wait_ns
        header = _HEADER.pack(_MAGIC, ROLES[self.role], os.getpid(), *counts)
        header += _LEFT_OUT.pack(*(number for left_out in self._left_out.values() for number in left_out))
        header += b"".join([*names, *linears])
        for part in (header, memoryview(self._buffer)[: self._used_bytes]):
            out.write(part)
        out.flush()


def require_least_wait(path: Path | None, least_wait_us: int) -> None:
    """Raises:
    ConfigError: the shortest wait to be recorded is none, or nothing is recorded.
    """
    require_range("trace_min_wait_us", least_wait_us, 0, MOST_LEAST_WAIT_US)
    if least_wait_us and path is None:
        raise ConfigError("trace_min_wait_us", least_wait_us, "a trace that waits are to be left out of")


@contextmanager
def recording(path: Path | None, role: str, least_wait_us: int = 0) -> Iterator[Recorder | None]:
    """A recorder for the block, written to `path` when it is left, however it is left; None where nothing is asked for.

    Args:
        least_wait_us: as `Recorder`'s.

    Raises:
        ConfigError: the file cannot be written, or `require_least_wait` says so; before the block.
        TraceError: the disk is full; after it.
    """
    require_least_wait(path, least_wait_us)
    if path is None:
        yield None
        return
    with _open(path) as file:
        recorder = Recorder(role, least_wait_ns=1000 * least_wait_us)
        try:
            yield recorder
        except BaseException:
            with suppress(OSError):
                recorder.write(file)
            raise
        try:
            recorder.write(file)
        except OSError as error:
            raise TraceError(path, f"cannot be written: {error.strerror}") from error


def _open(path: Path) -> BinaryIO:
    try:
        return os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, follows_links=True), "wb")
    except OSError as error:
        raise ConfigError("trace", str(path), f"a file that can be written ({error.strerror})") from None


@dataclass(frozen=True)
class Recording:
    """What one role wrote, checked.

    Attributes:
        dropped: slices for which its buffer had no room.
        least_wait_ns: waits that were shorter are in `left_out`, by their kind, and not among the events.
    """

    role: str
    pid: int
    dropped: int
    least_wait_ns: int
    left_out: dict[str, LeftOut]
    slot_names: tuple[str, ...]
    linears: tuple[Operation, ...]
    events: list[Event]

    @classmethod
    def read(cls, path: Path) -> Recording:
        """UNTRUSTED: the GPU process may have written anything: the size is looked at before the bytes, names are of a
        few plain characters, all else is a number.

        Raises:
            TraceError: there is no such file, or it is not a recording.
        """
        most_bytes = _NAMES_BYTE + 2 * _MAX_NAMES * _NAME_BYTES + MAX_LINEARS * _LINEAR.size + CAPACITY * _EVENT.size
        try:
            with os.fdopen(open_regular(path, follows_links=True), "rb") as file:
                content = file.read(most_bytes + 1)
        except OSError as error:
            raise TraceError(path, f"cannot be read: {error.strerror}") from None
        if not content:
            raise TraceError(path, "is empty: the process that was to write it did nothing, or did not get to its end")
        if len(content) > most_bytes:
            raise TraceError(path, f"holds more than the {most_bytes:,} bytes of a recording; it is not read")
        if len(content) < _NAMES_BYTE or not content.startswith(_MAGIC):
            raise TraceError(path, "is not a recording of tsqp-shm")
        _, role, pid, names, slots, linears, events, dropped, least_wait_ns = _HEADER.unpack_from(content)
        numbers = _LEFT_OUT.unpack_from(content, _HEADER.size)
        left_out = {kind: LeftOut(*numbers[2 * place : 2 * place + 2]) for place, kind in enumerate(WAITS)}
        roles = {number: name for name, number in ROLES.items()}
        first_linear = _NAMES_BYTE + (names + slots) * _NAME_BYTES
        first_event = first_linear + linears * _LINEAR.size
        expected_bytes = first_event + events * _EVENT.size
        is_bounded = max(names, slots) <= _MAX_NAMES and linears <= MAX_LINEARS
        if role not in roles or len(content) != expected_bytes or not is_bounded:
            raise TraceError(path, "is not a whole recording")
        labels = [_name(path, content, _NAMES_BYTE + index * _NAME_BYTES) for index in range(names + slots)]
        operations = []
        for offset_bytes in range(first_linear, first_event, _LINEAR.size):
            _, layer = _LINEAR.unpack_from(content, offset_bytes)
            operations.append(Operation(_name(path, content, offset_bytes), None if layer == _NO_LAYER else layer))
        found = []
        for begin_ns, end_ns, name, zero, record in _EVENT.iter_unpack(memoryview(content)[first_event:]):
            if begin_ns > end_ns or name >= names or zero:
                raise TraceError(path, "holds a slice that is none")
            found.append(Event(begin_ns, end_ns, labels[name], *_DOORBELL.unpack(record)))
        slot_names = tuple(labels[names:])
        return cls(roles[role], pid, dropped, least_wait_ns, left_out, slot_names, tuple(operations), found)


def _name(path: Path, content: bytes, offset_bytes: int) -> str:
    found = _NAME.fullmatch(content, offset_bytes, offset_bytes + _NAME_BYTES)
    if found is None:
        raise TraceError(path, "holds a name that is none")
    return found[1].decode()
