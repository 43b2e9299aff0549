"""A hostile TEE process: begins a session, and submits what no engine would."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from processes import beside

from tsqp_shm import _native
from tsqp_shm.config import Limits
from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.doorbell import Doorbell, open_doorbell
from tsqp_shm.shm.invitation import Invitation
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, PeerWatch
from tsqp_shm.shm.plan import Operation, Plan
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record
from tsqp_shm.shm.slots import slot_array

LIMITS = Limits(
    dtype="bfloat16", max_model_len=128, max_num_seqs=2, max_batch_tokens=32, tile_rows=16, tiles_in_flight=2
)
ROWS = 20


class HostileTee:
    """The TEE's end of a session, without a rule."""

    def __init__(self, arena: Arena, doorbell: Doorbell) -> None:
        self.arena = arena
        self.plan = arena.plan
        self.memory = np.frombuffer(arena.buffer, np.uint8)
        self._doorbell = doorbell
        self._watch = PeerWatch(arena, "gpu")
        self._submitted = 0

    @classmethod
    @contextlib.contextmanager
    def session(cls, model: Path, name: str, limits: Limits = LIMITS, linears_digest: str = "") -> Iterator[HostileTee]:
        """Begins a session as an honest TEE does."""
        plan = Plan.derive(Network.of(ModelSpec.from_folder(model)), limits)
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(Session.begin(name))
            arena = stack.enter_context(
                Arena.create(session.create_memory(plan.total_bytes), plan, secrets.randbits(63) | 1)
            )
            stack.callback(_native.Heartbeat(arena.buffer, "tee", HEARTBEAT_INTERVAL_MS).release)
            doorbell = open_doorbell("adaptive", arena, "tee", session.open_waker, 0, 2000)
            stack.callback(doorbell.close)
            invitation = Invitation(
                session.endpoint, "adaptive", 0, 2000, limits, plan.geometry.plain(), os.getpid(), linears_digest
            )
            arena.publish(invitation.pack())
            tee = cls(arena, doorbell)
            tee.submit(Opcode.READY)
            tee.answer()
            yield tee

    def record(self, opcode: Opcode, /, **fields: int) -> Record:
        self._submitted += 1
        return Record(self._submitted, self.arena.epoch, opcode)._replace(**fields)

    def submit(self, opcode: Opcode, /, **fields: int) -> None:
        self._doorbell.send(self.record(opcode, **fields).pack())

    def answer(self) -> Record:
        return Record.unpack(self._doorbell.receive(self._watch, 5.0, "an answer"))

    def call(self, opcode: Opcode, /, **fields: int) -> int:
        """Submits and waits. Returns the status."""
        self.submit(opcode, **fields)
        return self.answer().status

    def slot(self, name: str) -> np.ndarray[Any, Any]:
        return slot_array(self.arena, self.plan.slot(name))

    def index(self, name: str) -> int:
        return self.plan.slot(name).index

    def embed(self, segments: Sequence[Sequence[int]] = ((0, 0, 0, 16), (0, 16, 16, 4)), **fields: int) -> int:
        """A step of ROWS rows: honest but for what is given."""
        table = np.array(segments, np.int64).astype(np.uint32).view(np.int32)
        self.slot("segments")[: len(table)] = table
        legal = {
            "in_slot": self.index("tokens"),
            "out_slot": self.index("hidden"),
            "rows": ROWS,
            "num_segments": len(table),
        }
        return self.call(Opcode.EMBED, **{**legal, **fields})

    def linear(self, name: str, layer: int | None) -> dict[str, int]:
        return {"target": self.plan.linear_operations.index(Operation(name, layer))}

    def layer(self, first_segment: int = 0, num_segments: int = 1, layer: int = 0) -> None:
        """Every operation of a layer and the logits, in no order that makes sense."""
        of_layer = {"target": layer}
        tile = {"first_segment": first_segment, "num_segments": num_segments, **of_layer}
        for opcode, in_slot, out_slot, extra in (
            (Opcode.LINEAR, "x", "logits", {"rows": 2, **self.linear("LM_HEAD", None)}),
            (Opcode.CONTEXT, "scores.1", None, tile),
            (Opcode.QKV, "x", "qk", of_layer),
            (Opcode.SCORES, "qk", "scores.0", tile),
            (Opcode.SCORES, "qk", "scores.1", tile),
            (Opcode.CONTEXT, "scores.0", "hidden", tile),
            (Opcode.LINEAR, "act", "hidden", self.linear("DOWN", layer)),
            (Opcode.LINEAR, "x", "gate_up", self.linear("GATE_UP", layer)),
        ):
            out = NO_SLOT if out_slot is None else self.index(out_slot)
            self.call(opcode, **{"in_slot": self.index(in_slot), "out_slot": out, "rows": ROWS, **extra})


