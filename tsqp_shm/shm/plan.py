"""The plan: every slot of the arena, derived by each side for itself from the model and the limits.

Nothing here is read from shared memory. The header carries only the plan's digest, for comparison.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tsqp_shm.config import Limits
from tsqp_shm.shm import layout
from tsqp_shm.shm.tiling import padded_length


class Geometry(Protocol):
    """The numbers of a model that decide shapes; `model.spec.ModelSpec` has them."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...


@dataclass(frozen=True)
class Slot:
    """A block of the arena that holds rows of one dtype.

    Shapes: [num_rows, row_elements], row-major, dense, 4 KiB aligned.
    """

    index: int
    name: str
    dtype: str
    num_rows: int
    row_elements: int
    offset_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.row_elements * layout.DTYPE_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True)
class Plan:
    """Slots, their places and the arena's size.

    Attributes:
        geometry: what the plan was derived from, as plain values; two plans are equal when these are.
        slots: in the order of their index.
        total_bytes: size of the arena.
        digest: sha256 over geometry and layout, as the header carries it.
    """

    geometry: dict[str, Any]
    slots: tuple[Slot, ...]
    total_bytes: int
    digest: bytes

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)

    @property
    def score_slots(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.name.startswith("scores."))

    @classmethod
    def of_slots(cls, geometry: dict[str, Any], slots: list[tuple[str, str, int, int]]) -> Plan:
        """Lays out slots (name, dtype, num_rows, row_elements) one behind the other."""
        placed = []
        offset_bytes = layout.SLOTS_OFFSET_BYTES
        for index, (name, dtype, num_rows, row_elements) in enumerate(slots):
            slot = Slot(index, name, dtype, num_rows, row_elements, offset_bytes)
            placed.append(slot)
            offset_bytes += -(-slot.size_bytes // layout.PAGE_BYTES) * layout.PAGE_BYTES
        identity = {"layout": layout.VERSION, "geometry": geometry, "slots": slots}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        return cls(geometry, tuple(placed), offset_bytes, digest)

    @classmethod
    def derive(cls, model: Geometry, limits: Limits) -> Plan:
        """The arena of one session.

        Shapes: tokens [T, 1] i32; segments [N, 4] i32 (sequence, position, first row, rows); x, hidden [T, C];
            qk [T, (H+G)*D]; gate_up [T, 2F]; act [T, F]; logits [R, V]; scores.N [H*tile_rows, S], used as a run of
            dense [H, rows, columns] blocks, one per segment of a tile.
        """
        tokens = limits.max_batch_tokens
        score_columns = padded_length(limits.max_model_len)
        segments = -(-tokens // limits.tile_rows) + limits.max_num_seqs
        # As many rows as one step of decode can want; `logits` of a whole prompt goes through in turns.
        logit_rows = max(limits.max_num_seqs, min(tokens, 32))
        dtype = limits.dtype
        slots = [
            ("tokens", "int32", tokens, 1),
            ("segments", "int32", segments, 4),
            ("x", dtype, tokens, model.hidden_size),
            ("hidden", dtype, tokens, model.hidden_size),
            ("qk", dtype, tokens, (model.num_heads + model.num_kv_heads) * model.head_dim),
            ("gate_up", dtype, tokens, 2 * model.intermediate_size),
            ("act", dtype, tokens, model.intermediate_size),
            ("logits", dtype, logit_rows, model.vocab_size),
        ]
        for index in range(limits.tiles_in_flight):
            slots.append((f"scores.{index}", dtype, model.num_heads * limits.tile_rows, score_columns))
        geometry = {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "vocab_size": model.vocab_size,
            "windows": list(model.windows),
            **asdict(limits),
        }
        return cls.of_slots(geometry, slots)
