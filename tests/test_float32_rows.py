"""A step of few rows in bfloat16: its activations are float32, and products take them as they are.

The oracle is float64 on the weights and caches, which are bfloat16 either way.
"""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import (
    RandomModel,
    fast_start,
    model_folder,
    random_token_ids,
    rms_distance,
    transformers_logits,
)

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig, Limits
from tsqp_shm.errors import ConfigError, ProtocolError
from tsqp_shm.gpu import _products
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.packed_products import PackedProducts
from tsqp_shm.gpu.step import Step
from tsqp_shm.gpu.weights import load_weights
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record
from tsqp_shm.shm.slots import slot_array
from tsqp_shm.shm.tiling import Segment, key_range

FIELDS = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "head_dim": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
ROWS = 40
LIMITS = Limits(
    "bfloat16", max_model_len=300, max_num_seqs=3, max_batch_tokens=160, tile_rows=64, tiles_in_flight=2,
    float32_rows=ROWS,
)  # fmt: skip
# Of a result: sums in float32.
RTOL = 2**-18
SETS = [name for name in _native.instruction_sets() if _products.panel_kernels(name) is not None]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = RandomModel("qwen2", FIELDS).write(tmp_path_factory.mktemp("few"))
    return Network.of(ModelSpec.from_folder(folder)), folder


class Side:
    """The products on slots of their own, and the weights beside them in float64."""

    def __init__(self, network, folder) -> None:
        self.network = network
        self.plan = Plan.derive(network, LIMITS)
        arena = SimpleNamespace(plan=self.plan, buffer=mmap.mmap(-1, self.plan.total_bytes))
        self.device = Device(torch.device("cpu"), arena)
        self.arrays = {slot.name: slot_array(arena, slot) for slot in self.plan.slots}
        with Checkpoint.open(folder) as checkpoint:
            load = (network, checkpoint, torch.bfloat16, torch.device("cpu"))
            self.products = PackedProducts(network, self.plan, load_weights(*load), self.device)
            weights = load_weights(*load)
            self.embedding = weights.embedding.double().numpy()
            self.linears = [
                (of.weight.double().numpy(), 0.0 if of.bias is None else of.bias.double().numpy())
                for of in weights.linears
            ]

    def record(self, opcode, target, source, to, rows=(0, 1), tile=(0, 1)) -> Record:
        index = {slot.name: slot.index for slot in self.plan.slots}
        return Record(1, 1, opcode, target, index[source], NO_SLOT if to is None else index[to], *rows, *tile)

    def fill(self, name, shape, seed):
        values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        self.arrays[name].reshape(-1)[: values.size] = values.reshape(-1)
        return values.astype(np.float64)

    def product(self, linear, x):
        weight, bias = self.linears[linear.index]
        return x @ weight.T + bias


@pytest.fixture(params=SETS)
def side(request, model):
    before = _native.active_instruction_set()
    _native.use_instruction_set(request.param)
    side = Side(*model)
    yield side
    side.device.close()
    _native.use_instruction_set(before)


def as_bfloat16(values):
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().double().numpy()


def assert_near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=RTOL * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 33, ROWS])
def test_a_product_of_rows_in_float32_rounds_nothing_but_its_sums(side, rows):
    mlp = side.network.layers[1].mlp
    for linear, source, to in ((mlp.gate_up, "x", "gate_up"), (mlp.down, "act", "hidden")):
        x = side.fill(f"f32.{source}", (rows, linear.inputs), rows)
        side.products.linear(side.record(Opcode.LINEAR, linear.index, f"f32.{source}", f"f32.{to}", (0, rows)))
        assert_near(side.arrays[f"f32.{to}"][:rows], side.product(linear, x))
    x = side.fill("f32.x", (rows, side.network.hidden_size), rows)
    wanted = min(rows, 3)
    side.products.linear(side.record(Opcode.LINEAR, side.network.lm_head.index, "f32.x", "logits", (0, wanted)))
    assert_near(side.arrays["logits"][:wanted], side.product(side.network.lm_head, x[:wanted]))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_is_none_afterwards_and_other_rows_are(side, value):
    down = side.network.layers[0].mlp.down
    x = side.fill("f32.act", (3, down.inputs), 1)
    side.arrays["f32.act"][1, 17] = value
    side.products.linear(side.record(Opcode.LINEAR, down.index, "f32.act", "f32.hidden", (0, 3)))
    found = side.arrays["f32.hidden"][:3]
    assert not np.isfinite(found[1]).any()
    assert_near(found[[0, 2]], side.product(down, x)[[0, 2]])


def test_embed_widens_rows(side):
    ids = [0, side.network.vocab_size - 1, 7]
    side.arrays["tokens"][:3, 0] = ids
    side.products.embed(side.record(Opcode.EMBED, 0, "tokens", "f32.hidden", (0, 3)))
    assert np.array_equal(side.arrays["f32.hidden"][:3], side.embedding[ids])


# Segments (sequence, position, rows): a prompt, one that goes on over a block of keys, and decode of three together.
STEPS = [
    [(0, 0, 16), (0, 16, 16), (2, 0, 5)],
    [(0, 32, 16), (0, 48, 16), (0, 64, 8)],
    [(0, 72, 1), (1, 0, 1), (2, 5, 1)],
]


