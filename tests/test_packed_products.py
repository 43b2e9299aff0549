"""The products of a CPU device: the same as the GEMM library's, from the same records, for every instruction set."""

from __future__ import annotations

import mmap
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import RandomModel

from tsqp_shm import _native
from tsqp_shm.config import Limits
from tsqp_shm.gpu import _products, packed_products
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.kv_cache import BlockTable
from tsqp_shm.gpu.packed_products import PackedProducts
from tsqp_shm.gpu.products import GemmProducts
from tsqp_shm.gpu.weights import load_weights
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import NO_SLOT, Record
from tsqp_shm.shm.slots import slot_array
from tsqp_shm.shm.tiling import Segment, key_range

FIELDS = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "head_dim": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 70,
    "max_window_layers": 1,
}
LIMITS = Limits("bfloat16", max_model_len=300, max_num_seqs=3, max_batch_tokens=160, tile_rows=64, tiles_in_flight=2)
SETS = [name for name in _native.instruction_sets() if name != "scalar"]


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = _native.active_instruction_set()
    _native.use_instruction_set(request.param)
    if _products.panel_kernels(request.param) is None:
        pytest.skip(f"{request.param} has no packed products here")
    yield request.param
    _native.use_instruction_set(before)


class Side:
    """Products of one kind on slots of their own."""

    def __init__(self, kind, network, folder, limits=LIMITS, blocks=None) -> None:
        self.plan = Plan.derive(network, limits)
        arena = SimpleNamespace(plan=self.plan, buffer=mmap.mmap(-1, self.plan.total_bytes))
        self.device = Device(torch.device("cpu"), arena)
        self.arrays = {slot.name: slot_array(arena, slot) for slot in self.plan.slots}
        with Checkpoint.open(folder) as checkpoint:
            weights = load_weights(network, checkpoint, torch.bfloat16, torch.device("cpu"))
            self.products = kind(network, self.plan, weights, self.device, blocks)

    def record(self, target=0, source="x", to="x", rows=(0, 1), tile=(0, 1)) -> Record:
        out = NO_SLOT if to is None else self.plan.slot(to).index
        return Record(1, 1, 0, target, self.plan.slot(source).index, out, *rows, *tile)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = RandomModel("qwen2", FIELDS).write(tmp_path_factory.mktemp("packed"))
    return Network.of(ModelSpec.from_folder(folder)), folder


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """One whose DOWN sums over more inputs than are taken at once, in runs and a rest."""
    fields = {**FIELDS, "hidden_size": 544, "intermediate_size": 4128, "num_hidden_layers": 1, "max_window_layers": 0}
    folder = RandomModel("qwen2", fields).write(tmp_path_factory.mktemp("deep"))
    return Network.of(ModelSpec.from_folder(folder)), folder


@pytest.mark.parametrize("rows", [33, 256, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_of_deep_sums_is_that_of_the_gemm(instruction_set, deep_model, rows, threads):
    network, folder = deep_model
    limits = replace(LIMITS, max_batch_tokens=300)
    sides = [Side(kind, network, folder, limits) for kind in (GemmProducts, PackedProducts)]
    before = _products.get_num_threads()
    _products.set_num_threads(threads)
    try:
        fill(sides, "act", (rows, network.intermediate_size))
        for side in sides:
            side.products.linear(side.record(network.layers[0].mlp.down.index, "act", "hidden", (0, rows)))
        assert_same(sides, "hidden", rows * network.hidden_size)
    finally:
        _products.set_num_threads(before)
        for side in sides:
            side.device.close()


@pytest.fixture
def sides(instruction_set, model):
    network, folder = model
    pair = [Side(kind, network, folder) for kind in (GemmProducts, PackedProducts)]
    yield pair
    for side in pair:
        side.device.close()


def to_float(bits):
    if bits.dtype == np.float32:
        return bits
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()


def fill(sides, name, rows, scale=1.0, seed=0):
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=rows, scale=scale)).bfloat16()
    for side in sides:
        side.arrays[name].reshape(-1)[: values.numel()] = values.view(torch.uint16).numpy().reshape(-1)


