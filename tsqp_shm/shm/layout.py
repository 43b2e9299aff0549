"""The fixed bytes of an arena; the twin of native/border/layout.h, and a test holds both against each other.

byte 0      header      magic, version (stored last), epoch, total bytes, plan digest
byte 64     secret      of the two sides of a session, for proofs over the doorbell's socket
byte 512    invitation  its length, then JSON: what the GPU process has to know to take part
byte 4096   control     one word per pair of cache lines, each written by one side only
byte 6144   progress    counters of the TEE, for whoever watches; no role reads them
byte 8192   submission  64 records of 64 bytes, TEE -> GPU
byte 12288  completion  64 records of 64 bytes, GPU -> TEE
byte 16384  slots       each 4 KiB aligned; where they lie is in the plan, never in shared memory
"""

from __future__ import annotations

from typing import NamedTuple

MAGIC = 0x31304D4853505154
VERSION = 4

PAGE_BYTES = 4096
RECORD_BYTES = 64
RING_DEPTH = 64

HEADER_MAGIC_OFFSET_BYTES = 0
HEADER_VERSION_OFFSET_BYTES = 8
HEADER_EPOCH_OFFSET_BYTES = 16
HEADER_TOTAL_BYTES_OFFSET_BYTES = 24
HEADER_DIGEST_OFFSET_BYTES = 32
HEADER_BYTES = 64

# Written where a socket joins the two sides, before the version word; whoever may read the arena may know it.
SECRET_OFFSET_BYTES = HEADER_BYTES
SECRET_BYTES = 32

# Written before the version word, which publishes it with the rest of the header.
INVITATION_LENGTH_OFFSET_BYTES = 512
INVITATION_OFFSET_BYTES = INVITATION_LENGTH_OFFSET_BYTES + 8
MAX_INVITATION_BYTES = 3500

CONTROL_OFFSET_BYTES = PAGE_BYTES
TEE_HEARTBEAT_OFFSET_BYTES = CONTROL_OFFSET_BYTES + 6 * 128
GPU_HEARTBEAT_OFFSET_BYTES = CONTROL_OFFSET_BYTES + 7 * 128
PROGRESS_OFFSET_BYTES = CONTROL_OFFSET_BYTES + PAGE_BYTES // 2
PROGRESS_BYTES = 128

SUBMISSION_RING_OFFSET_BYTES = 2 * PAGE_BYTES
COMPLETION_RING_OFFSET_BYTES = 3 * PAGE_BYTES
SLOTS_OFFSET_BYTES = 4 * PAGE_BYTES


class Dtype(NamedTuple):
    """An element type of slots.

    Attributes:
        code: of native/layout.h.
        numpy: what numpy shows it as: it has no bfloat16, whose bits are uint16.
    """

    code: int
    size_bytes: int
    numpy: str


# Each by the name that torch has for it too.
DTYPES = {
    "bfloat16": Dtype(1, 2, "uint16"),
    "float32": Dtype(2, 4, "float32"),
    "int32": Dtype(3, 4, "int32"),
    # Elements of the field, in [0, p).
    "uint32": Dtype(4, 4, "uint32"),
}