Misbehaviour = Callable[[HostileTee], object]


def wrong(field: str) -> Misbehaviour:
    def misbehave(tee: HostileTee) -> None:
        value = getattr(tee.record(Opcode.EMBED, in_slot=tee.index("tokens"), out_slot=tee.index("hidden")), field)
        tee.embed(**{field: value ^ 0x101})

    return misbehave


def segments(*table: Sequence[int]) -> Misbehaviour:
    def misbehave(tee: HostileTee) -> None:
        tee.embed(table)
        tee.layer(0, len(table))

    return misbehave


def tokens(token: int) -> Misbehaviour:
    def misbehave(tee: HostileTee) -> None:
        tee.slot("tokens")[:] = token
        tee.embed()

    return misbehave


def without_a_step(tee: HostileTee) -> None:
    tee.layer()


def foreign_segments(tee: HostileTee) -> None:
    """Of the table, but not of the step."""
    tee.embed()
    tee.layer(1, 2)


def without_sense(tee: HostileTee) -> None:
    """In bounds, in an order that no engine has: the GPU process computes it."""
    for _ in range(2):
        tee.embed()
        tee.layer(0, 1)
        tee.layer(1, 1, layer=1)
    tee.call(Opcode.STOP)


def a_step(tee: HostileTee) -> None:
    tee.embed()
    tee.layer()


def scribble(first_byte: int, end_byte: int | None, work: Misbehaviour = a_step) -> Misbehaviour:
    """Random bytes while the GPU process reads."""

    def misbehave(tee: HostileTee) -> None:
        part = tee.memory[first_byte:end_byte]
        noise = np.random.default_rng(1).integers(0, 256, 2 * len(part), np.uint8)

        def act() -> None:
            start = random.randrange(len(part))
            part[:] = noise[start : start + len(part)]

        beside(act)
        with contextlib.suppress(TsqpError):
            for _ in range(20):
                work(tee)

    return misbehave


def truncate(size_bytes: int) -> Misbehaviour:
    def misbehave(tee: HostileTee) -> None:
        tee.embed()
        os.truncate(f"/dev/shm{tee.arena.name}", size_bytes)
        with contextlib.suppress(PeerDied):
            tee.submit(Opcode.QKV, in_slot=tee.index("x"), out_slot=tee.index("qk"), rows=ROWS)

    return misbehave


def no_more_answers_read(tee: HostileTee) -> None:
    """More submissions than a ring holds."""
    tail = layout.CONTROL_OFFSET_BYTES
    _native.store_word(tee.arena.buffer, tail, _native.load_word(tee.arena.buffer, tail) + layout.RING_DEPTH + 1)


