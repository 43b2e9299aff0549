"""The plan: every slot of the arena, derived by each side for itself from the model and the limits.

Nothing here is read from shared memory. The header carries only the plan's digest, for comparison.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from tsqp_shm.config import Limits
from tsqp_shm.errors import ConfigError
from tsqp_shm.shm import layout
from tsqp_shm.shm.tiling import padded_length

# What each Linear is in its layer, in the order of the network: runs of (layers, the roles in each of them), the last
# run of those that belong to no layer.
LinearRoles = tuple[tuple[int, tuple[str, ...]], ...]
_ROLE = re.compile("[a-z_]{1,24}")
# A record has 16 bits for one.
MAX_LINEARS = 1 << 16


class Model(Protocol):
    """What of a model decides shapes and order; `model.network.Network` has it."""

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
    @property
    def linear_roles(self) -> LinearRoles: ...
    @property
    def is_tied(self) -> bool: ...


@dataclass(frozen=True)
class Geometry:
    """What a plan takes of its model.

    Attributes:
        is_tied: decides nothing here, but both sides have to read the same of their checkpoints.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    windows: tuple[int | None, ...]
    linear_roles: LinearRoles
    is_tied: bool

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
        tuples = {"windows": _windows(values["windows"]), "linear_roles": _linear_roles(values["linear_roles"])}
        for field, value in values.items():
            if field == "is_tied" and type(value) is not bool:
                raise ConfigError(field, value, "true or false")
            if field not in (*tuples, "is_tied") and type(value) is not int:
                raise ConfigError(field, value, "a number")
        return cls(**{**values, **tuples})


def _windows(value: object) -> tuple[int | None, ...]:
    if not isinstance(value, list) or any(window is not None and type(window) is not int for window in value):
        raise ConfigError("windows", value, "a list of numbers and nulls")
    return tuple(value)


def _linear_roles(value: Any) -> LinearRoles:
    """UNTRUSTED: whoever shows a session reads them of its header, and shows the names."""
    try:
        runs = tuple((layers, tuple(roles)) for layers, roles in value)
        is_of_kind = all(type(layers) is int and layers > 0 and roles for layers, roles in runs)
        are_names = all(_ROLE.fullmatch(role) for _, roles in runs for role in roles)
    except (TypeError, ValueError):
        is_of_kind = are_names = False
    if not is_of_kind or not are_names:
        raise ConfigError("linear_roles", value, "runs of layers and the roles in each of them")
    if sum(layers * len(roles) for layers, roles in runs) > MAX_LINEARS:
        raise ConfigError("linear_roles", value, f"at most {MAX_LINEARS} Linears")
    return runs


# An arena that carries no model: of a trial, a benchmark or a test.
NO_MODEL = Geometry(1, 0, 0, 0, 0, 0, 0, (None,), (), is_tied=False)
NO_LIMITS = Limits("float32", max_model_len=1, max_num_seqs=1, max_batch_tokens=1, tile_rows=1, tiles_in_flight=2)

# What the name of a slot begins with that takes another's place in a step of few rows (`Limits.float32_rows`). Their
# tiles are small, as score slots grow with the longest sequence, and together not half as large as one of the others.
IN_FLOAT32 = "f32."
FLOAT32_TILE_ROWS, FLOAT32_TILES = 16, 2

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
        offset_bytes: from the arena's base, or, of a private slot, from that of the process's own memory for slots.
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


class Operation(NamedTuple):
    """What the GPU process is asked for, as people read it; layer None: it belongs to none."""

    name: str
    layer: int | None


class PlannedLinear(NamedTuple):
    """A Linear of the network, at its index.

    Attributes:
        operation: how it is called where LINEAR asks for it.
        slots: what LINEAR reads and what it writes; None: another operation's product, and none of LINEAR's.
    """

    operation: Operation
    slots: tuple[str, str] | None


# Where attention is split, QKV and CONTEXT do its products.
_SPLIT_LINEARS = {"gate_up": ("x", "gate_up"), "down": ("act", "hidden"), "lm_head": ("x", "logits")}
# Where only Linears cross, all of them do.
_ALL_LINEARS = {"qkv": ("x", "qkv"), "o": ("heads", "hidden"), **_SPLIT_LINEARS}
_FIELD_LINEARS = {role: (f"m.{x}", f"y.{out}") for role, (x, out) in _ALL_LINEARS.items()}