def assert_same(sides, name, elements):
    found, expected = (to_float(side.arrays[name].reshape(-1)[:elements]) for side in reversed(sides))
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-7 * max(1e-6, np.abs(expected).max()))


def step(sides, segments):
    for side in sides:
        with torch.inference_mode():
            side.products.begin_step(segments)


def assert_close(found, expected, rtol):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol / 2 * np.abs(expected).max())


def assert_equal(found, expected, rtol):
    np.testing.assert_array_equal(found, expected)


def attention(sides, network, segments, tile, layer, seed, compare=assert_close):
    """q and k of all rows, scores, made-up probabilities that are causal, context and o_proj."""
    rows = segments[-1].first_row + segments[-1].rows
    width = (network.num_heads + network.num_kv_heads) * network.head_dim
    fill(sides, "x", (rows, network.hidden_size), seed=seed)
    for side in sides:
        side.products.qkv(side.record(layer, "x", "qk", (0, rows)))
    assert_same(sides, "qk", rows * width)
    fill(sides, "qk", (rows, width), seed=seed + 1)
    for side in sides:
        side.products.scores(side.record(layer, "qk", "scores.0", (0, rows), tile))
    of_tile = segments[tile[0] : sum(tile)]
    offset, probabilities = 0, np.random.default_rng(seed)
    scores = [side.arrays["scores.0"].reshape(-1) for side in sides]
    for segment in of_tile:
        seen = key_range(segment, network.windows[layer])
        shape = (network.num_heads, segment.rows, seen.columns)
        end = offset + int(np.prod(shape))
        keys = np.arange(seen.columns)[None, :] + seen.start
        visible = np.broadcast_to(keys <= segment.position + np.arange(segment.rows)[:, None], shape)
        expected, found = (to_float(flat[offset:end]).reshape(shape) for flat in scores)
        compare(found[visible], expected[visible], 2**-6)
        weights = torch.from_numpy(probabilities.random(shape) * visible).bfloat16().view(torch.uint16).numpy()
        for flat in scores:
            flat[offset:end] = weights.reshape(-1)
        offset = end
    first = of_tile[0].first_row
    of_rows = (first, of_tile[-1].first_row + of_tile[-1].rows - first)
    for side in sides:
        side.products.context(side.record(layer, "scores.0", "hidden", of_rows, tile))
    hidden = [to_float(side.arrays["hidden"][first : sum(of_rows)]) for side in sides]
    compare(hidden[1], hidden[0], 2**-5)


@pytest.mark.parametrize("rows", [1, 5, 33, 150])
def test_linears_are_those_of_the_gemm_library(sides, model, rows):
    network, _ = model
    with torch.inference_mode():
        mlp = network.layers[2].mlp
        for linear, source, to in ((mlp.gate_up, "x", "gate_up"), (mlp.down, "act", "hidden")):
            fill(sides, source, (rows, linear.inputs), seed=rows)
            for side in sides:
                side.products.linear(side.record(linear.index, source, to, (0, rows)))
            assert_same(sides, to, rows * side.plan.slot(to).row_elements)
        wanted = min(rows, 3)
        for side in sides:
            side.products.linear(side.record(network.lm_head.index, "x", "logits", (0, wanted)))
        assert_same(sides, "logits", wanted * network.vocab_size)


def test_embed_copies_rows_and_refuses_what_is_no_token(sides, model):
    network, _ = model
    ids = [0, network.vocab_size - 1, 7]
    for side in sides:
        side.arrays["tokens"][:3, 0] = ids
        with torch.inference_mode():
            side.products.embed(side.record(0, "tokens", "hidden", (0, 3)))
    assert np.array_equal(sides[0].arrays["hidden"][:3], sides[1].arrays["hidden"][:3])
    for bad in (-1, network.vocab_size):
        sides[1].arrays["tokens"][1, 0] = bad
        with pytest.raises(IndexError, match=str(bad)):
            sides[1].products.embed(sides[1].record(0, "tokens", "hidden", (0, 3)))


