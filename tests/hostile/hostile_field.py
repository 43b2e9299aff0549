"""A hostile GPU process of mode `verified`: multiplies as it should until its moment, and then gives what is false.

    python tests/hostile/hostile_field.py MODEL SESSION MISBEHAVIOUR [LOG]

MISBEHAVIOUR is one of `hostile_gpu.py`, or of `TAMPERINGS` with the Linear whose result it is: `plus-one:down`. What it
was asked for it writes to LOG.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from hostile_gpu import FAULT_STEP, MISBEHAVIOURS, HostileGpu, Misbehaviour, Moment, moment, play

from tsqp_shm import _native
from tsqp_shm.model.field_weights import load_field_linear
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm import layout
from tsqp_shm.shm.progress import Progress
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record
from tsqp_shm.shm.slots import slot_array
from tsqp_shm.shm.transport import Transport

P = 2**31 - 1
# The Linears of a layer, and lm_head; of each one the layer in which its result is false.
LAYERS = {"qkv": 0, "o": 1, "gate_up": 0, "down": 1, "lm_head": 0}

Words = npt.NDArray[np.uint32]


@cache
def integers_of(model: Path) -> tuple[npt.NDArray[np.int64], ...]:
    """The weights of each Linear. Shapes: [outputs, inputs]."""
    network = Network.of(ModelSpec.from_folder(model))
    with Checkpoint.open(model) as checkpoint:
        return tuple(
            load_field_linear(checkpoint, linear).quantised(0, linear.outputs).astype(np.int64)
            for linear in network.linears
        )


def product(m: Words, weights: npt.NDArray[np.int64]) -> Words:
    """m W mod p in 64 bits, whose sums these models' rows are far too short to wrap."""
    return (m.astype(np.int64) @ weights.T % P).astype(np.uint32)


class Asked(NamedTuple):
    """A submission as the GPU process sees it, and what lies in the arena's progress words then.

    Attributes:
        record: its bytes, with an epoch of 0.
        is_zero: which of the rows that it multiplies hold nothing but zeros.
    """

    step: int
    record: str
    rows: int
    is_zero: list[bool]
    progress: Progress


class FieldGpu(HostileGpu):
    """Attributes:
    weights: of each Linear, at its number.
    asked: every submission, the oldest first.
    """

    instead: ClassVar[dict[str, str]] = {"EMBED": "QKV", "SCORES": "O", "CONTEXT": "O"}

    def __init__(self, model: Path, session: str | Transport, *, has_pulse: bool = True) -> None:
        super().__init__(model, session, has_pulse=has_pulse)
        self.weights = integers_of(model)
        self.asked: list[Asked] = []
        # The newest result of each Linear, and the one before.
        self.given: dict[int, Words] = {}

    def begins_step(self, record: Record) -> bool:
        return (record.opcode, record.target, record.first_row) == (Opcode.LINEAR, 0, 0)

    def receive(self) -> Record:
        record = super().receive()
        is_zero = [] if record.in_slot == NO_SLOT else (~self.m_of(record).any(axis=1)).tolist()
        bytes_of = record._replace(epoch=0).pack().hex()
        self.asked.append(Asked(self.step, bytes_of, record.rows, is_zero, self.progress()))
        return record

    def progress(self) -> Progress:
        """What the TEE says of itself to whoever looks."""
        first = layout.PROGRESS_OFFSET_BYTES
        return Progress(
            *(_native.load_word(self.arena.buffer, first + 8 * index) for index in range(len(Progress._fields)))
        )

    def _rows(self, slot: int, record: Record) -> Words:
        return slot_array(self.arena, self.plan.slots[slot])[record.first_row : record.first_row + record.rows]

    def m_of(self, record: Record) -> Words:
        return self._rows(record.in_slot, record)

    def y_of(self, record: Record) -> Words:
        return self._rows(record.out_slot, record)

    def fill(self, record: Record) -> None:
        if record.out_slot == NO_SLOT or not self.writes:
            return
        y = product(self.m_of(record), self.weights[record.target])
        self.given[record.target] = y
        self.y_of(record)[:] = y


# What is made of a result y [rows, outputs]: the false one.
Tampering = Callable[[FieldGpu, Record, Words], Words]


def plus_one(gpu: FieldGpu, record: Record, y: Words) -> Words:
    y[-1, 3] = (int(y[-1, 3]) + 1) % P
    return y


