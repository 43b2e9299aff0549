"""The plan: where slots lie, and that two different plans cannot be taken for one another."""

import json
from dataclasses import asdict, dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm.config import Limits
from tsqp_shm.errors import ConfigError
from tsqp_shm.modes import MODES
from tsqp_shm.shm import layout
from tsqp_shm.shm.plan import Geometry, LinearRoles, Operation, Plan, SlotShape


@dataclass(frozen=True)
class Model:
    num_layers: int = 2
    hidden_size: int = 48
    intermediate_size: int = 80
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 12
    vocab_size: int = 101
    windows: tuple[int | None, ...] = (None, 32)
    linear_roles: LinearRoles = ((2, ("qkv", "o", "gate_up", "down")), (1, ("lm_head",)))
    is_tied: bool = False


LIMITS = Limits(
    dtype="bfloat16", max_model_len=100, max_num_seqs=3, max_batch_tokens=70, tile_rows=16, tiles_in_flight=2,
    float32_rows=9,
)  # fmt: skip
models = st.builds(
    Model,
    hidden_size=st.integers(1, 5000),
    intermediate_size=st.integers(1, 5000),
    num_heads=st.integers(1, 40),
    num_kv_heads=st.integers(1, 40),
    head_dim=st.integers(1, 256),
    vocab_size=st.integers(1, 200_000),
)
limits = st.builds(
    Limits,
    dtype=st.sampled_from(["bfloat16", "float32"]),
    max_model_len=st.integers(1, 5000),
    max_num_seqs=st.integers(1, 20),
    max_batch_tokens=st.integers(20, 3000),
    tile_rows=st.integers(1, 512),
    tiles_in_flight=st.integers(2, 8),
    float32_rows=st.integers(0, 20),
)


@given(models, limits)
def test_slots_are_aligned_and_disjoint_and_inside_the_arena(model, limits):
    plan = Plan.derive(model, limits)
    end_bytes = layout.SLOTS_OFFSET_BYTES
    for index, slot in enumerate(plan.slots):
        assert slot.index == index
        assert slot.offset_bytes % layout.PAGE_BYTES == 0
        assert slot.offset_bytes >= end_bytes
        assert slot.size_bytes == slot.num_rows * slot.row_elements * layout.DTYPES[slot.dtype].size_bytes > 0
        end_bytes = slot.offset_bytes + slot.size_bytes
    assert end_bytes <= plan.total_bytes
    assert plan.total_bytes % layout.PAGE_BYTES == 0


@given(models, limits)
def test_both_sides_derive_the_same_plan(model, limits):
    assert Plan.derive(model, limits) == Plan.derive(replace(model), replace(limits))


@pytest.mark.parametrize("field", Limits.__dataclass_fields__)
def test_the_digest_differs_with_the_limit(field, monkeypatch):
    monkeypatch.setitem(MODES, "tee-only", MODES["plain"])
    value = {"dtype": "float32", "mode": "tee-only"}.get(field) or getattr(LIMITS, field) + 1
    changed = replace(LIMITS, **{field: value})
    assert Plan.derive(Model(), changed).digest != Plan.derive(Model(), LIMITS).digest


@pytest.mark.parametrize("field", Model.__dataclass_fields__)
def test_the_digest_differs_with_the_geometry(field):
    other = {"windows": (None, 33), "linear_roles": ((2, ("qkv", "down")), (1, ("lm_head",))), "is_tied": True}
    value = other.get(field) or getattr(Model(), field) + 1
    changed = replace(Model(), **{field: value})
    assert Plan.derive(changed, LIMITS).digest != Plan.derive(Model(), LIMITS).digest


@given(models, limits)
def test_a_plan_comes_back_from_what_crosses_of_it_as_json(model, limits):
    plan = Plan.derive(model, limits)
    geometry, plain_limits = json.loads(json.dumps([plan.geometry.plain(), asdict(plan.limits)]))
    assert geometry == plan.geometry.plain()
    assert Plan.derive(Geometry.of_plain(geometry), Limits(**plain_limits)) == plan


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_layers": "2"},
        {"num_layers": True},
        {"windows": None},
        {"windows": ["32"]},
        {"windows": 5},
        {"is_tied": 1},
        {"linear_roles": None},
        {"linear_roles": [[2]]},
        {"linear_roles": [["2", ["down"]]]},
        {"linear_roles": [[0, ["down"]]]},
        {"linear_roles": [[1 << 40, []]]},
        {"linear_roles": [[1 << 16, ["down", "o"]]]},
        {"linear_roles": [[1, ["\x1b[2J"]]]},
        {"linear_roles": [[1, [7]]]},
        {"linear_roles": [[1, 7]]},
        {"more": 1},
    ],
)
def test_a_geometry_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError):
        Geometry.of_plain({**Geometry.of(Model()).plain(), **wrong})
    with pytest.raises(ConfigError):
        Geometry.of_plain({})


def test_the_linears_of_a_plan_are_in_the_order_of_the_network():
    linears = Plan.derive(Model(), LIMITS).linears
    assert [linear.operation for linear in linears] == [
        *(Operation(name, layer) for layer in (0, 1) for name in ("QKV", "O", "GATE_UP", "DOWN")),
        Operation("LM_HEAD", None),
    ]
    assert [linear.slots for linear in linears[:4]] == [None, None, ("x", "gate_up"), ("act", "hidden")]
    assert linears[-1].slots == ("x", "logits")


def test_a_private_slot_has_no_place_in_the_arena():
    shared = [SlotShape("x", "float32", 3, 4), SlotShape("scores.0", "float32", 2, 2, kind="tile")]
    private = SlotShape("kept", "float32", 1 << 20, 4, place="private")
    plan = Plan.of_slots([*shared, private])
    assert plan.total_bytes == Plan.of_slots(shared).total_bytes
    assert [slot.name for slot in plan.shared_slots] == ["x", "scores.0"]
    assert plan.digest != Plan.of_slots(shared).digest
    with pytest.raises(ValueError, match="private"):
        Plan.of_slots([private, *shared])


@pytest.mark.parametrize("changed", [{"kind": "tile"}, {"place": "private"}, {"dtype": "int32"}, {"num_rows": 4}])
def test_the_digest_differs_with_the_slot(changed):
    shape = SlotShape("x", "float32", 3, 4)
    assert Plan.of_slots([shape._replace(**changed)]).digest != Plan.of_slots([shape]).digest


def test_the_digest_differs_with_the_layout_version(monkeypatch):
    before = Plan.derive(Model(), LIMITS).digest
    monkeypatch.setattr(layout, "VERSION", layout.VERSION + 1)
    assert Plan.derive(Model(), LIMITS).digest != before


def test_there_is_a_score_slot_for_each_tile_in_flight():
    plan = Plan.derive(Model(), replace(LIMITS, tiles_in_flight=5))
    assert [slot.name for slot in plan.score_slots] == [f"scores.{i}" for i in range(5)]


def test_the_digest_fills_its_place_in_the_header():
    digest = Plan.derive(Model(), LIMITS).digest
    assert layout.HEADER_DIGEST_OFFSET_BYTES + len(digest) == layout.HEADER_BYTES
