"""Fuzz targets for what Python reads of the other side: completions, submissions, header and invitation.

Each takes bytes and fails by an exception. What must come of them is worked out a second time, in other words than the
package's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path
from types import SimpleNamespace

from tsqp_shm import _native
from tsqp_shm.config import DOORBELLS, Limits
from tsqp_shm.errors import ArenaError, ArenaMismatch, ProtocolError, TsqpError
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.invitation import Invitation, invitation_in, take_invitation
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.memory import PosixMemory, SharedObject
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.protocol import (
    ECHOED_BYTES,
    LAYERED,
    NO_SLOT,
    Opcode,
    Record,
    Status,
    SubmissionRules,
    check_completion,
    operands,
)

LIMITS = Limits(dtype="bfloat16", max_model_len=40, max_num_seqs=3, max_batch_tokens=20, tile_rows=8, tiles_in_flight=2)
MODEL = SimpleNamespace(
    num_layers=4, hidden_size=8, intermediate_size=12, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=11,
    windows=(None,) * 4, linear_roles=((4, ("qkv", "o", "gate_up", "down")), (1, ("lm_head",))), is_tied=False,
)  # fmt: skip
PLAN = Plan.derive(MODEL, LIMITS)
# Of each layer's qkv, o, gate_up and down; the first two are not LINEAR's.
LINEAR_SLOTS = (("", ""), ("", ""), ("x", "gate_up"), ("act", "hidden"))
EPOCH = 0xFEED_0000_0000_0001
# The parent removes it if this process is killed; see run.py.
ARENA = arena_name(os.environ.get("TSQP_SHM_FUZZ_SESSION", f"fuzz-{os.getpid()}"))


def completion(data: bytes) -> None:
    """A submission's 64 bytes, then what came back."""
    fields = Record.unpack(data[: layout.RECORD_BYTES].ljust(layout.RECORD_BYTES, b"\0"))
    completed = data[layout.RECORD_BYTES :]
    delivered: list[bytes] = []
    tallies = _native.Tallies()
    slots = [(1, 8, False)] * NO_SLOT
    submissions = _native.Submissions(fields.epoch, slots, _native.Loans(), tallies, delivered.append)
    submissions.submit(tallies.number_of("fuzzed"), *fields[2:10], 0)
    submitted = delivered[0]
    assert Record.unpack(submitted)[:10] == (1, *fields[1:10])
    if len(completed) != layout.RECORD_BYTES:
        # The ring and the socket give no other.
        return
    # Most inputs would differ in the sequence number, which is the first submission's.
    completed = submitted[:8] + completed[8:] if completed[:8] == data[:8] else completed
    status, reserved = struct.unpack_from("<II", completed, ECHOED_BYTES)
    is_allowed = completed[:ECHOED_BYTES] == submitted[:ECHOED_BYTES] and status in list(Status) and reserved == 0
    try:
        submissions.complete(completed)
    except _native.UnexpectedCompletion as unexpected:
        assert unexpected.args == (submitted, completed)
        try:
            assert check_completion(submitted, completed) == status != Status.OK
        except ProtocolError:
            assert not is_allowed
        else:
            assert is_allowed
        assert submissions.completed == 0
    else:
        assert is_allowed
        assert status == Status.OK
        assert submissions.outcome()[1] == int.from_bytes(completed[56:], "little")
        assert submissions.completed == 1


def submission(data: bytes) -> None:
    """Records one after the other, as the GPU process takes them from a TEE process that may be broken."""
    rules = SubmissionRules(PLAN, EPOCH)
    for number, start in enumerate(range(0, len(data), layout.RECORD_BYTES), 1):
        packed = data[start : start + layout.RECORD_BYTES]
        try:
            record = Record.unpack(packed)
            rules.check(record)
        except ProtocolError:
            return
        assert record.pack() == packed
        assert (record.sequence, record.epoch) == (number, EPOCH)
        _require_inside_the_plan(record)


def _require_inside_the_plan(record: Record) -> None:
    allowed = operands(PLAN)[Opcode(record.opcode)][record.target]
    assert allowed is not None
    if record.opcode == Opcode.LINEAR:
        layer, of_layer = divmod(record.target, len(LINEAR_SLOTS))
        is_head = (layer, of_layer) == (MODEL.num_layers, 0)
        slots = ("x", "logits") if is_head else LINEAR_SLOTS[of_layer]
        assert (allowed.in_slots, allowed.out_slots) == ((slots[0],), (slots[1],))
        assert is_head or layer < MODEL.num_layers
    else:
        assert record.target < (MODEL.num_layers if record.opcode in LAYERED else 1)
    for index, names in ((record.in_slot, allowed.in_slots), (record.out_slot, allowed.out_slots)):
        if index == NO_SLOT:
            assert not names or None in names
            continue
        slot = PLAN.slots[index]
        assert slot.name in names
        if slot.kind == "rows":
            assert 0 < record.rows <= slot.num_rows - record.first_row
    segments = PLAN.slot("segments").num_rows
    assert record.first_segment + record.num_segments <= (segments if allowed.segmented else 0)
    assert (record.status, record.reserved, record.busy_ns, record.value) == (0, 0, 0, 0)