def plus_one_minus_one(gpu: FieldGpu, record: Record, y: Words) -> Words:
    y[-1, 3] = (int(y[-1, 3]) + 1) % P
    y[-1, 8] = (int(y[-1, 8]) - 1) % P
    return y


def plus_p(gpu: FieldGpu, record: Record, y: Words) -> Words:
    """The same element of the field by another word."""
    y[0, 2] += P
    return y


def word(value: int) -> Tampering:
    def tamper(gpu: FieldGpu, record: Record, y: Words) -> Words:
        y[0, -1] = value
        return y

    return tamper


def swapped_rows(gpu: FieldGpu, record: Record, y: Words) -> Words:
    assert (y[0] != y[1]).any()
    y[[0, 1]] = y[[1, 0]]
    return y


def stale(gpu: FieldGpu, record: Record, y: Words) -> Words:
    """Nothing is computed: what lies there is the result of the pass before."""
    before = gpu.given[record.target]
    assert before.shape == y.shape
    return before


def another_layers(gpu: FieldGpu, record: Record, y: Words) -> Words:
    """The product of the same rows with another Linear of as many inputs; of lm_head, the layers'."""
    inputs = gpu.weights[record.target].shape[1]
    others = [index for index, other in enumerate(gpu.weights) if other.shape[1] == inputs and index != record.target]
    same = [index for index in others if gpu.weights[index].shape == gpu.weights[record.target].shape]
    return np.resize(product(gpu.m_of(record), gpu.weights[(same or others)[-1]]), y.shape)


def one_changed_weight(gpu: FieldGpu, record: Record, y: Words) -> Words:
    changed = gpu.weights[record.target].copy()
    m = gpu.m_of(record)
    changed[5, int(np.flatnonzero(m[0])[0])] += 1
    return product(m, changed)


def both_rewritten(gpu: FieldGpu, record: Record, y: Words) -> Words:
    """Another row in the arena, and its own product beside it: they belong to each other."""
    m = gpu.m_of(record)
    m[0, 0] = (int(m[0, 0]) + 1) % P
    return product(m, gpu.weights[record.target])


def huge(gpu: FieldGpu, record: Record, y: Words) -> Words:
    """The largest numbers that a result can have: legal words, from which a later layer may overflow."""
    return np.full_like(y, P // 2)


def as_it_is(gpu: FieldGpu, record: Record, y: Words) -> Words:
    return y


TAMPERINGS: dict[str, Tampering] = {
    "plus-one": plus_one,
    "plus-one-minus-one": plus_one_minus_one,
    "plus-p": plus_p,
    "word-p": word(P),
    "word-of-ones": word(0xFFFFFFFF),
    "swapped-rows": swapped_rows,
    "stale": stale,
    "another-layers": another_layers,
    "one-changed-weight": one_changed_weight,
    "both-rewritten": both_rewritten,
    "huge": huge,
}


def tampered(tampering: Tampering, then: Callable[[], None] = lambda: None) -> Misbehaviour:
    def misbehave(gpu: HostileGpu, record: Record) -> None:
        assert isinstance(gpu, FieldGpu)
        y = product(gpu.m_of(record), gpu.weights[record.target])
        gpu.y_of(record)[:] = tampering(gpu, record, y)
        gpu.answer(record)
        then()

    return misbehave


def die() -> None:
    """When the false result has left, by whatever carries it."""
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def misbehaviour(name: str) -> tuple[Moment, Misbehaviour]:
    """By what it is called on the command line: TAMPERING[-and-die]:LINEAR[:STEP], or a name of `hostile_gpu`.

    TAMPERING may be `true`, and nothing is false then.
    """
    what, _, where = name.partition(":")
    if not where:
        return MISBEHAVIOURS[what]
    role, _, step = where.partition(":")
    then = die if what.endswith("-and-die") else lambda: None
    when = moment(role.upper(), step=int(step or FAULT_STEP), layer=LAYERS[role])
    return when, tampered({**TAMPERINGS, "true": as_it_is}[what.removesuffix("-and-die")], then)


def main(arguments: Sequence[str]) -> None:
    model, session, name, *log = arguments
    gpu = FieldGpu(Path(model), session, has_pulse=name != "no-pulse")
    play(gpu, *misbehaviour(name))
    if log:
        Path(log[0]).write_text(json.dumps([asked._asdict() for asked in gpu.asked]))


if __name__ == "__main__":
    main(sys.argv[1:])
