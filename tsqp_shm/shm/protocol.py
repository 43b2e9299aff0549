"""The record: 64 bytes that say which operation, which slots, which rows. Nothing else passes between the processes.

    byte 0   sequence       u64   1, 2, 3, ...
    byte 8   epoch          u64   of the session
    byte 16  opcode         u16
    byte 18  target         u16   the layer; of LINEAR the index of the Linear; 0 where the operation has neither
    byte 20  in_slot        u16   NO_SLOT where there is none
    byte 22  out_slot       u16   NO_SLOT where there is none
    byte 24  first_row      u32   rows [first_row, first_row + rows) of both slots
    byte 28  rows           u32
    byte 32  first_segment  u32   of the step's segment table
    byte 36  num_segments   u32
    byte 40  status         u32   completions only, 0 in submissions
    byte 44  reserved       u32   0
    byte 48  busy_ns        u64   completions only: how long the GPU process worked
    byte 56  value          u64   completions only: READY (see `pack_identity`), STATUS (peak resident bytes)

A completion repeats the first 40 bytes of its submission, so the TEE validates it by comparing them with its own copy.
The TEE's records are made and compared in `native/border/submissions.h`.

Reserved, and refused today: a LINEAR of experts names, instead of rows of both slots, a run of a table slot of
[expert, first row, rows] by first_segment and num_segments, as attention names its segments: one record a block, whose
rows the TEE has gathered by expert.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from tsqp_shm.errors import ProtocolError
from tsqp_shm.modes import MODES
from tsqp_shm.shm.plan import Operation, Plan, Slot

NO_SLOT = 0xFFFF
ECHOED_BYTES = 40
# A decode step repeats its records but for their number; a long prompt's steps differ, and are not worth keeping.
MAX_ACCEPTED_KINDS = 4096

_PACKING = struct.Struct("<QQHHHHIIIIIIQQ")
_OUTCOME = struct.Struct("<IIQQ")
_NUMBER = struct.Struct("<Q")


class Opcode(IntEnum):
    """What the GPU process can be asked to do; shapes are in `Plan.derive`."""

    READY = 1  # answers once weights are loaded; value: pid and device
    EMBED = 2  # tokens -> hidden; begins a step: the segment table is read
    QKV = 3  # x -> qk; v stays on the device
    SCORES = 4  # qk -> scores.N; appends the segments' k and v to the cache
    CONTEXT = 5  # scores.N (probabilities) x v; the block's last tile also does o_proj -> hidden
    LINEAR = 6  # of the Linear that the target names: its in slot -> its out slot (`Plan.linears`)
    STATUS = 7  # value: peak resident bytes
    STOP = 8  # answers, then the GPU process ends


class Status(IntEnum):
    """How an operation ended."""

    OK = 0
    FAILED = 1  # the operation raised; the GPU process ends and says why on its stderr
    REJECTED = 2  # the record is not allowed; the GPU process ends and says why on its stderr


_LAST_STATUS = max(Status)


class Record(NamedTuple):
    """One submission or completion."""

    sequence: int
    epoch: int
    opcode: int
    target: int = 0
    in_slot: int = NO_SLOT
    out_slot: int = NO_SLOT
    first_row: int = 0
    rows: int = 0
    first_segment: int = 0
    num_segments: int = 0
    status: int = 0
    reserved: int = 0
    busy_ns: int = 0
    value: int = 0

    def pack(self) -> bytes:
        return _PACKING.pack(*self)

    @classmethod
    def unpack(cls, record: bytes) -> Record:
        """Reads 64 bytes; the values are not checked yet.

        Raises:
            ProtocolError: not 64 bytes.
        """
        if len(record) != _PACKING.size:
            raise ProtocolError("record length", _PACKING.size, len(record))
        return cls._make(_PACKING.unpack(record))


_COMPLETION_FIELDS = ("status", "reserved", "busy_ns", "value")
_ECHOED_FIELDS = Record._fields[: -len(_COMPLETION_FIELDS)]


def pack_completion(submission: bytes, status: int, busy_ns: int = 0, value: int = 0) -> bytes:
    """The completion of a submission, which it repeats."""
    return submission[:ECHOED_BYTES] + _OUTCOME.pack(status, 0, busy_ns, value)


@dataclass(frozen=True)
class Operands:
    """What the fields of an operation's submission may hold.

    Attributes:
        in_slots: names of the slots that may be read; empty: there is none.
        out_slots: names of the slots that may be written; None in it: NO_SLOT is allowed.
        segmented: the segment fields count.
    """

    in_slots: tuple[str, ...] = ()
    out_slots: tuple[str | None, ...] = ()
    segmented: bool = False


# Their target is a layer.
LAYERED = (Opcode.QKV, Opcode.SCORES, Opcode.CONTEXT)
_NAMES = {int(opcode): opcode.name for opcode in Opcode}


def operands(plan: Plan) -> dict[Opcode, tuple[Operands | None, ...]]:
    """The operations of a plan; of each, what is allowed with target 0, 1, ...; None: nothing, there is no such
    operation."""
    return {
        Opcode.READY: (Operands(),),
        **(_of_split_attention(plan) if MODES[plan.limits.mode].splits_attention else {}),
        Opcode.LINEAR: tuple(
            Operands(plan.named(linear.slots[0]), plan.named(linear.slots[1])) if linear.slots else None
            for linear in plan.linears
        ),
        Opcode.STATUS: (Operands(),),
        Opcode.STOP: (Operands(),),
    }


def _of_split_attention(plan: Plan) -> dict[Opcode, tuple[Operands | None, ...]]:
    """Where embedding and attention are the GPU process's too."""
    layers, named = plan.geometry.num_layers, plan.named
    scores = tuple(slot.name for slot in plan.slots if slot.kind == "tile")
    return {
        Opcode.EMBED: (Operands(("tokens",), named("hidden"), segmented=True),),
        Opcode.QKV: (Operands(named("x"), named("qk")),) * layers,
        Opcode.SCORES: (Operands(named("qk"), scores, segmented=True),) * layers,
        Opcode.CONTEXT: (Operands(scores, (*named("hidden"), None), segmented=True),) * layers,
    }