def header(data: bytes) -> None:
    """A real arena of a drawn size whose first page holds drawn bytes, and a side that attaches to it."""
    size_bytes = PLAN.total_bytes
    if len(data) > layout.HEADER_BYTES:
        size_bytes = int.from_bytes(data[layout.HEADER_BYTES :][:4], "little") % (2 * PLAN.total_bytes)
    head = data[: min(layout.HEADER_BYTES, size_bytes)]
    with contextlib.ExitStack() as stack:
        # It is backed and mapped; what is attached to is what a hostile creator would leave instead.
        memory = PosixMemory.create(ARENA, PLAN.total_bytes)
        stack.callback(memory.close)
        fd = os.open(Path("/dev/shm") / ARENA.removeprefix("/"), os.O_RDWR)
        stack.callback(os.close, fd)
        os.ftruncate(fd, size_bytes)
        os.pwrite(fd, head, 0)
        words = struct.unpack("<4Q32s", head.ljust(layout.HEADER_BYTES, b"\0"))
        is_allowed = size_bytes == PLAN.total_bytes and words == (
            layout.MAGIC, layout.VERSION, words[2], PLAN.total_bytes, PLAN.digest,
        )  # fmt: skip
        try:
            shared = stack.enter_context(contextlib.closing(SharedObject(ARENA)))
            with Arena.attach(shared.map(PLAN.total_bytes), PLAN) as attached:
                assert is_allowed
                assert attached.epoch == words[2]
        except ArenaError:
            assert not is_allowed


def invitation(data: bytes) -> None:
    """A length word and bytes in a published header page, as the GPU process finds them."""
    page = (bytes(layout.INVITATION_LENGTH_OFFSET_BYTES) + data).ljust(layout.PAGE_BYTES, b"\0")[: layout.PAGE_BYTES]
    with contextlib.closing(mmap.mmap(-1, layout.SLOTS_OFFSET_BYTES)) as memory:
        memory[: layout.PAGE_BYTES] = page
        try:
            content = take_invitation(SimpleNamespace(name="drawn", buffer=memory))
        except ArenaMismatch:
            assert int.from_bytes(data[:8].ljust(8, b"\0"), "little") > layout.MAX_INVITATION_BYTES
            return
    assert len(content) == int.from_bytes(data[:8].ljust(8, b"\0"), "little") <= layout.MAX_INVITATION_BYTES
    assert content == page[layout.INVITATION_OFFSET_BYTES :][: len(content)] == invitation_in("drawn", page)
    try:
        invited = Invitation.parse(content)
    except TsqpError:
        return
    assert isinstance(invited.endpoint, str)
    assert invited.doorbell in DOORBELLS
    assert invited.spin_us >= 0
    assert invited.yield_us >= 0
    assert type(invited.tee_pid) is int
    assert isinstance(invited.geometry, dict)
    Plan.derive(MODEL, invited.limits)


def packed(content: bytes) -> bytes:
    """As it lies in the page."""
    return struct.pack("<Q", len(content)) + content


TARGETS = {target.__name__: target for target in (completion, submission, header, invitation)}


def seeds() -> dict[str, dict[str, bytes]]:
    """Inputs that pass, to begin a corpus with: libFuzzer breaks them by itself."""
    index = {slot.name: slot.index for slot in PLAN.slots}
    records = []
    for number, (opcode, by_target) in enumerate(operands(PLAN).items(), 1):
        target, allowed = next((target, allowed) for target, allowed in enumerate(by_target) if allowed)
        in_slot = index[allowed.in_slots[0]] if allowed.in_slots else NO_SLOT
        out_slot = index[allowed.out_slots[0]] if allowed.out_slots else NO_SLOT
        rows = 2 if in_slot != NO_SLOT else 0
        records.append(
            Record(number, EPOCH, opcode, target, in_slot, out_slot, 0, rows, 0, 1 if allowed.segmented else 0).pack()
        )
    published = struct.pack("<4Q32s", layout.MAGIC, layout.VERSION, EPOCH, PLAN.total_bytes, PLAN.digest)
    ipc = Invitation("ipc:///tmp/doorbell", "adaptive", 2, 2000, LIMITS, PLAN.geometry.plain(), 1)
    tcp = Invitation("tcp://127.0.0.1:5555", "zmq", 0, 0, LIMITS, {}, 1)
    completed = records[2][:ECHOED_BYTES] + struct.pack("<IIQQ", 1, 0, 5000, 7)
    return {
        "completion": {"ok": records[2] * 2, "failed": records[2] + completed},
        "submission": {"every-opcode": b"".join(records)},
        "header": {"published": published, "longer": published + struct.pack("<I", PLAN.total_bytes + 4096)},
        "invitation": {"ipc": packed(ipc.pack()), "tcp": packed(tcp.pack())},
    }
