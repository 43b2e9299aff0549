"""Native core: rings, kernels on the slots of an arena, attention over a private cache, and the sampler.

Contracts: native/border/ring.h, native/border/submissions.h, native/kernels/kernels.h, native/attention/attention.h,
native/sampler/sampler.h, native/field/field.h, native/field/check.h, native/pads/keys.h.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

LAYOUT: dict[str, int]

class ArenaGuard:
    def __init__(self, arena: Buffer) -> None: ...
    def renew(self) -> None: ...
    def release(self) -> None: ...

class RingWriter:
    def __init__(self, arena: Buffer, ring: str) -> None: ...
    def write(self, record: bytes) -> bool: ...
    def complete(self, submission: bytes, status: int, busy_ns: int, value: int) -> bool: ...
    def release(self) -> None: ...

class RingReader:
    def __init__(self, arena: Buffer, ring: str) -> None: ...
    def read(self, spin_ns: int, yield_ns: int) -> bytes | None: ...
    def read_parked(self) -> bytes | None: ...
    def waits(self) -> dict[str, int]: ...
    def available(self) -> bool: ...
    def park(self) -> bool: ...
    def unpark(self) -> None: ...
    def release(self) -> None: ...

class UnexpectedCompletion(Exception):
    args: tuple[bytes, bytes]

class Loans:
    def lend(self, slot: int, first_row: int, rows: int, operation: str) -> None: ...
    def take_back(self) -> None: ...
    @property
    def count(self) -> int: ...
    def holder(self, slot: int, first_row: int, end_row: int) -> str | None: ...

class Tallies:
    @property
    def doorbells(self) -> int: ...
    @property
    def bytes_to_gpu(self) -> int: ...
    @property
    def bytes_to_tee(self) -> int: ...
    @property
    def waiting_ns(self) -> int: ...
    @property
    def round_trips_by_bits(self) -> list[int]: ...
    @property
    def round_trips_ns(self) -> int: ...
    def number_of(self, operation: str) -> int: ...
    def operations(self) -> list[tuple[str, int, int]]: ...
    def newest_round_trips(self, most: int = ...) -> list[int]: ...

class Submissions:
    def __init__(
        self,
        epoch: int,
        slots: list[tuple[int, int, bool]],
        loans: Loans,
        tallies: Tallies,
        deliver: Callable[[bytes], object],
        writer: RingWriter | None = None,
        reader: RingReader | None = None,
        spin_ns: int = 0,
        yield_ns: int = 0,
    ) -> None: ...
    def submit(
        self,
        operation: int,
        opcode: int,
        target: int,
        in_slot: int,
        out_slot: int,
        first_row: int,
        rows: int,
        first_segment: int,
        num_segments: int,
        tile_bytes: int,
        /,
    ) -> int: ...
    def wait(self, sequence: int) -> bool: ...
    def look_at(self, at_ns: int) -> None: ...
    def nap_ns(self) -> int: ...
    def napped(self) -> None: ...
    def complete(self, record: bytes) -> None: ...
    @property
    def submitted(self) -> int: ...
    @property
    def completed(self) -> int: ...
    def outcome(self) -> tuple[int, int]: ...
    def oldest(self) -> tuple[str, int]: ...

class Heartbeat:
    def __init__(self, arena: Buffer, role: str, interval_ms: int) -> None: ...
    def release(self) -> None: ...

def load_word(arena: Buffer, offset_bytes: int) -> int: ...
def store_word(arena: Buffer, offset_bytes: int, value: int) -> None: ...
def lock_memory(memory: Buffer) -> int: ...

class SlotTable:
    def __init__(
        self,
        arena: Buffer | None,
        entries: list[tuple[int, int, int, int]],
        own_memory: Buffer | None = None,
        own_entries: list[tuple[int, int, int, int]] = ...,
    ) -> None: ...
    def __len__(self) -> int: ...
    def release(self) -> None: ...

def add_rms_norm(
    slots: SlotTable,
    out_slot: int,
    out_first_row: int,
    delta_slot: int | None,
    residual: npt.NDArray[np.float32],
    row_index: npt.NDArray[np.int32] | None,
    first_row: int,
    rows: int,
    weight: npt.NDArray[np.float32],
    eps: float,
) -> None: ...
def load_rows(slots: SlotTable, slot: int, first_row: int, rows: int, out: npt.NDArray[Any]) -> None: ...
def store_rows(slots: SlotTable, slot: int, first_row: int, rows: int, values: npt.NDArray[Any]) -> None: ...
def rope(
    slots: SlotTable,
    qk_slot: int,
    first_row: int,
    rows: int,
    positions: npt.NDArray[np.int32],
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
    num_heads: int,
    head_dim: int,
) -> None: ...
def softmax(
    slots: SlotTable,
    slot: int,
    offset_elements: int,
    num_heads: int,
    rows: int,
    num_columns: int,
    scale: float,
    first_valid_end: int,
    window: int | None,
) -> None: ...
def silu_mul(slots: SlotTable, gate_up_slot: int, out_slot: int, first_row: int, rows: int) -> None: ...
def all_finite(slots: SlotTable, slot: int, offset_elements: int, num_elements: int) -> bool: ...
def instruction_sets() -> list[str]: ...
def active_instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def set_num_threads(num_threads: int, patience_us: int = 0) -> None: ...
def get_num_threads() -> int: ...

class KeyValueCache:
    def __init__(
        self, num_kv_heads: int, head_dim: int, blocks: npt.NDArray[np.int32], element: str = "bfloat16"
    ) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    def lock(self) -> int: ...
    def read(self, sequence: int, positions: int) -> int: ...

def attend(
    cache: KeyValueCache,
    slots: SlotTable,
    qkv_slot: int,
    out_slot: int,
    segments: npt.NDArray[np.int32],
    *,
    num_heads: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: npt.NDArray[np.float32] | None = None,
) -> None: ...
def hyperbolic_tangent(values: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None: ...

NOT_FINITE: int
NOTHING_LEFT: int

def rope_tables(
    inverse_frequencies: npt.NDArray[np.float32], num_positions: int, scale: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]: ...
def logarithm(x: float) -> float: ...
def power(base: float, exponent: float) -> float: ...

class TokenSampler:
    def __init__(
        self,
        vocab_size: int,
        prompt: Sequence[int],
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stream: int = 0,
        allowed: Sequence[int] = ...,
        bias: Sequence[tuple[int, float]] = ...,
        bad_words: Sequence[Sequence[int]] = ...,
        min_tokens: int = 0,
        ending: Sequence[int] = ...,
    ) -> None: ...
    @property
    def position(self) -> int: ...
    def grow(self, token: int) -> None: ...

def draw_tokens(logits: npt.NDArray[np.float32], samplers: Sequence[TokenSampler]) -> npt.NDArray[np.int32]: ...
def score_tokens(
    logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32], top: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]: ...
def philox(key: Sequence[int], counter: Sequence[int]) -> list[int]: ...

class FieldLinear:
    """One Linear's weights as int8, packed, with a scale for each output: the arithmetic `w8` (native/field/field.h).

    Raises:
        ValueError: `inputs` is more than 66,311, beyond which sums of digits wrap; weights or rows in use elsewhere.
    """

    def __init__(self, outputs: int, inputs: int) -> None: ...
    def set_rows(self, first_output: int, weight: npt.NDArray[np.float32] | npt.NDArray[np.uint16]) -> None: ...
    def set_bias(self, bias: npt.NDArray[np.float32]) -> None: ...
    @property
    def scales(self) -> npt.NDArray[np.float32]: ...
    @property
    def bias(self) -> npt.NDArray[np.float32] | None: ...
    def quantised(self, first_output: int, rows: int) -> npt.NDArray[np.int8]: ...
    @property
    def num_bytes(self) -> int: ...
    def apply(self, slots: SlotTable, in_slot: int, out_slot: int, first_row: int, rows: int) -> None: ...
    def multiply(self, slots: SlotTable, in_slot: int, out_slot: int, first_row: int, rows: int) -> None: ...

class FieldCheck:
    """The check of one Linear that another process multiplies, in the field of p = 2^31 - 1 (native/field/check.h).

    Rows are begun and finished by their number, each once; several blocks of them may be between the two.

    Shapes:   vectors [V, outputs], words in [0, p), V 1 to 16.
    Args:
        is_blinded: no row crosses that no pad was taken from.
    Raises:
        ValueError: a word of `vectors` is not in the field; a row is begun that was not finished, or finished that was
            not begun; x or out are not private memory.
    """

    def __init__(self, linear: FieldLinear, vectors: npt.NDArray[np.uint32], is_blinded: bool = False) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    def fetch(self) -> None:
        """Brings what `begin` and `finish` read besides their rows near this core: for who waits anyway."""
    def begin(
        self,
        slots: SlotTable,
        x_slot: int,
        m_slot: int,
        first_row: int,
        rows: int,
        copy: npt.NDArray[np.uint32] | None = None,
        pads: PadRows | None = None,
    ) -> None:
        """Writes m = xq mod p of rows x, to `copy` too; with pads, m = xq - r mod p.

        The pads are kept until `finish` has used them; with a check that nobody holds any more they are burned.

        Shapes:   x [rows, inputs] f32, private; m [rows, inputs] u32, written by whole words.
        Raises:
            ValueError: the pads are of another number of rows, of a Linear with other weights, or have blinded
                something.
            RuntimeError: they are those of the process that this one was forked from.
        """
    def finish(
        self,
        slots: SlotTable,
        y_slot: int,
        out_slot: int,
        first_row: int,
        rows: int,
        copy: npt.NDArray[np.uint32] | None = None,
    ) -> bool:
        """Whether y is m W mod p, as far as the vectors tell. `copy` gets y too. Rows that are blinded lose their pads.

        Shapes:   y [rows, outputs] u32, each word read once; out [rows, outputs] f32, private.
        Numerics: out has the bits of FieldLinear.apply; where the check fails it is unspecified.
        """

def quantise_rows(
    x: npt.NDArray[np.float32], linear: FieldLinear
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]: ...
def field_instruction_set() -> str: ...

class PadKeys:
    """The keys of a session's pads, one for each Linear (native/pads/keys.h). No key and no pad comes to Python.

    Args:
        seed: 32 bytes, for tests; of the system's generator where it is None.
    Raises:
        OSError: the memory for them cannot be had or locked; the message says how much it is, and the limit.
        ValueError: no Linears; a session or a digest of 64 KiB; a seed of another size.
    """

    def __init__(
        self, session: bytes, model_digest: bytes, key_epoch: int, num_linears: int, seed: bytes | None = None
    ) -> None: ...
    @property
    def num_linears(self) -> int: ...
    @property
    def key_id(self) -> str: ...

def draw_pads(key: bytes, row: int, inputs: int) -> npt.NDArray[np.uint32]:
    """The pads of one row of a key that is known (native/pads/pad_kernels.h), as its known answers are asked for."""

def pads_of_stream(stream: bytes, inputs: int) -> npt.NDArray[np.uint32]:
    """The pads that these bytes of a stream give.

    Raises:
        ValueError: fewer than `inputs` words of them are in the field.
    """

def hkdf_sha256(salt: bytes, ikm: bytes, info: bytes, size: int) -> bytes: ...
def pads_instruction_set() -> str: ...

class PadRows:
    """Rows of a stock that were taken. When nobody holds them any more, they are wiped, and their slots free."""

    @property
    def linear(self) -> int: ...
    @property
    def first_row(self) -> int: ...
    @property
    def rows(self) -> int: ...

class PadStock:
    """Pads that are made ahead, for each Linear rows from 0 on (native/pads/stock.h).

    Threads that run when nobody else wants the core fill it, the Linear with the fewest rows first, and sleep when it
    is full. One thread takes.

    Args:
        linears: whose weights cannot be set until it is closed.
        capacity_rows: of each Linear.
        num_threads: 0: none are made.
        lock: in memory, as far as the system allows.
    Attributes:
        available: rows that can be taken of every Linear.
        made, used, burned: rows of one Linear, of all Linears together: made; a product of theirs was finished; taken
            and dropped without.
        fault: what a thread has died of; then nothing can be taken.
    Raises:
        ValueError: no rows, too many threads, another number of Linears than keys.
        RuntimeError: the process was forked from the one that made it.
    """

    def __init__(
        self,
        keys: PadKeys,
        linears: Sequence[FieldLinear],
        capacity_rows: int,
        num_threads: int,
        lock: bool = False,
    ) -> None: ...
    @staticmethod
    def row_bytes(linears: Sequence[FieldLinear]) -> int:
        """Of a row of every Linear."""
    def take(self, linear: int, rows: int) -> PadRows | None:
        """The next rows of a Linear, which nobody is given again; None where there are not so many."""
    def wait(self, linear: int, rows: int, timeout_s: float) -> bool:
        """Whether there are so many by then. They are made before all others."""
    def rest(self, is_asked: bool) -> None:
        """Whether the threads are to rest until they are told otherwise; for who waits they work."""
    def available_of(self, linear: int) -> int: ...
    def close(self) -> None:
        """Ends the threads. Rows that were taken stay what they are until they are dropped."""
    @property
    def available(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def is_locked(self) -> bool: ...
    @property
    def made(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def burned(self) -> int: ...
    @property
    def fault(self) -> str | None: ...
