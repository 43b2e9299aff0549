"""Records: packed as drawn, and refused field by field."""

import struct
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm.config import Limits
from tsqp_shm.errors import ProtocolError
from tsqp_shm.shm import layout, protocol
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import (
    NO_SLOT,
    TRANSFERS,
    Opcode,
    Record,
    Status,
    SubmissionRules,
    check_completion,
    operation_of,
    pack_completion,
    pack_identity,
    unpack_identity,
)

LIMITS = Limits(
    dtype="bfloat16", max_model_len=100, max_num_seqs=3, max_batch_tokens=70, tile_rows=16, tiles_in_flight=2,
    float32_rows=9,
)  # fmt: skip
MODEL = SimpleNamespace(
    num_layers=4, hidden_size=48, intermediate_size=80, num_heads=4, num_kv_heads=2, head_dim=12, vocab_size=101,
    windows=(None,) * 4, linear_roles=((4, ("qkv", "o", "gate_up", "down")), (1, ("lm_head",))), is_tied=False,
)  # fmt: skip
PLAN = Plan.derive(MODEL, LIMITS)
EPOCH = 0xFEED_0000_0000_0001
INDEX = {slot.name: slot.index for slot in PLAN.slots}
NUM_SEGMENTS = PLAN.slot("segments").num_rows
TOKENS, LOGIT_ROWS = 70, PLAN.slot("logits").num_rows

GATE_UP, DOWN, LM_HEAD = 4 * 2 + 2, 4 * 2 + 3, 4 * 4
FEW = LIMITS.float32_rows
# What takes a slot's place in a step of few rows.
IN_FLOAT32 = {slot.index: INDEX[f"f32.{slot.name}"] for slot in PLAN.slots if f"f32.{slot.name}" in INDEX}
# Of every Linear that LINEAR computes: in slot, out slot, most rows.
LINEARS = {
    **{4 * layer + 2: (INDEX["x"], INDEX["gate_up"], TOKENS) for layer in range(4)},
    **{4 * layer + 3: (INDEX["act"], INDEX["hidden"], TOKENS) for layer in range(4)},
    LM_HEAD: (INDEX["x"], INDEX["logits"], LOGIT_ROWS),
}
# opcode, but LINEAR: in slots, out slots, most rows, whether it has a layer, segments
LEGAL = {
    Opcode.READY: ([NO_SLOT], [NO_SLOT], 0, False, False),
    Opcode.EMBED: ([INDEX["tokens"]], [INDEX["hidden"]], TOKENS, False, True),
    Opcode.QKV: ([INDEX["x"]], [INDEX["qk"]], TOKENS, True, False),
    Opcode.SCORES: ([INDEX["qk"]], [INDEX["scores.0"], INDEX["scores.1"]], TOKENS, True, True),
    Opcode.CONTEXT: ([INDEX["scores.0"], INDEX["scores.1"]], [INDEX["hidden"]], TOKENS, True, True),
    Opcode.STATUS: ([NO_SLOT], [NO_SLOT], 0, False, False),
    Opcode.STOP: ([NO_SLOT], [NO_SLOT], 0, False, False),
}

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
records = st.builds(Record, u64, u64, u16, u16, u16, u16, u32, u32, u32, u32, u32, u32, u64, u64)


@st.composite
def legal_records(draw):
    opcode = draw(st.sampled_from(Opcode))
    if opcode == Opcode.LINEAR:
        target = draw(st.sampled_from(sorted(LINEARS)))
        in_slot, out_slot, most_rows = LINEARS[target]
        in_slots, out_slots, segmented = [in_slot], [out_slot], False
    else:
        in_slots, out_slots, most_rows, layered, segmented = LEGAL[opcode]
        target = draw(st.integers(0, MODEL.num_layers - 1)) if layered else 0
    if most_rows and draw(st.booleans()):
        in_slots, out_slots = ([IN_FLOAT32.get(slot, slot) for slot in slots] for slots in (in_slots, out_slots))
        most_rows = min(most_rows, FEW)
    first_row = draw(st.integers(0, most_rows - 1)) if most_rows else 0
    first_segment = draw(st.integers(0, NUM_SEGMENTS - 1)) if segmented else 0
    return Record(
        sequence=1,
        epoch=EPOCH,
        opcode=opcode,
        target=target,
        in_slot=draw(st.sampled_from(in_slots)),
        out_slot=draw(st.sampled_from(out_slots)),
        first_row=first_row,
        rows=draw(st.integers(1, most_rows - first_row)) if most_rows else 0,
        first_segment=first_segment,
        num_segments=draw(st.integers(1, NUM_SEGMENTS - first_segment)) if segmented else 0,
    )