def operation_of(opcode: int, target: int, linears: Sequence[Operation]) -> Operation:
    """What a record asks for, as people read it; any numbers have a name.

    Args:
        linears: of the plan's Linears, by their index.
    """
    if opcode == Opcode.LINEAR:
        return linears[target] if target < len(linears) else Operation(f"LINEAR {target}", None)
    return Operation(_NAMES.get(opcode, f"opcode {opcode}"), target if opcode in LAYERED else None)


class SubmissionRules:
    """Validates submissions field by field, in their order, against the plan and the session.

    The GPU process holds one; what it lets through has a known opcode, existing slots and rows inside them.
    """

    def __init__(self, plan: Plan, epoch: int) -> None:
        self._epoch = epoch
        self._last_sequence = 0
        self._accepted: dict[bytes, Record] = {}
        self._slots = plan.slots
        self._max_rows = plan.limits.max_batch_tokens
        # 0 where the mode has no such table.
        self._max_segments = sum(slot.num_rows for slot in plan.shared_slots if slot.name == "segments")
        index = {slot.name: slot.index for slot in plan.shared_slots}

        def rules(allowed: Operands | None) -> tuple[Operands, set[int], set[int]] | None:
            if allowed is None:
                return None
            in_slots = {index[name] for name in allowed.in_slots}
            out_slots = {NO_SLOT if name is None else index[name] for name in allowed.out_slots}
            return allowed, in_slots or {NO_SLOT}, out_slots or {NO_SLOT}

        self._operands = {
            int(opcode): tuple(rules(allowed) for allowed in by_target) for opcode, by_target in operands(plan).items()
        }

    @property
    def opcodes(self) -> Collection[int]:
        """Of the operations that there are."""
        return self._operands.keys()

    def accept(self, submission: bytes) -> Record:
        """Reads a submission and checks it; one that differs from an earlier one in its number alone is not taken
        apart again.

        Returns:
            The record, with the number of the first of its kind.

        Raises:
            ProtocolError: naming the first field that is not allowed.
        """
        record = self._accepted.get(submission[_NUMBER.size :])
        if record is not None:
            self._count(*_NUMBER.unpack_from(submission))
            return record
        record = Record.unpack(submission)
        self.check(record)
        if len(self._accepted) == MAX_ACCEPTED_KINDS:
            self._accepted.clear()
        self._accepted[submission[_NUMBER.size :]] = record
        return record

    def _count(self, sequence: int) -> None:
        if sequence != self._last_sequence + 1:
            raise ProtocolError("sequence", self._last_sequence + 1, sequence)
        self._last_sequence = sequence

    def check(self, record: Record) -> None:
        """Raises:
        ProtocolError: naming the first field that is not allowed.
        """
        self._count(record.sequence)
        if record.epoch != self._epoch:
            raise ProtocolError("epoch", f"{self._epoch:#x}", f"{record.epoch:#x}")
        by_target = self._operands.get(record.opcode)
        if by_target is None:
            raise ProtocolError("opcode", f"one of {sorted(self._operands)}", record.opcode)
        if record.target >= len(by_target):
            raise ProtocolError("target", f"below {len(by_target)}", record.target)
        rules = by_target[record.target]
        if rules is None:
            raise ProtocolError("target", "a Linear that LINEAR computes", record.target)
        allowed, in_slots, out_slots = rules
        if record.in_slot not in in_slots:
            raise ProtocolError("in_slot", sorted(in_slots), record.in_slot)
        if record.out_slot not in out_slots:
            raise ProtocolError("out_slot", sorted(out_slots), record.out_slot)
        self._check_rows(record, allowed)
        for field, found in zip(_COMPLETION_FIELDS, record[-len(_COMPLETION_FIELDS) :], strict=True):
            if found:
                raise ProtocolError(field, "0 in a submission", found)

    def _check_rows(self, record: Record, allowed: Operands) -> None:
        # A score slot's rows follow from its segments; every other slot is addressed by rows.
        row_slots = [
            self._slots[index]
            for index in (record.in_slot, record.out_slot)
            if index != NO_SLOT and self._slots[index].kind == "rows"
        ]
        for slot in row_slots:
            check_rows_in_slot(slot, record.first_row, record.rows)
        # A tile before the last names no slot but its scores; its rows are the step's.
        most = self._max_rows if allowed.segmented else 0
        if not row_slots and record.first_row + record.rows > most:
            raise ProtocolError("rows", f"at most {most}", f"{record.first_row} + {record.rows}")
        last_segment = record.first_segment + record.num_segments
        if allowed.segmented:
            if record.num_segments < 1 or last_segment > self._max_segments:
                raise ProtocolError("num_segments", f"1 to {self._max_segments} in all", last_segment)
        elif last_segment:
            raise ProtocolError("num_segments", 0, last_segment)


