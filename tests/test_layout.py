"""The bytes both languages agree on."""

import pytest

from tsqp_shm import _native
from tsqp_shm.shm import layout

DTYPE_NAMES = {"dtype_bf16": "bfloat16", "dtype_f32": "float32", "dtype_i32": "int32", "dtype_u32": "uint32"}


@pytest.mark.parametrize("name", sorted(_native.LAYOUT))
def test_python_and_native_agree_on(name):
    if name in DTYPE_NAMES:
        assert layout.DTYPES[DTYPE_NAMES[name]].code == _native.LAYOUT[name]
    else:
        assert getattr(layout, name.upper()) == _native.LAYOUT[name]


def test_no_python_constant_is_missing_from_the_native_layout():
    constants = {name for name in vars(layout) if name.isupper()} - {"DTYPES"}
    assert {name.lower() for name in constants} | set(DTYPE_NAMES) == set(_native.LAYOUT)


def test_the_byte_map_of_the_docstring_is_the_constants():
    drawn = {}
    for line in layout.__doc__.splitlines():
        if line.startswith("byte "):
            _, offset_bytes, part = line.split()[:3]
            drawn[part] = int(offset_bytes)
    assert drawn == {
        "header": 0,
        "secret": layout.SECRET_OFFSET_BYTES,
        "invitation": layout.INVITATION_LENGTH_OFFSET_BYTES,
        "control": layout.CONTROL_OFFSET_BYTES,
        "progress": layout.PROGRESS_OFFSET_BYTES,
        "submission": layout.SUBMISSION_RING_OFFSET_BYTES,
        "completion": layout.COMPLETION_RING_OFFSET_BYTES,
        "slots": layout.SLOTS_OFFSET_BYTES,
    }


def test_parts_do_not_overlap():
    ring_bytes = layout.RING_DEPTH * layout.RECORD_BYTES
    assert layout.HEADER_DIGEST_OFFSET_BYTES + 32 == layout.HEADER_BYTES
    assert layout.HEADER_BYTES == layout.SECRET_OFFSET_BYTES
    assert layout.SECRET_OFFSET_BYTES + layout.SECRET_BYTES <= layout.INVITATION_LENGTH_OFFSET_BYTES
    assert layout.HEADER_BYTES <= layout.INVITATION_LENGTH_OFFSET_BYTES == layout.INVITATION_OFFSET_BYTES - 8
    assert layout.INVITATION_OFFSET_BYTES + layout.MAX_INVITATION_BYTES + 7 <= layout.CONTROL_OFFSET_BYTES
    assert layout.GPU_HEARTBEAT_OFFSET_BYTES + 128 <= layout.PROGRESS_OFFSET_BYTES
    assert layout.PROGRESS_OFFSET_BYTES + layout.PROGRESS_BYTES <= layout.SUBMISSION_RING_OFFSET_BYTES
    assert layout.SUBMISSION_RING_OFFSET_BYTES + ring_bytes <= layout.COMPLETION_RING_OFFSET_BYTES
    assert layout.COMPLETION_RING_OFFSET_BYTES + ring_bytes <= layout.SLOTS_OFFSET_BYTES
    assert layout.SLOTS_OFFSET_BYTES % layout.PAGE_BYTES == 0


def test_the_magic_reads_as_text():
    assert layout.MAGIC.to_bytes(8, "little") == b"TQPSHM01"
