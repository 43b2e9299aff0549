"""A TEE that sends a GPU process of mode `verified` whatever it likes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from hostile_tee import BIG, LIMITS, ROWS, HostileTee, Misbehaviour, scribble

from tsqp_shm.errors import TsqpError
from tsqp_shm.model.digest import LinearsDigest
from tsqp_shm.model.field_weights import load_field_linear
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm import layout
from tsqp_shm.shm.protocol import Opcode

FIELD_LIMITS = replace(LIMITS, mode="verified", dtype="float32")


def linear(tee: HostileTee, index: int = 0, /, **fields: int) -> int:
    """Of rows that both slots have, but for what is given."""
    planned = tee.plan.linears[index]
    assert planned.slots is not None
    in_slot, out_slot = map(tee.index, planned.slots)
    rows = min(ROWS, tee.plan.slot(planned.slots[1]).num_rows)
    legal = {"target": index, "in_slot": in_slot, "out_slot": out_slot, "rows": rows}
    return tee.call(Opcode.LINEAR, **{**legal, **fields})


def every_linear(tee: HostileTee) -> None:
    for target in range(len(tee.plan.linears)):
        linear(tee, target)


def any_words(tee: HostileTee) -> None:
    """Of which half are no elements of the field: the GPU process computes with them."""
    random = np.random.default_rng(1)
    for slot in tee.plan.shared_slots:
        words = tee.slot(slot.name)
        words[:] = random.integers(0, 1 << 32, words.shape)
    every_linear(tee)
    tee.call(Opcode.STOP)


def wrong(**fields: int | str) -> Misbehaviour:
    """Slots by their names."""

    def misbehave(tee: HostileTee) -> None:
        linear(tee, **{name: value if isinstance(value, int) else tee.index(value) for name, value in fields.items()})

    return misbehave


# What the GPU process computes, whatever comes of it.
ALLOWED: dict[str, Misbehaviour] = {
    "any-words": any_words,
    "while-it-multiplies": scribble(layout.SLOTS_OFFSET_BYTES, None, every_linear),
}
MISBEHAVIOURS: dict[str, Misbehaviour] = {
    **ALLOWED,
    "private-slot": wrong(in_slot="x"),
    "private-result": wrong(out_slot="qkv"),
    "slots-of-another": wrong(in_slot="m.act", out_slot="y.hidden"),
    "slots-turned": wrong(in_slot="y.qkv", out_slot="m.x"),
    "no-linear": wrong(target=BIG >> 16),
    "far-rows": wrong(first_row=BIG),
    "segments": wrong(num_segments=1),
    "split-attention": lambda tee: tee.call(Opcode.QKV, in_slot=tee.index("m.x"), out_slot=tee.index("y.qkv"), rows=1),
}


def misbehave(model: Path, session: str, name: str) -> None:
    """Runs a session with one misbehaviour."""
    with (
        contextlib.suppress(TsqpError),
        HostileTee.session(model, session, FIELD_LIMITS, _linears_digest(model)) as tee,
    ):
        MISBEHAVIOURS[name](tee)
        tee.submit(Opcode.STOP)


def invite_other_weights(model: Path, session: str) -> None:
    with contextlib.suppress(TsqpError), HostileTee.session(model, session, FIELD_LIMITS, f"sha256:{0:064x}"):
        pass


def _linears_digest(model: Path) -> str:
    digest = LinearsDigest()
    with Checkpoint.open(model) as checkpoint:
        for of_network in Network.of(ModelSpec.from_folder(model)).linears:
            digest.add(of_network, load_field_linear(checkpoint, of_network))
    return digest.value