def test_a_prompt_then_decode_of_several_sequences(sides, model):
    network, _ = model
    with torch.inference_mode():
        prompt = [Segment(0, 0, 0, 64), Segment(0, 64, 64, 64), Segment(0, 128, 128, 5), Segment(2, 0, 133, 17)]
        for layer in range(network.num_layers):
            if layer == 0:
                step(sides, prompt)
            for number, tile in enumerate(((0, 1), (1, 1), (2, 2))):
                attention(sides, network, prompt, tile, layer, seed=10 * layer + number)
        decode = [Segment(0, 133, 0, 1), Segment(1, 0, 1, 1), Segment(2, 17, 2, 1)]
        step(sides, decode)
        for layer in range(network.num_layers):
            attention(sides, network, decode, (0, 3), layer, seed=100 + layer)


# Of three sequences of five blocks each.
BLOCKS = np.arange(15, dtype=np.int32)
TABLES = {
    "shuffled": np.random.default_rng(7).permutation(BLOCKS),
    "runs over the ends of rows": np.roll(BLOCKS, 2),
    "backwards": BLOCKS[::-1],
}
# In each step segments (sequence, position, rows), a tile each but for the last step's.
STEPS = [
    [(0, 0, 63), (1, 0, 64), (2, 0, 33)],
    [(0, 63, 1), (1, 64, 1), (2, 33, 31)],
    [(0, 64, 64), (1, 65, 62), (2, 64, 1)],
    [(0, 128, 1), (1, 127, 1), (2, 65, 64)],
    [(0, 129, 64), (0, 193, 64), (1, 0, 5), (2, 129, 20)],
    [(0, 257, 1), (1, 5, 1), (2, 149, 1)],
]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", ["gemm", *SETS])
def test_wherever_the_blocks_of_the_cache_lie_the_bits_are_the_same(model, kind, table, request):
    network, folder = model
    before = _native.active_instruction_set()
    if kind != "gemm":
        _native.use_instruction_set(kind)
        request.addfinalizer(lambda: _native.use_instruction_set(before))
        if _products.panel_kernels(kind) is None:
            pytest.skip(f"{kind} has no packed products here")
    products = GemmProducts if kind == "gemm" else PackedProducts
    tables = [None, BlockTable(TABLES[table].reshape(3, 5).copy())]
    pair = [Side(products, network, folder, blocks=blocks) for blocks in tables]
    with torch.inference_mode():
        for number, of_step in enumerate(STEPS):
            segments, first_row = [], 0
            for sequence, position, rows in of_step:
                segments.append(Segment(sequence, position, first_row, rows))
                first_row += rows
            step(pair, segments)
            tiles = [(0, 3)] if number + 1 == len(STEPS) else [(index, 1) for index in range(len(segments))]
            for layer in range(network.num_layers):
                for tile in tiles:
                    attention(pair, network, segments, tile, layer, 10 * number + layer, assert_equal)
    for side in pair:
        side.device.close()


def test_a_block_table_that_does_not_fit_is_refused(sides, model):
    network, folder = model
    for entries in ([[0, 15, 1, 2, 3]] * 3, [[0, -1, 1, 2, 3]] * 3):
        with pytest.raises(ValueError, match="table"):
            Side(PackedProducts, network, folder, blocks=BlockTable(np.array(entries, np.int32)))


@pytest.mark.parametrize("position", [0, 1, 6, 63, 64, 99])
def test_what_a_longer_sequence_left_is_gone_and_what_stays_is_kept(sides, model, position):
    """NaN behind a new end would come through probabilities that are zero."""
    network, _ = model

    def append(segment, scale):
        step(sides, [segment])
        fill(sides, "x", (segment.rows, network.hidden_size), scale, seed=segment.rows)
        fill(sides, "qk", (segment.rows, (network.num_heads + network.num_kv_heads) * network.head_dim))
        for side in sides:
            side.products.qkv(side.record(0, "x", "qk", (0, segment.rows)))
            side.products.scores(side.record(0, "qk", "scores.0", (0, segment.rows)))

    with torch.inference_mode():
        append(Segment(0, 0, 0, 64), 1.0)
        append(Segment(0, 64, 0, 36), 1.0)
        append(Segment(0, position, 0, 30), float("nan"))
        last = Segment(0, position, 0, 1)
        append(last, 1.0)
        seen = key_range(last, network.windows[0])
        visible = np.arange(seen.columns) + seen.start <= position
        weights = torch.from_numpy(np.broadcast_to(visible / 128, (network.num_heads, seen.columns)).copy())
        for side in sides:
            flat = side.arrays["scores.0"].reshape(-1)
            flat[: weights.numel()] = weights.bfloat16().view(torch.uint16).numpy().reshape(-1)
            side.products.context(side.record(0, "scores.0", "hidden"))
    hidden = [to_float(side.arrays["hidden"][:1]) for side in sides]
    assert np.isfinite(hidden[0]).all()
    np.testing.assert_allclose(hidden[1], hidden[0], rtol=2**-5, atol=2**-6 * np.abs(hidden[0]).max())


