"""How blocks take turns: the oldest submission first, and nobody waits for a block that waits for itself. And what the
engine needs of a mode: its ports, and nothing of the other process."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import RandomModel, model_folder, random_token_ids, relative_distance, transformers_logits

from tsqp_shm.config import Limits
from tsqp_shm.model.network import Layer, Linear, Network
from tsqp_shm.model.rope import rope_tables
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.engine import Engine, Ports
from tsqp_shm.tee.interleave import interleave
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.statistics import Statistics


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=5), st.booleans())
def test_tasks_wait_for_their_submissions_in_ascending_order(programmes, staggered):
    submitted, waited, done = [0], [], []

    def task(number, steps):
        for count in steps:
            for _ in range(count):
                submitted[0] += 1
            mine = submitted[0]
            yield mine
            assert waited[-1] == mine
        done.append(number)

    tasks = [task(number, steps) for number, steps in enumerate(programmes)]
    interleave(tasks, waited.append, staggered=staggered)
    assert sorted(done) == list(range(len(programmes)))
    assert waited == sorted(waited)
    assert len(waited) == sum(len(steps) for steps in programmes)


@given(st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_a_task_that_is_stuck_goes_on_after_the_one_before_it(tasks, layers, staggered):
    reached = [-1] * tasks
    order, sequence = [], [0]

    def task(number):
        for layer in range(layers):
            while number > 0 and reached[number - 1] < layer:
                yield None
            order.append((layer, number))
            reached[number] = layer
            sequence[0] += 1
            yield sequence[0]

    interleave([task(number) for number in range(tasks)], lambda _: None, staggered=staggered)
    for number in range(1, tasks):
        for layer in range(layers):
            assert order.index((layer, number - 1)) < order.index((layer, number))


def test_staggered_tasks_of_one_shape_keep_apart():
    """The first is never where the last is, though each wait has one of them go a step further."""
    at, seen, sequence = {}, [], [0]

    def task(number):
        for step in range(9):
            at[number] = step
            sequence[0] += 1
            yield sequence[0]
        del at[number]

    interleave([task(number) for number in range(3)], lambda _: seen.append(dict(at)), staggered=True)
    begun = [each for each in seen if len(each) == 3]
    assert begun and all(each[0] > each[2] for each in begun)


class HereAlone:
    """A mode without another process: every port in numpy, float32, private caches.

    Attributes:
        order: what was asked of the ports.
    """

    def __init__(self, network: Network, checkpoint: Checkpoint, slots: Slots) -> None:
        self.network = network
        self.slots = slots
        self.weights = {name: checkpoint.tensor(name, shape).to_float32() for name, shape in network.tensors()}
        self.caches: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.order: list[str] = []

    def begin(self, step):
        self.step = step
        yield from ()

    def load(self, block, out):
        ids = self.step.token_ids[block.first_row : block.first_row + block.rows]
        out[:] = self.weights[self.network.embedding.weight][ids]

    def product(self, linear: Linear, x: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [x @ self.weights[part.weight].T + (self.weights[part.bias] if part.bias else 0) for part in linear.parts],
            axis=1,
        )

    def apply(self, linear, block, x, out):
        self.order.append(linear.role)
        rows = self.slots.view(x, block.first_row, block.rows)
        self.slots.view(out, block.first_row, block.rows)[:] = self.product(linear, rows)
        yield from ()

    def run(self, layer: Layer, step, block) -> Iterator[int | None]:
        self.order.append("attention")
        of = layer.attention
        plan = self.slots.plan
        x = self.slots.view(plan.slot("x"), block.first_row, block.rows)
        qkv = self.product(of.qkv, x).reshape(block.rows, -1, of.head_dim)
        positions = step.positions_of(block)
        cos, sin = (table[positions][:, None] for table in rope_tables(of.rope, of.head_dim, plan.limits.max_model_len))
        rotated = qkv[:, : of.num_heads + of.num_kv_heads]
        half = of.head_dim // 2
        turned = np.concatenate([-rotated[..., half:], rotated[..., :half]], axis=-1)
        rotated[:] = rotated * np.tile(cos, 2) + turned * np.tile(sin, 2)
        q, k, v = np.split(qkv, [of.num_heads, of.num_heads + of.num_kv_heads], axis=1)
        heads = np.empty((block.rows, of.num_heads, of.head_dim), np.float32)
        for tile in block.tiles:
            for segment in step.segments_of(tile):
                rows = slice(segment.first_row - block.first_row, segment.first_row - block.first_row + segment.rows)
                old = self.caches.get((layer.index, segment.sequence), (k[:0], v[:0]))
                kept = [
                    np.concatenate([part[: segment.position], new[rows]]) for part, new in zip(old, (k, v), strict=True)
                ]
                self.caches[layer.index, segment.sequence] = (kept[0], kept[1])
                heads[rows] = self.attend(of, q[rows], *kept, segment.position)
        out = self.slots.view(plan.slot("hidden"), block.first_row, block.rows)
        out[:] = self.product(of.o, heads.reshape(block.rows, -1))
        yield from ()

    @staticmethod
    def attend(of, q, k, v, position):
        group = of.num_heads // of.num_kv_heads
        k, v = (np.repeat(part, group, axis=1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) * of.scale
        ages = position + np.arange(len(q))[:, None] - np.arange(len(k))[None, :]
        hidden = (ages < 0) | (ages >= (of.window or 1 << 30))
        weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(axis=-1, keepdims=True)))
        return np.einsum("hts,shd->thd", weights / weights.sum(axis=-1, keepdims=True), v)


MODES = [
    RandomModel("llama"),
    RandomModel("mistral", {"sliding_window": 16}),
    RandomModel("qwen2", {"tie_word_embeddings": True}),
]


def forward(engine, chunks) -> np.ndarray:
    """The logits of all wanted rows."""
    rows = []
    engine.forward(chunks, lambda first, logits: logits.map(lambda found: rows.append(found.copy())))
    return np.concatenate(rows)


@pytest.mark.parametrize("model", MODES, ids=lambda model: model.family)
def test_a_mode_is_a_set_of_ports_and_needs_no_other_process(model):
    folder = model_folder(model)
    network = Network.of(ModelSpec.from_folder(folder))
    limits = Limits(
        "float32", max_model_len=96, max_num_seqs=2, max_batch_tokens=80, tile_rows=16, tiles_in_flight=2, block_rows=20
    )
    plan = Plan.derive(network, limits)
    slots = Slots(plan, SimpleNamespace(buffer=mmap.mmap(-1, plan.total_bytes)))
    with Checkpoint.open(folder) as checkpoint:
        here = HereAlone(network, checkpoint, slots)
        ops = Operations(network, NormWeights.load(network, checkpoint), slots, Statistics())
    attention = SimpleNamespace(begin=lambda step: None, run=here.run)
    ports = Ports(embedding=here, attention=attention, linears=here, wait=pytest.fail, begin=lambda *_: None)
    engine = Engine(network, plan, ops, ports)
    first, second = random_token_ids(60), random_token_ids(19, seed=1)
    logits = forward(engine, [Chunk(0, 0, first[:50], 50), Chunk(1, 0, second, 19)])
    rest = forward(engine, [Chunk(0, 50, first[50:], 10)])
    slots.release()
    assert relative_distance(np.concatenate([logits[:50], rest]), transformers_logits(folder, first)) < 1e-4
    assert relative_distance(logits[50:], transformers_logits(folder, second)) < 1e-4
    of_layer = ["attention", "gate_up", "down"]
    assert here.order[: 3 * network.num_layers] == of_layer * network.num_layers
    assert here.order[-1] == "lm_head"
