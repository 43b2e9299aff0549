"""The plan: every slot of the arena, derived by each side for itself from the model and the limits.

Nothing here is read from shared memory. The header carries only the plan's digest, for comparison.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from tsqp_shm.config import Limits
from tsqp_shm.errors import ConfigError
from tsqp_shm.shm import layout
from tsqp_shm.shm.tiling import padded_length


class Model(Protocol):
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
class Geometry:
    """What a plan takes of its model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: Model) -> Geometry:
        return cls(**{field: getattr(model, field) for field in cls.__dataclass_fields__})

    def plain(self) -> dict[str, Any]:
        """As JSON gives it back: with lists for tuples."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Geometry:
        """Reverses `plain`.

        Raises:
            ConfigError: a field is missing, unknown, or of another kind.
        """
        if set(values) != set(cls.__dataclass_fields__):
            raise ConfigError("geometry", sorted(values), f"the fields {', '.join(cls.__dataclass_fields__)}")
        for field, value in values.items():
            is_of_kind = _is_windows(value) if field == "windows" else type(value) is int
            if not is_of_kind:
                raise ConfigError(field, value, "a number" if field != "windows" else "a list of numbers and nulls")
        return cls(**{**values, "windows": tuple(values["windows"])})


def _is_windows(value: object) -> bool:
    return isinstance(value, list) and all(window is None or type(window) is int for window in value)


# An arena that carries no model: of a trial, a benchmark or a test.
NO_MODEL = Geometry(1, 0, 0, 0, 0, 0, 0, (None,))
NO_LIMITS = Limits("float32", max_model_len=1, max_num_seqs=1, max_batch_tokens=1, tile_rows=1, tiles_in_flight=2)

# Rows that records address by number, or one tile of attention, whose use follows from its segments.
Kind = Literal["rows", "tile"]
# In the arena, or in the memory of the process that computes with it.
Place = Literal["shared", "private"]


class SlotShape(NamedTuple):
    """A slot before it has a place."""

    name: str
    dtype: str
    num_rows: int
    row_elements: int
    kind: Kind = "rows"
    place: Place = "shared"


@dataclass(frozen=True)
class Slot:
    """A block of memory that holds rows of one dtype.

    Shapes: [num_rows, row_elements], row-major, dense, 4 KiB aligned.

    Attributes:
        offset_bytes: from the arena's base; of a private slot 0, as it does not lie there.
    """

    index: int
    name: str
    dtype: str
    num_rows: int
    row_elements: int
    offset_bytes: int
    kind: Kind = "rows"
    place: Place = "shared"

    @property
    def row_bytes(self) -> int:
        return self.row_elements * layout.DTYPES[self.dtype].size_bytes

    @property
    def size_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True)
class Plan:
    """Slots, their places and the arena's size.

    Attributes:
        geometry, limits: what the plan was derived from; two plans are equal when these are.
        slots: in the order of their index, the shared ones first.
        total_bytes: size of the arena.
        digest: sha256 over geometry, limits and layout, as the header carries it.
    """

    geometry: Geometry
    limits: Limits
    slots: tuple[Slot, ...]
    total_bytes: int
    digest: bytes

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)

    @cached_property
    def shared_slots(self) -> tuple[Slot, ...]:
        """Those of the arena; a slot's index is its place among them."""
        return tuple(slot for slot in self.slots if slot.place == "shared")

    @cached_property
    def score_slots(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.kind == "tile")

    @classmethod
    def of_slots(cls, shapes: Iterable[SlotShape], geometry: Geometry = NO_MODEL, limits: Limits = NO_LIMITS) -> Plan:
        """Lays out the shared slots one behind the other.

        Args:
            shapes: each a `SlotShape` or a tuple of its fields; private ones come last.
        """
        shapes = [SlotShape(*shape) for shape in shapes]
        places = [shape.place for shape in shapes]
        if places != sorted(places, reverse=True):
            raise ValueError("a private slot stands before a shared one")
        slots = []
        end_bytes = layout.SLOTS_OFFSET_BYTES
        for index, (name, dtype, num_rows, row_elements, kind, place) in enumerate(shapes):
            is_shared = place == "shared"
            slot = Slot(index, name, dtype, num_rows, row_elements, end_bytes if is_shared else 0, kind, place)
            slots.append(slot)
            if is_shared:
                end_bytes += -(-slot.size_bytes // layout.PAGE_BYTES) * layout.PAGE_BYTES
        identity = {
            "layout": layout.VERSION,
            "geometry": geometry.plain(),
            "limits": asdict(limits),
            "slots": shapes,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        return cls(geometry, limits, tuple(slots), end_bytes, digest)

    @classmethod
    def derive(cls, model: Model, limits: Limits) -> Plan:
        """The arena of one session.

        Shapes: tokens [T, 1] i32; segments [N, 4] i32 (sequence, position, first row, rows); x, hidden [T, C];
            qk [T, (H+G)*D]; gate_up [T, 2F]; act [T, F]; logits [R, V]; scores.N [H*tile_rows, S], used as a run of
            dense [H, rows, columns] blocks, one per segment of a tile.
        """
        geometry = Geometry.of(model)
        tokens = limits.max_batch_tokens
        score_columns = padded_length(limits.max_model_len)
        segments = -(-tokens // limits.tile_rows) + limits.max_num_seqs
        # As many rows as one step of decode can want; `logits` of a whole prompt goes through in turns.
        logit_rows = max(limits.max_num_seqs, min(tokens, 32))
        dtype = limits.dtype
        slots = [
            SlotShape("tokens", "int32", tokens, 1),
            SlotShape("segments", "int32", segments, 4),
            SlotShape("x", dtype, tokens, geometry.hidden_size),
            SlotShape("hidden", dtype, tokens, geometry.hidden_size),
            SlotShape("qk", dtype, tokens, (geometry.num_heads + geometry.num_kv_heads) * geometry.head_dim),
            SlotShape("gate_up", dtype, tokens, 2 * geometry.intermediate_size),
            SlotShape("act", dtype, tokens, geometry.intermediate_size),
            SlotShape("logits", dtype, logit_rows, geometry.vocab_size),
        ]
        score_rows = geometry.num_heads * limits.tile_rows
        slots += [
            SlotShape(f"scores.{number}", dtype, score_rows, score_columns, kind="tile")
            for number in range(limits.tiles_in_flight)
        ]
        return cls.of_slots(slots, geometry, limits)