# How slots get to the device and back: computed on in place; or copied, with the arena registered with the driver,
# through pinned memory, or through pageable memory.
TRANSFERS = ("in place", "registered", "staged", "pageable")


def pack_identity(pid: int, cuda_index: int | None, transfer: str) -> int:
    """The value of READY's completion: pid in 32 bits, then 16 for the device (0: the CPU, 1 + N: cuda:N), then the
    transfer's place in TRANSFERS."""
    device = 0 if cuda_index is None else cuda_index + 1
    return TRANSFERS.index(transfer) << 48 | device << 32 | pid


def unpack_identity(value: int) -> tuple[int, str, str]:
    """The pid, device and transfer that the GPU process says it has; for display only."""
    device = value >> 32 & 0xFFFF
    # UNTRUSTED: any value names something.
    transfer = TRANSFERS[value >> 48 & 3]
    return value & 0xFFFFFFFF, f"cuda:{device - 1}" if device else "cpu", transfer


def check_rows_in_slot(slot: Slot, first_row: int, rows: int) -> None:
    """Raises:
    ProtocolError: no rows, or rows outside the slot.
    """
    if rows < 1 or first_row + rows > slot.num_rows:
        raise ProtocolError(f"rows of slot {slot.name}", f"1 to {slot.num_rows}", f"{first_row} + {rows}")


def check_completion(submitted: bytes, completed: bytes) -> Status:
    """Says of a completion that native code did not take what it is (`native/border/submissions.h` takes those that
    repeat their submission and are OK).

    Args:
        submitted: this side's private copy.

    Raises:
        ProtocolError: naming the first field that differs, or is not allowed.
    """
    # UNTRUSTED: every field that could steer anything must repeat what this side wrote.
    wanted, found = Record.unpack(submitted), Record.unpack(completed)
    for field, expected, value in zip(_ECHOED_FIELDS, wanted, found, strict=False):
        if value != expected:
            raise ProtocolError(field, expected, value)
    if found.status > _LAST_STATUS:
        raise ProtocolError("status", f"0 to {_LAST_STATUS}", found.status)
    if found.reserved:
        raise ProtocolError("reserved", 0, found.reserved)
    return Status(found.status)