def test_attention_rounds_nothing_but_what_enters_the_cache(side):
    network = side.network
    heads, groups, dim = network.num_heads, network.num_kv_heads, network.head_dim
    of = network.layers[0].attention
    cached = {}
    for number, of_step in enumerate(STEPS):
        segments, first_row = [], 0
        for sequence, position, rows in of_step:
            segments.append(Segment(sequence, position, first_row, rows))
            first_row += rows
        side.products.begin_step(segments)
        x = side.fill("f32.x", (first_row, network.hidden_size), number)
        side.products.qkv(side.record(Opcode.QKV, 0, "f32.x", "f32.qk", (0, first_row)))
        qkv = side.product(of.qkv, x)
        width = (heads + groups) * dim
        assert_near(side.arrays["f32.qk"][:first_row], qkv[:, :width])
        qk = side.fill("f32.qk", (first_row, width), 10 + number)
        tiles = [(0, 3)] if number + 1 == len(STEPS) else [(index, 1) for index in range(len(segments))]
        for tile in tiles:
            side.products.scores(side.record(Opcode.SCORES, 0, "f32.qk", "f32.scores.0", (0, first_row), tile))
            flat, offset, expected = side.arrays["f32.scores.0"].reshape(-1), 0, []
            for segment in segments[tile[0] : sum(tile)]:
                rows = slice(segment.first_row, segment.first_row + segment.rows)
                keys = as_bfloat16(qk[rows, heads * dim :]).reshape(-1, groups, dim)
                # Rounded from float32 sums: the next bfloat16 is another one.
                values = qkv[rows, width:].reshape(-1, groups, dim)
                before = cached.setdefault(segment.sequence, (keys[:0], values[:0]))
                all_keys, all_values = (np.concatenate(pair) for pair in zip(before, (keys, values), strict=True))
                cached[segment.sequence] = all_keys, all_values
                columns, end = key_range(segment, None).columns, segment.position + segment.rows
                shape = (heads, segment.rows, columns)
                size = int(np.prod(shape))
                block = flat[offset : offset + size].reshape(shape)
                query = qk[rows, : heads * dim].reshape(-1, heads, dim)
                of_group = np.arange(heads) // (heads // groups)
                visible = np.arange(columns) <= segment.position + np.arange(segment.rows)[:, None]
                scores = np.zeros(shape)
                scores[:, :, :end] = np.einsum("rhd,khd->hrk", query, all_keys[:, of_group])
                visible = np.broadcast_to(visible, shape)
                assert_near(block[visible], scores[visible])
                weights = (np.random.default_rng(number).random(shape) * visible).astype(np.float32)
                block[:] = weights
                expected.append(np.einsum("hrk,khd->rhd", weights[:, :, :end].astype(float), all_values[:, of_group]))
                offset += size
            last = segments[sum(tile) - 1]
            first = segments[tile[0]].first_row
            of_rows = (first, last.first_row + last.rows - first)
            side.products.context(side.record(Opcode.CONTEXT, 0, "f32.scores.0", "f32.hidden", of_rows, tile))
            hidden = side.product(of.o, np.concatenate(expected).reshape(of_rows[1], heads * dim))
            # The cached values are bfloat16.
            found = side.arrays["f32.hidden"][first : sum(of_rows)]
            np.testing.assert_allclose(found, hidden, rtol=2**-8, atol=2**-8 * np.abs(hidden).max())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_of_few_rows_are_nearer_to_float32_than_rounded_ones(family):
    folder = model_folder(RandomModel(family, {"hidden_size": 96, "head_dim": 32, "intermediate_size": 160}))
    token_ids = random_token_ids(48, seed=5)
    truth = transformers_logits(folder, token_ids)
    distance = {}
    with fast_start("cpu") as fast:
        for rows in (0, 47, 48):
            with fast.llm(folder, dtype="bfloat16", max_model_len=64, float32_rows=rows) as llm:
                distance[rows] = rms_distance(llm.logits(token_ids), truth)
    assert distance[48] < distance[0] / 2
    # One row too many.
    assert distance[47] == distance[0]


def test_a_tile_that_its_score_slot_does_not_hold_is_refused(model):
    network, _ = model
    plan = Plan.derive(network, LIMITS)
    table = np.array([[0, 0, 0, 17]], np.int32)
    step = Step(plan, SimpleNamespace(host=lambda slot, offset, shape: table))
    index = {slot.name: slot.index for slot in plan.slots}
    step.begin(Record(1, 1, Opcode.EMBED, 0, index["tokens"], index["f32.hidden"], 0, 17, 0, 1))
    step.check_tile(Record(1, 1, Opcode.SCORES, 0, index["qk"], index["scores.0"], 0, 17, 0, 1))
    with pytest.raises(ProtocolError, match="rows of a tile"):
        step.check_tile(Record(1, 1, Opcode.SCORES, 0, index["f32.qk"], index["f32.scores.0"], 0, 17, 0, 1))
    with pytest.raises(ProtocolError, match="rows of a tile"):
        step.check_tile(Record(1, 1, Opcode.CONTEXT, 0, index["f32.scores.1"], NO_SLOT, 0, 17, 0, 1))


def test_slots_in_float32_are_there_where_others_are_rounded(model):
    network, _ = model
    assert Plan.derive(network, LIMITS).of_few_rows.slot("x").dtype == "float32"
    for settings in ({"dtype": "float32"}, {"float32_rows": 0}):
        limits = EngineConfig(**settings).limits(300, 1)
        assert limits.float32_rows == 0
        plan = Plan.derive(network, limits)
        assert plan.of_few_rows is None
        assert not any(slot.name.startswith("f32.") for slot in plan.slots)


@pytest.mark.parametrize("mode", ["verified", "tee-only"])
def test_modes_that_round_no_activation_take_no_such_setting(mode):
    with pytest.raises(ConfigError, match="float32_rows"):
        EngineConfig(mode=mode, float32_rows=8)
