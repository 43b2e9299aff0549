#!/usr/bin/env python3
"""What a step of few rows pays for float32 activations: the GPU process's products on a CPU, by the rows of the step.

One thread, processor time, each step of the model once with slots in bfloat16 and once in float32, in turns; no TEE
process, and attention over what the cache holds: 512 keys a sequence in decode, its own rows in a prompt.

    scripts/bench_float32_rows.py
    scripts/bench_float32_rows.py MODEL --runs 21
"""

from __future__ import annotations

import mmap
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from script_flags import ScriptParser, positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tsqp_shm.bench.report import environment, machine_line
from tsqp_shm.bench.tables import print_columns, say
from tsqp_shm.config import EngineConfig
from tsqp_shm.demo.model import demo_model_folder
from tsqp_shm.gpu import _products
from tsqp_shm.gpu.device import Device
from tsqp_shm.gpu.packed_products import PackedProducts
from tsqp_shm.gpu.weights import load_weights
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import FLOAT32_TILE_ROWS, IN_FLOAT32, Plan
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record
from tsqp_shm.shm.slots import slot_array
from tsqp_shm.shm.tiling import Segment, group_tiles

CONTEXT, MAX_ROWS = 512, 128
# Rows of a step, and whether each is another sequence's.
STEPS = [(1, True), (4, True), (8, True), (16, True), (64, True), (8, False), (40, False), (64, False), (128, False)]


class Side:
    """The products of one model on slots of this process's own."""

    def __init__(self, folder: Path) -> None:
        self.network = Network.of(ModelSpec.from_folder(folder))
        config = EngineConfig(max_num_seqs=MAX_ROWS, max_model_len=CONTEXT + 64, float32_rows=MAX_ROWS)
        self.plan = Plan.derive(self.network, config.limits(CONTEXT + 64, 1))
        arena = SimpleNamespace(plan=self.plan, buffer=mmap.mmap(-1, self.plan.total_bytes))
        self.index = {slot.name: slot.index for slot in self.plan.slots}
        self.device = Device(torch.device("cpu"), arena)
        with Checkpoint.open(folder) as checkpoint:
            weights = load_weights(self.network, checkpoint, torch.bfloat16, torch.device("cpu"))
            self.products = PackedProducts(self.network, self.plan, weights, self.device)
        for slot in self.plan.slots:
            # Denormals and NaN have their own speeds: 0.01, nearly.
            value = 0x3C24 if slot.dtype == "bfloat16" else 0.01
            if slot.dtype in ("bfloat16", "float32"):
                slot_array(arena, slot)[:] = np.array(value).astype(slot_array(arena, slot).dtype)
        for sequence in range(MAX_ROWS):
            for position in range(0, CONTEXT, 256):
                self.products.begin_step([Segment(sequence, position, 0, 256)])

    def run(self, rows: int, is_decode: bool, prefix: str) -> float:
        """Processor seconds of one step."""
        tile_rows = FLOAT32_TILE_ROWS if prefix else self.plan.limits.tile_rows
        if is_decode:
            segments = [Segment(sequence, CONTEXT, sequence, 1) for sequence in range(rows)]
        else:
            cuts = range(0, rows, tile_rows)
            segments = [Segment(0, first, first, min(tile_rows, rows - first)) for first in cuts]
        tiles = group_tiles(segments, tile_rows)
        products, network = self.products, self.network

        def record(target: int, source: str, to: str | None, tile: tuple[int, int] = (0, 1), opcode: int = 0) -> Record:
            out = NO_SLOT if to is None else self.index[to if to == "logits" else prefix + to]
            return Record(1, 1, opcode, target, self.index[prefix + source], out, 0, rows, *tile)

        begun = time.thread_time()
        products.begin_step(segments)
        for layer in network.layers:
            products.qkv(record(layer.index, "x", "qk"))
            for tile in tiles:
                products.scores(record(layer.index, "qk", "scores.0", tile, Opcode.SCORES))
                hidden = "hidden" if tile == tiles[-1] else None
                products.context(record(layer.index, "scores.0", hidden, tile, Opcode.CONTEXT))
            products.linear(record(layer.mlp.gate_up.index, "x", "gate_up"))
            products.linear(record(layer.mlp.down.index, "act", "hidden"))
        wanted = min(rows, self.plan.slot("logits").num_rows) if is_decode else 1
        products.linear(record(network.lm_head.index, "x", "logits")._replace(rows=wanted))
        return time.thread_time() - begun


def main() -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="a Hugging Face folder (the demo model)")
    parser.add_argument("--runs", type=positive, default=11, metavar="N", help="of each step, in turns (11)")
    arguments = parser.parse_args()
    _products.set_num_threads(1, 0)
    side = Side(arguments.model or demo_model_folder(lambda line: print(line, file=sys.stderr)))
    say(machine_line(environment()))
    cells = []
    for rows, is_decode in STEPS:
        taken: dict[str, list[float]] = {"": [], IN_FLOAT32: []}
        for run in range(arguments.runs + 1):
            for prefix, seconds in taken.items():
                found = side.run(rows, is_decode, prefix)
                # The first finds nothing in any cache.
                seconds += [found] if run else []
        ratio = statistics.median(wide / narrow for narrow, wide in zip(*taken.values(), strict=True))
        medians = [f"{statistics.median(seconds) * 1e3:.2f} ms" for seconds in taken.values()]
        cells.append(["sequences" if is_decode else "a prompt", str(rows), *medians, f"{ratio:.2f}"])
    print_columns(["step of", "rows", "bfloat16", "float32", "ratio"], cells, names=2)
    side.device.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