BIG = 1 << 31
# Every field alone, and every value at its edge, is tests/test_protocol.py's.
FIELDS = ("sequence", "epoch", "opcode", "in_slot", "rows", "num_segments", "status")
MISBEHAVIOURS: dict[str, Misbehaviour] = {
    **{f"wrong-{field}": wrong(field) for field in FIELDS},
    "token-negative": tokens(-1),
    "token-large": tokens(BIG - 1),
    "segment-negative": segments((0, -1, 0, ROWS)),
    "segment-sequence": segments((2, 0, 0, ROWS)),
    "segment-position": segments((0, 1, 0, ROWS)),
    "segment-far": segments((0, BIG - 1, 0, ROWS)),
    "segment-rows": segments((0, 0, 0, BIG - 1)),
    "segment-too-long": segments((0, 0, 0, ROWS)),
    "segment-hole": segments((0, 0, 0, 1), (0, 1, 2, ROWS - 2)),
    "segment-overlap": segments((0, 0, 0, 16), (0, 16, 15, 5)),
    "segment-empty": segments((0, 0, 0, 0), (0, 0, 0, ROWS)),
    "segment-again": segments((0, 0, 0, 10), (0, 0, 10, 10)),
    "segments-foreign": foreign_segments,
    "no-step": without_a_step,
    "no-sense": without_sense,
    "scribble-slots": scribble(layout.SLOTS_OFFSET_BYTES, None),
    "scribble-rings": scribble(layout.CONTROL_OFFSET_BYTES, layout.SLOTS_OFFSET_BYTES),
    "scribble-header": scribble(0, layout.CONTROL_OFFSET_BYTES),
    "truncate": truncate(0),
    "truncate-slots": truncate(layout.SLOTS_OFFSET_BYTES),
    "ring-overrun": no_more_answers_read,
}


def _rewritten(**fields: object) -> Callable[[bytes], bytes]:
    return lambda honest: json.dumps({**json.loads(honest), **fields}).encode()


def _other_limits(**limits: object) -> Callable[[bytes], bytes]:
    return lambda honest: _rewritten(limits={**json.loads(honest)["limits"], **limits})(honest)


# What an honest invitation is put in the place of.
INVITATIONS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda honest: b"",
    "endless": lambda honest: b"",
    "junk": lambda honest: os.urandom(layout.MAX_INVITATION_BYTES),
    "cut": lambda honest: honest[:100],
    "deep": lambda honest: b"[" * layout.MAX_INVITATION_BYTES,
    "long-number": lambda honest: b"9" * layout.MAX_INVITATION_BYTES,
    "no-limits": _rewritten(limits=None),
    "other-limits": _other_limits(max_model_len=129),
    "vast-limits": _other_limits(max_model_len=1 << 20, max_batch_tokens=1 << 20, tile_rows=4096, max_num_seqs=1024),
    "other-geometry": _rewritten(geometry={"hidden_size": 1 << 40}),
    "other-mode": _other_limits(mode="verified"),
    "mode-of-one-process": lambda honest: _rewritten(doorbell="")(_other_limits(mode="tee-only")(honest)),
    "other-doorbell": _rewritten(doorbell="loud"),
    "file-as-endpoint": _rewritten(endpoint="ipc:///etc/passwd"),
    "no-endpoint": _rewritten(endpoint=""),
    "network-endpoint": _rewritten(endpoint="tcp://192.0.2.1:9"),
}


def invite(model: Path, name: str, invitation: str, invited: int) -> None:
    """Publishes a false invitation under a heartbeat that moves, and lives until it is killed.

    Args:
        invited: a pipe, to be told when it is published.
    """
    plan = Plan.derive(Network.of(ModelSpec.from_folder(model)), LIMITS)
    session = Session.begin(name)
    arena = Arena.create(session.create_memory(plan.total_bytes), plan, 1)
    heartbeat = _native.Heartbeat(arena.buffer, "tee", HEARTBEAT_INTERVAL_MS)
    honest = Invitation(session.endpoint, "adaptive", 0, 2000, LIMITS, plan.geometry.plain(), os.getpid())
    arena.publish(INVITATIONS[invitation](honest.pack()))
    if invitation == "endless":
        _native.store_word(arena.buffer, layout.INVITATION_LENGTH_OFFSET_BYTES, 1 << 63)
    os.write(invited, b"x")
    signal.pause()
    heartbeat.release()


def misbehave(model: Path, session: str, name: str) -> None:
    """Runs a session with one misbehaviour."""
    with contextlib.suppress(TsqpError), HostileTee.session(model, session) as tee:
        MISBEHAVIOURS[name](tee)
        # Whatever it made of that, an honest end would only hide it.
        tee.submit(Opcode.STOP)