def rules():
    return SubmissionRules(PLAN, EPOCH)


def qkv(**fields):
    legal = Record(1, EPOCH, Opcode.QKV, 2, INDEX["x"], INDEX["qk"], first_row=5, rows=60)
    return legal._replace(**fields)


def linear(target, in_slot, out_slot, /, **fields):
    legal = Record(1, EPOCH, Opcode.LINEAR, target, INDEX[in_slot], INDEX[out_slot], first_row=5, rows=7)
    return legal._replace(**fields)


def scores(**fields):
    legal = Record(1, EPOCH, Opcode.SCORES, 2, INDEX["qk"], INDEX["scores.1"], 0, 16, 2, 1)
    return legal._replace(**fields)


@given(records)
def test_unpacking_reverses_packing(record):
    assert Record.unpack(record.pack()) == record


def test_a_record_is_as_long_as_a_ring_entry():
    assert len(qkv().pack()) == layout.RECORD_BYTES


def docstring_fields():
    for line in protocol.__doc__.splitlines():
        if line.startswith("    byte "):
            _, offset_bytes, field, kind = line.split()[:4]
            yield field, int(offset_bytes), {"u16": "<H", "u32": "<I", "u64": "<Q"}[kind]


@pytest.mark.parametrize(("field", "offset_bytes", "kind"), list(docstring_fields()))
def test_a_field_lies_where_the_docstring_says(field, offset_bytes, kind):
    value = 0xA1B2C3D4E5F60718 & ((1 << 8 * struct.calcsize(kind)) - 1)
    blank = Record(*[0] * len(Record._fields))
    expected = bytearray(layout.RECORD_BYTES)
    struct.pack_into(kind, expected, offset_bytes, value)
    assert blank._replace(**{field: value}).pack() == bytes(expected)


def test_the_docstring_names_every_field():
    assert tuple(field for field, _, _ in docstring_fields()) == Record._fields


@pytest.mark.parametrize("length", [0, 63, 65, 128])
def test_another_length_is_no_record(length):
    with pytest.raises(ProtocolError, match="record length"):
        Record.unpack(bytes(length))


@given(legal_records())
def test_every_legal_submission_is_accepted(record):
    rules().check(record)