@pytest.mark.parametrize("num_threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(sides, model, num_threads):
    network, _ = model
    packed = sides[1]
    before = _products.get_num_threads()
    results = []
    for threads in (1, num_threads):
        _products.set_num_threads(threads)
        fill(sides, "x", (150, network.hidden_size))
        packed.products.linear(packed.record(network.layers[0].mlp.gate_up.index, "x", "gate_up", (0, 150)))
        results.append(packed.arrays["gate_up"][:150].copy())
    _products.set_num_threads(before)
    assert np.array_equal(*results)


def test_what_does_not_fit_is_refused(sides):
    packed = sides[1]
    native = packed.products._native
    slot = {slot.name: slot.index for slot in packed.plan.slots}
    step(sides, [Segment(0, 0, 0, 20)])
    for bad in (
        lambda: native.begin_step([(3, 0, 0, 1)], [[(0, 64)], [(0, 64)]]),
        lambda: native.begin_step([(0, 300, 0, 64)], [[(0, 320)], [(0, 320)]]),
        lambda: native.begin_step([(0, 0, 150, 20)], [[(0, 64)], [(0, 64)]]),
        lambda: native.begin_step([(0, 0, 0, 20)], [[(0, 64)], [(32, 64)]]),
        lambda: native.begin_step([(0, 0, 0, 20)], [[(0, 64)], []]),
        lambda: native.scores(0, 0, slot["qk"], slot["scores.0"], 0, 2),
        lambda: native.scores(0, 0, slot["x"], slot["scores.0"], 0, 1),
        lambda: native.scores(0, 0, slot["qk"], slot["tokens"], 0, 1),
        lambda: native.linear(0, "gate_up", slot["x"], slot["act"], 0, 1),
        lambda: native.linear(0, "gate_up", slot["x"], slot["hidden"], 0, 1),
        lambda: native.linear(0, "up_gate", slot["x"], slot["gate_up"], 0, 1),
        lambda: native.set_linear(0, "o", np.zeros((4, 32), np.uint16), None),
        lambda: native.clear_values(0, 0, 321),
    ):
        with pytest.raises(ValueError):
            bad()
    for far in (
        lambda: native.linear(0, "gate_up", slot["x"], slot["gate_up"], 100, 100),
        lambda: native.linear(9, "gate_up", slot["x"], slot["gate_up"], 0, 1),
        lambda: native.scores(0, 2, slot["qk"], slot["scores.0"], 0, 1),
    ):
        with pytest.raises(IndexError):
            far()


def test_an_instruction_set_that_this_machine_lacks_is_refused():
    with pytest.raises(ValueError, match="got 'mmx', but this machine has: scalar"):
        _products.panel_kernels("mmx")


def test_other_widths_and_dtypes_go_to_the_gemm_library(model):
    network, _ = model
    plan, cpu = Plan.derive(network, LIMITS), torch.device("cpu")
    if _products.panel_kernels(_native.active_instruction_set()) is not None:
        assert packed_products.is_available(network, plan, cpu)
    assert not packed_products.is_available(network, plan, torch.device("cuda:0"))
    odd = SimpleNamespace(hidden_size=96, intermediate_size=164, head_dim=32)
    assert not packed_products.is_available(odd, plan, cpu)
    f32 = Plan.derive(network, replace(LIMITS, dtype="float32"))
    assert not packed_products.is_available(network, f32, cpu)