@dataclass(frozen=True)
class Plan:
    """Slots, their places and the arena's size.

    Attributes:
        geometry, limits: what the plan was derived from; two plans are equal when these are.
        slots: in the order of their index, the shared ones first.
        total_bytes: size of the arena.
        private_bytes: size of the process's own memory for slots.
        digest: sha256 over geometry, limits and layout, as the header carries it.
    """

    geometry: Geometry
    limits: Limits
    slots: tuple[Slot, ...]
    total_bytes: int
    private_bytes: int
    digest: bytes

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)

    @cached_property
    def shared_slots(self) -> tuple[Slot, ...]:
        """Those of the arena; a slot's index is its place among them."""
        return tuple(slot for slot in self.slots if slot.place == "shared")

    @cached_property
    def private_slots(self) -> tuple[Slot, ...]:
        """Those of the process's own memory; their indices follow on those of the arena's."""
        return tuple(slot for slot in self.slots if slot.place == "private")

    @cached_property
    def score_slots(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.kind == "tile" and not slot.name.startswith(IN_FLOAT32))

    @cached_property
    def of_few_rows(self) -> Plan | None:
        """The same plan as a step of few rows sees it: slots of activations are those in float32, by the names of the
        others. None: there are none."""
        if not self.limits.float32_rows:
            return None
        twins = {slot.name.removeprefix(IN_FLOAT32) for slot in self.slots if slot.name.startswith(IN_FLOAT32)}
        tiles = {slot.name for slot in self.score_slots}
        slots = (
            replace(slot, name=slot.name.removeprefix(IN_FLOAT32))
            for slot in self.slots
            if slot.name not in twins | tiles
        )
        limits = replace(self.limits, tile_rows=_float32_tile_rows(self.limits))
        return replace(self, slots=tuple(slots), limits=limits)

    def named(self, name: str) -> tuple[str, ...]:
        """That slot and the one in float32 in its place, where there is one."""
        return tuple(slot.name for slot in self.slots if slot.name in (name, IN_FLOAT32 + name))

    @cached_property
    def linears(self) -> tuple[PlannedLinear, ...]:
        """Each at its index."""
        linears: list[PlannedLinear] = []
        slots = _LINEARS_OF_MODE.get(self.limits.mode, {})
        begin = 0
        for layers, roles in self.geometry.linear_roles:
            for layer in range(begin, begin + layers):
                of_layer = layer if layer < self.geometry.num_layers else None
                linears += [PlannedLinear(Operation(role.upper(), of_layer), slots.get(role)) for role in roles]
            begin += layers
        return tuple(linears)

    @cached_property
    def linear_operations(self) -> tuple[Operation, ...]:
        return tuple(linear.operation for linear in self.linears)

    @classmethod
    def of_slots(cls, shapes: Iterable[SlotShape], geometry: Geometry = NO_MODEL, limits: Limits = NO_LIMITS) -> Plan:
        """Lays out the slots of each place one behind the other.

        Args:
            shapes: each a `SlotShape` or a tuple of its fields; private ones come last.
        """
        shapes = [SlotShape(*shape) for shape in shapes]
        places = [shape.place for shape in shapes]
        if places != sorted(places, reverse=True):
            raise ValueError("a private slot stands before a shared one")
        slots = []
        end_bytes = {"shared": layout.SLOTS_OFFSET_BYTES, "private": 0}
        for index, (name, dtype, num_rows, row_elements, kind, place) in enumerate(shapes):
            slot = Slot(index, name, dtype, num_rows, row_elements, end_bytes[place], kind, place)
            slots.append(slot)
            end_bytes[place] += -(-slot.size_bytes // layout.PAGE_BYTES) * layout.PAGE_BYTES
        identity = {
            "layout": layout.VERSION,
            "geometry": geometry.plain(),
            "limits": asdict(limits),
            "slots": shapes,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        return cls(geometry, limits, tuple(slots), end_bytes["shared"], end_bytes["private"], digest)

    @classmethod
    def derive(cls, model: Model, limits: Limits) -> Plan:
        """The slots of one session: those of its mode."""
        geometry = Geometry.of(model)
        shapes = _OF_MODE[limits.mode](geometry, limits)
        return cls.of_slots(shapes, geometry, limits)


def _split_slots(geometry: Geometry, limits: Limits) -> list[SlotShape]:
    """The arena where attention is split between the two sides.

    Shapes: tokens [T, 1] i32; segments [N, 4] i32 (sequence, position, first row, rows); x, hidden [T, C];
        qk [T, (H+G)*D]; gate_up [T, 2F]; act [T, F]; logits [R, V] f32,
        as rounding them would make likeliest tokens equal; scores.N [H*tile_rows, S], used as a run of
        dense [H, rows, columns] blocks, one per segment of a tile. f32.*: the same for a step of few rows.
    """
    tokens, few = limits.max_batch_tokens, limits.float32_rows
    segments = max(-(-tokens // limits.tile_rows), -(-few // _float32_tile_rows(limits))) + limits.max_num_seqs
    return [
        SlotShape("tokens", "int32", tokens, 1),
        SlotShape("segments", "int32", segments, 4),
        *_split_rows(geometry, limits.dtype, tokens),
        SlotShape("logits", "float32", _logit_rows(limits), geometry.vocab_size),
        *_split_tiles(geometry, limits, limits.dtype, limits.tile_rows, limits.tiles_in_flight),
        *(
            shape._replace(name=IN_FLOAT32 + shape.name)
            for shape in (
                *_split_rows(geometry, "float32", few),
                *_split_tiles(geometry, limits, "float32", _float32_tile_rows(limits), FLOAT32_TILES),
            )
            if few
        ),
    ]


def _split_rows(geometry: Geometry, dtype: str, rows: int) -> list[SlotShape]:
    return [
        SlotShape("x", dtype, rows, geometry.hidden_size),
        SlotShape("hidden", dtype, rows, geometry.hidden_size),
        SlotShape("qk", dtype, rows, (geometry.num_heads + geometry.num_kv_heads) * geometry.head_dim),
        SlotShape("gate_up", dtype, rows, 2 * geometry.intermediate_size),
        SlotShape("act", dtype, rows, geometry.intermediate_size),
    ]


def _split_tiles(geometry: Geometry, limits: Limits, dtype: str, tile_rows: int, count: int) -> list[SlotShape]:
    rows, columns = geometry.num_heads * tile_rows, padded_length(limits.max_model_len)
    return [SlotShape(f"scores.{number}", dtype, rows, columns, kind="tile") for number in range(count)]


def _float32_tile_rows(limits: Limits) -> int:
    return min(limits.tile_rows, FLOAT32_TILE_ROWS)


def _own_slots(geometry: Geometry, limits: Limits) -> list[SlotShape]:
    """Where everything is computed here: nothing of it is shared.

    Shapes: x, hidden [T, C]; qkv [T, (H+2G)*D]; heads [T, H*D]; gate_up [T, 2F]; act [T, F]; logits [R, V]; all f32.
    """
    tokens, head_dim = limits.max_batch_tokens, geometry.head_dim
    widths = {
        "x": geometry.hidden_size,
        "hidden": geometry.hidden_size,
        "qkv": (geometry.num_heads + 2 * geometry.num_kv_heads) * head_dim,
        "heads": geometry.num_heads * head_dim,
        "gate_up": 2 * geometry.intermediate_size,
        "act": geometry.intermediate_size,
    }
    return [
        *(SlotShape(name, "float32", tokens, width, place="private") for name, width in widths.items()),
        SlotShape("logits", "float32", _logit_rows(limits), geometry.vocab_size, place="private"),
    ]


def _field_slots(geometry: Geometry, limits: Limits) -> list[SlotShape]:
    """Where Linears cross as integers of the field: a row that is multiplied, m, and what comes of it, y; the rest is
    private, as `_own_slots` says.

    Shapes: m.x [T, C]; m.heads [T, H*D]; m.act [T, F]; y.qkv [T, (H+2G)*D]; y.hidden [T, C]; y.gate_up [T, 2F];
        y.logits [R, V]; all u32.
    """
    own = _own_slots(geometry, limits)
    by_name = {shape.name: shape for shape in own}
    crossing = dict.fromkeys(name for slots in zip(*_FIELD_LINEARS.values(), strict=True) for name in slots)
    return [
        *(by_name[name[2:]]._replace(name=name, dtype="uint32", place="shared") for name in crossing),
        *own,
    ]


def _logit_rows(limits: Limits) -> int:
    """As many as one step of decode can want; those of a whole prompt go through in turns."""
    return max(limits.max_num_seqs, min(limits.max_batch_tokens, 32))


_OF_MODE = {"plain": _split_slots, "verified": _field_slots, "blinded": _field_slots, "tee-only": _own_slots}
_LINEARS_OF_MODE = {"plain": _SPLIT_LINEARS, "verified": _FIELD_LINEARS, "blinded": _FIELD_LINEARS}