@pytest.mark.parametrize(("first_row", "rows"), [(0, 71), (70, 1), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_rows_are_checked_where_no_slot_has_them(first_row, rows):
    with pytest.raises(ProtocolError, match="rows"):
        rules().check(Record(1, EPOCH, Opcode.CONTEXT, 3, INDEX["scores.0"], NO_SLOT, first_row, rows, 0, 1))


def test_a_context_that_is_not_the_last_needs_no_out_slot():
    rules().check(Record(1, EPOCH, Opcode.CONTEXT, 3, INDEX["scores.0"], NO_SLOT, 0, 0, 0, 1))


@pytest.mark.parametrize(
    ("field", "record"),
    [
        ("sequence", qkv(sequence=0)),
        ("sequence", qkv(sequence=2)),
        ("epoch", qkv(epoch=EPOCH ^ 1)),
        ("opcode", qkv(opcode=0)),
        ("opcode", qkv(opcode=max(Opcode) + 1)),
        ("target", qkv(target=MODEL.num_layers)),
        ("target", Record(1, EPOCH, Opcode.READY, target=1)),
        ("in_slot", qkv(in_slot=INDEX["act"])),
        ("in_slot", qkv(in_slot=len(PLAN.slots))),
        ("in_slot", qkv(in_slot=NO_SLOT)),
        ("in_slot", Record(1, EPOCH, Opcode.STOP, in_slot=INDEX["x"])),
        ("out_slot", qkv(out_slot=INDEX["x"])),
        ("out_slot", qkv(out_slot=NO_SLOT)),
        ("out_slot", scores(out_slot=INDEX["logits"])),
        ("rows of slot x", qkv(rows=0)),
        ("rows of slot x", qkv(rows=66)),
        ("rows of slot x", qkv(first_row=TOKENS, rows=1)),
        ("rows of slot x", qkv(first_row=0xFFFF_FFFF, rows=0xFFFF_FFFF)),
        ("rows of slot f32.x", qkv(in_slot=INDEX["f32.x"], first_row=FEW, rows=1)),
        ("rows of slot f32.qk", qkv(out_slot=INDEX["f32.qk"])),
        ("target", linear(LM_HEAD + 1, "x", "logits")),
        ("target", linear(0xFFFF, "x", "logits")),
        ("target", linear(GATE_UP - 2, "x", "qk")),
        ("target", linear(GATE_UP - 1, "x", "hidden")),
        ("target", linear(GATE_UP - 2, "x", "x", in_slot=NO_SLOT, out_slot=NO_SLOT)),
        ("in_slot", linear(GATE_UP, "act", "gate_up")),
        ("in_slot", linear(GATE_UP, "x", "gate_up", in_slot=NO_SLOT)),
        ("in_slot", linear(DOWN, "x", "hidden")),
        ("out_slot", linear(GATE_UP, "x", "hidden")),
        ("out_slot", linear(DOWN, "act", "x")),
        ("out_slot", linear(DOWN, "act", "hidden", out_slot=NO_SLOT)),
        ("out_slot", linear(LM_HEAD, "x", "gate_up")),
        ("num_segments", linear(DOWN, "act", "hidden", num_segments=1)),
        ("rows of slot logits", linear(LM_HEAD, "x", "logits", first_row=0, rows=LOGIT_ROWS + 1)),
        ("rows", Record(1, EPOCH, Opcode.READY, rows=1)),
        ("rows", Record(1, EPOCH, Opcode.READY, first_row=1)),
        ("num_segments", scores(num_segments=0)),
        ("num_segments", scores(first_segment=NUM_SEGMENTS)),
        ("num_segments", scores(num_segments=NUM_SEGMENTS)),
        ("num_segments", scores(first_segment=0xFFFF_FFFF, num_segments=1)),
        ("num_segments", qkv(num_segments=1)),
        ("num_segments", qkv(first_segment=1)),
        ("status", qkv(status=1)),
        ("reserved", qkv(reserved=1)),
        ("busy_ns", qkv(busy_ns=1)),
        ("value", qkv(value=1)),
    ],
)
def test_a_submission_is_refused_by_the_name_of_its(field, record):
    with pytest.raises(ProtocolError) as caught:
        rules().check(record)
    assert caught.value.field == field
    assert caught.value.expected != caught.value.found


@given(st.integers(0, 0xFFFF) | st.integers(0, LM_HEAD + 2), *[st.integers(0, len(PLAN.slots)) | st.just(NO_SLOT)] * 2)
def test_a_linear_has_one_pair_of_slots_and_no_other(target, in_slot, out_slot):
    record = Record(1, EPOCH, Opcode.LINEAR, target, in_slot, out_slot, 0, 1)
    if target in LINEARS:
        legal = [{slot, IN_FLOAT32.get(slot, slot)} for slot in LINEARS[target][:2]]
        if in_slot in legal[0] and out_slot in legal[1]:
            rules().check(record)
            return
    with pytest.raises(ProtocolError) as caught:
        rules().check(record)
    assert caught.value.field in ("target", "in_slot", "out_slot")


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_every_record_has_a_name(opcode, target):
    name, layer = operation_of(opcode, target, PLAN.linear_operations)
    assert name
    assert layer is None or layer == target or opcode == Opcode.LINEAR


def test_a_linear_is_called_by_what_it_is():
    found = [operation_of(Opcode.LINEAR, target, PLAN.linear_operations) for target in (GATE_UP, DOWN, LM_HEAD)]
    assert found == [("GATE_UP", 2), ("DOWN", 2), ("LM_HEAD", None)]
    assert operation_of(Opcode.LINEAR, 40, PLAN.linear_operations) == ("LINEAR 40", None)
    assert operation_of(Opcode.CONTEXT, 3, ()) == ("CONTEXT", 3)
    assert operation_of(Opcode.EMBED, 3, ()) == ("EMBED", None)
    assert operation_of(77, 3, ()) == ("opcode 77", None)


@pytest.mark.parametrize("sequence", [1, 3])
def test_a_sequence_number_comes_once_and_none_is_left_out(sequence):
    checker = rules()
    checker.check(qkv(sequence=1))
    with pytest.raises(ProtocolError) as caught:
        checker.check(qkv(sequence=sequence))
    assert (caught.value.field, caught.value.expected) == ("sequence", 2)


@given(st.lists(legal_records(), min_size=1, max_size=3))
def test_a_step_that_repeats_the_one_before_but_for_its_numbers_is_accepted(step):
    checker = rules()
    numbered = [record._replace(sequence=number) for number, record in enumerate(step * 3, 1)]
    for record in numbered:
        assert checker.accept(record.pack())[1:] == record[1:]


@pytest.mark.parametrize("sequence", [1, 3, (1 << 64) - 1])
def test_the_number_of_a_submission_like_an_earlier_one_is_checked_too(sequence):
    checker = rules()
    checker.accept(qkv(sequence=1).pack())
    with pytest.raises(ProtocolError) as caught:
        checker.accept(qkv(sequence=sequence).pack())
    assert (caught.value.field, caught.value.expected) == ("sequence", 2)


@given(legal_records(), st.integers(8, 63), st.integers(1, 255))
def test_a_submission_that_differs_from_an_accepted_one_is_checked_anew(record, index, difference):
    checker = rules()
    checker.accept(record.pack())
    changed = bytearray(record._replace(sequence=2).pack())
    changed[index] ^= difference
    try:
        rules().check(Record.unpack(bytes(changed))._replace(sequence=1))
    except ProtocolError as error:
        with pytest.raises(ProtocolError) as caught:
            checker.accept(bytes(changed))
        assert caught.value.field == error.field
    else:
        assert checker.accept(bytes(changed)) == Record.unpack(bytes(changed))


def test_the_kinds_of_submissions_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(protocol, "MAX_ACCEPTED_KINDS", 3)
    checker = rules()
    for number in range(1, 12):
        checker.accept(qkv(sequence=number, target=number % 4, rows=number).pack())
        assert len(checker._accepted) <= 3


@pytest.mark.parametrize("size", [0, 7, 8, 63, 65])
def test_a_submission_of_another_length_is_refused(size):
    with pytest.raises(ProtocolError) as caught:
        rules().accept(qkv().pack()[:size].ljust(size, b"\0"))
    assert caught.value.field == "record length"


@given(st.binary(min_size=64, max_size=64))
def test_random_bytes_are_a_protocol_error_and_nothing_else(data):
    with pytest.raises(ProtocolError):
        rules().check(Record.unpack(data))
    with pytest.raises(ProtocolError):
        check_completion(qkv().pack(), data)


@given(records)
def test_random_fields_of_this_session_are_accepted_or_a_protocol_error(record):
    try:
        rules().check(record._replace(sequence=1, epoch=EPOCH, opcode=record.opcode % 10, target=record.target % 5))
    except ProtocolError:
        return


@given(legal_records(), st.sampled_from(Status), u64, u64)
def test_a_completion_that_repeats_its_submission_has_a_status(submission, status, busy_ns, value):
    completion = submission._replace(status=status, busy_ns=busy_ns, value=value)
    assert check_completion(submission.pack(), completion.pack()) == status
    assert pack_completion(submission.pack(), status, busy_ns, value) == completion.pack()


ECHOED = Record._fields[:10]


@pytest.mark.parametrize("field", ECHOED)
def test_a_completion_with_another_value_is_refused_by_the_name_of(field):
    submission = qkv()
    changed = submission._replace(**{field: getattr(submission, field) ^ 1})
    with pytest.raises(ProtocolError) as caught:
        check_completion(submission.pack(), changed.pack())
    assert caught.value.field == field
    assert (caught.value.expected, caught.value.found) == (getattr(submission, field), getattr(changed, field))


def test_the_echoed_bytes_are_the_echoed_fields():
    offsets = {field: offset_bytes for field, offset_bytes, _ in docstring_fields()}
    assert offsets[Record._fields[len(ECHOED)]] == protocol.ECHOED_BYTES


@pytest.mark.parametrize(("field", "value"), [("status", 3), ("status", 0xFFFF_FFFF), ("reserved", 1)])
def test_a_completion_is_refused_for_an_unknown(field, value):
    with pytest.raises(ProtocolError) as caught:
        check_completion(qkv().pack(), qkv(**{field: value}).pack())
    assert (caught.value.field, caught.value.found) == (field, value)


def test_a_completion_of_another_length_is_refused():
    with pytest.raises(ProtocolError, match="record length"):
        check_completion(qkv().pack(), qkv().pack()[:40])


@given(st.integers(0, 2**64 - 1))
def test_whatever_a_gpu_process_says_of_itself_can_be_shown(value):
    pid, device, transfer = unpack_identity(value)
    assert 0 <= pid < 2**32
    assert device.startswith(("cpu", "cuda:"))
    assert transfer in TRANSFERS


def test_an_identity_comes_back_as_it_was():
    assert unpack_identity(pack_identity(4711, None, "in place")) == (4711, "cpu", "in place")
    assert unpack_identity(pack_identity(4711, 3, "staged")) == (4711, "cuda:3", "staged")
