"""A hostile GPU process: attaches to a session and breaks one rule, which its last argument names.

    python tests/hostile/hostile_gpu.py MODEL SESSION MISBEHAVIOUR

Until its moment comes it does all that a GPU process does, but for the arithmetic: its results are finite and false. In
mode `plain` nothing can tell them from true ones. In `verified` they are found, so there `hostile_field.py` breaks the
rules, which gives true ones until then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from processes import beside

from tsqp_shm import _native
from tsqp_shm.errors import PeerDied, ProtocolError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm import layout
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.doorbell import open_doorbell
from tsqp_shm.shm.invitation import Invitation
from tsqp_shm.shm.liveness import HEARTBEAT_INTERVAL_MS, PeerWatch
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.protocol import NO_SLOT, Opcode, Record, Status, operation_of, pack_identity
from tsqp_shm.shm.slots import slot_array
from tsqp_shm.shm.transport import Transport, Waker

# The forward pass in which it happens: the first is the prompt's, and each ends in a token.
FAULT_STEP = 3
# Near the end of what a TEE of `test_hostile_gpu` waits.
READY_LATE_S = 1.6
SUBMISSION_HEAD, SUBMISSION_PARKED, COMPLETION_TAIL, COMPLETION_PARKED = (
    layout.CONTROL_OFFSET_BYTES + 128 * word for word in (1, 2, 3, 5)
)
ONE = {"bfloat16": 0x3F80, "float32": 1.0}
NOT_FINITE = {"nan": {"bfloat16": 0x7FC0, "float32": np.nan}, "infinity": {"bfloat16": 0xFF80, "float32": -np.inf}}


class HostileGpu:
    """One end of a session, with everything at hand that a process of the same user can reach.

    Attributes:
        instead: of an operation that the mode does not have, the one whose moment stands for its.
    """

    instead: ClassVar[dict[str, str]] = {}

    def __init__(self, model: Path, session: str | Transport, *, has_pulse: bool = True) -> None:
        transport = PosixTransport(session) if isinstance(session, str) else session
        joined = transport.join(30.0, lambda line: None)
        invitation = Invitation.parse(joined.invitation)
        self.plan = Plan.derive(Network.of(ModelSpec.from_folder(model)), invitation.limits)
        self.arena = Arena.attach(joined.map_memory(self.plan.total_bytes), self.plan)
        self.memory = np.frombuffer(self.arena.buffer, np.uint8)
        self.endpoint = invitation.endpoint
        self.heartbeat = _native.Heartbeat(self.arena.buffer, "gpu", HEARTBEAT_INTERVAL_MS) if has_pulse else None
        self.watch = PeerWatch(self.arena, "tee")
        self.waker: Waker

        def open_waker() -> Waker:
            self.waker = joined.open_waker(invitation.endpoint)
            return self.waker

        self.doorbell = open_doorbell(
            invitation.doorbell, self.arena, "gpu", open_waker, invitation.spin_us, invitation.yield_us
        )
        joined.close()
        self.value = ONE
        self.writes = True
        self.step = 0

    def close(self) -> None:
        """Lets go of the arena, where the process lives on."""
        if self.heartbeat is not None:
            self.heartbeat.release()
        self.doorbell.close()
        del self.memory
        self.arena.close()

    def receive(self) -> Record:
        record = Record.unpack(self.doorbell.receive(self.watch, None, "a submission"))
        self.step += self.begins_step(record)
        return record

    def begins_step(self, record: Record) -> bool:
        return record.opcode == Opcode.EMBED

    def fill(self, record: Record) -> None:
        """Writes a false result: the rows, or all of a score slot."""
        if record.out_slot == NO_SLOT or not self.writes:
            return
        slot = self.plan.slots[record.out_slot]
        rows = slice(None)
        if slot.kind != "tile":
            rows = slice(record.first_row, record.first_row + record.rows)
        slot_array(self.arena, slot)[rows] = self.value[slot.dtype]

    def answer(self, record: Record, **false: int) -> None:
        self.doorbell.send(record._replace(**false).pack())

    def work(self, record: Record) -> None:
        self.fill(record)
        self.answer(record)

    def be_ready(self, record: Record) -> None:
        self.answer(record, value=pack_identity(os.getpid(), None, "in place"))

    def until_the_tee_ends(self) -> None:
        while True:
            self.watch.check()
            time.sleep(0.02)

    def serve(self, moment: Moment, misbehave: Misbehaviour) -> None:
        """Raises:
        PeerDied, ProtocolError: the TEE process has ended.
        """
        while True:
            record = self.receive()
            if moment(self, record):
                moment = never
                misbehave(self, record)
            elif record.opcode == Opcode.READY:
                self.be_ready(record)
            elif record.opcode == Opcode.STOP:
                self.answer(record)
                return
            else:
                self.work(record)


Moment = Callable[[HostileGpu, Record], bool]
Misbehaviour = Callable[[HostileGpu, Record], None]


def never(gpu: HostileGpu, record: Record) -> bool:
    return False


def moment(operation: str, step: int = FAULT_STEP, layer: int = 0) -> Moment:
    def is_now(gpu: HostileGpu, record: Record) -> bool:
        name, of_layer = operation_of(record.opcode, record.target, gpu.plan.linear_operations)
        return gpu.step == step and (name, of_layer or 0) == (gpu.instead.get(operation, operation), layer)

    return is_now


# What happens at the moment, instead of an honest answer.


def late(gpu: HostileGpu, record: Record) -> None:
    with contextlib.suppress(PeerDied):
        gpu.until_the_tee_ends()
    gpu.work(record)


def silent(gpu: HostileGpu, record: Record) -> None:
    gpu.until_the_tee_ends()


def ready_late(gpu: HostileGpu, record: Record) -> None:
    """In form, and then it answers nothing more."""
    time.sleep(READY_LATE_S)
    gpu.be_ready(record)
    gpu.until_the_tee_ends()


def twice(gpu: HostileGpu, record: Record) -> None:
    gpu.work(record)
    gpu.work(record)


def out_of_order(gpu: HostileGpu, record: Record) -> None:
    second = gpu.receive()
    gpu.work(second)
    gpu.work(record)


def wrong(field: str) -> Misbehaviour:
    def misbehave(gpu: HostileGpu, record: Record) -> None:
        gpu.fill(record)
        gpu.answer(record, **{field: getattr(record, field) ^ 0x101})

    return misbehave


def failed(gpu: HostileGpu, record: Record) -> None:
    gpu.answer(record, status=Status.FAILED)
    gpu.until_the_tee_ends()


def rejected(gpu: HostileGpu, record: Record) -> None:
    gpu.answer(record, status=Status.REJECTED)


def boast(gpu: HostileGpu, record: Record) -> None:
    gpu.fill(record)
    gpu.answer(record, busy_ns=(1 << 64) - 1, value=(1 << 64) - 1)


def not_finite(kind: str) -> Misbehaviour:
    def misbehave(gpu: HostileGpu, record: Record) -> None:
        gpu.value = NOT_FINITE[kind]
        gpu.work(record)

    return misbehave


def not_finite_in_row(row: int) -> Misbehaviour:
    """All other rows are numbers, of which a token could be drawn."""

    def misbehave(gpu: HostileGpu, record: Record) -> None:
        gpu.fill(record)
        slot = gpu.plan.slots[record.out_slot]
        slot_array(gpu.arena, slot)[range(record.rows)[row]] = NOT_FINITE["nan"][slot.dtype]
        gpu.answer(record)

    return misbehave


def drip(pause_s: float) -> Misbehaviour:
    """From now on each answer comes late, and none so late that its wait would end."""

    def misbehave(gpu: HostileGpu, record: Record) -> None:
        def work(record: Record) -> None:
            time.sleep(pause_s)
            gpu.fill(record)
            gpu.answer(record)

        gpu.work = work  # type: ignore[method-assign]
        gpu.work(record)

    return misbehave


def scribble(first_byte: int, end_byte: int | None) -> Misbehaviour:
    """Random bytes, without end, while the TEE reads."""

    def misbehave(gpu: HostileGpu, record: Record) -> None:
        part = gpu.memory[first_byte:end_byte]
        noise = np.random.default_rng(record.sequence).integers(0, 256, 2 * len(part), np.uint8)

        def act() -> None:
            start = random.randrange(len(part))
            part[:] = noise[start : start + len(part)]

        beside(act)
        gpu.work(record)

    return misbehave


def flip_flags(gpu: HostileGpu, record: Record) -> None:
    words = (
        SUBMISSION_PARKED, COMPLETION_PARKED, layout.TEE_HEARTBEAT_OFFSET_BYTES, layout.GPU_HEARTBEAT_OFFSET_BYTES,
    )  # fmt: skip
    beside(lambda: _native.store_word(gpu.arena.buffer, random.choice(words), random.getrandbits(64)))
    gpu.work(record)


def move(word: int, by: int) -> Misbehaviour:
    """A ring's position. An answer would put the tail right again, so there is none where that is moved."""

    def misbehave(gpu: HostileGpu, record: Record) -> None:
        position = _native.load_word(gpu.arena.buffer, word)
        _native.store_word(gpu.arena.buffer, word, (position + by) % (1 << 64))
        if word == COMPLETION_TAIL:
            gpu.until_the_tee_ends()
        gpu.work(record)

    return misbehave


def junk(gpu: HostileGpu, record: Record) -> None:
    """In the TEE's own connection, pieces of every length."""
    for length in range(1, 200):
        gpu.waker.try_send(os.urandom(length))
    gpu.work(record)


def flood(gpu: HostileGpu, record: Record) -> None:
    """As much as the TEE's connection takes."""
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        gpu.waker.try_send(bytes(1 << 16))
    gpu.work(record)


def hang_up(gpu: HostileGpu, record: Record) -> None:
    """Ends the TEE's connection and lets it come back, many times."""
    scheme, _, address = gpu.endpoint.partition("://")
    gpu.waker.close()
    with socket.socket(socket.AF_UNIX if scheme == "ipc" else socket.AF_INET) as listening:
        if scheme == "ipc":
            Path(address).unlink(missing_ok=True)
            listening.bind(address)
        else:
            host, _, port = address.partition(":")
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, int(port)))
        listening.listen()
        listening.settimeout(0.5)
        # In mode zmq the TEE has had enough of it when the pieces make a record.
        with contextlib.suppress(TimeoutError):
            for length in range(20):
                # The TEE may have gone first.
                with listening.accept()[0] as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.send(os.urandom(length))
    gpu.until_the_tee_ends()


def truncate(size_bytes: int) -> Misbehaviour:
    def misbehave(gpu: HostileGpu, record: Record) -> None:
        os.truncate(f"/dev/shm{gpu.arena.name}", size_bytes)
        # It would fall over the missing slots itself, now and at what the TEE has submitted behind this.
        gpu.writes = False
        gpu.work(record)

    return misbehave


def truncate_sometime(gpu: HostileGpu, record: Record) -> None:
    """At a moment of another process's choosing, so most likely while a kernel runs."""

    def act() -> None:
        time.sleep(random.uniform(0, 0.01))
        os.truncate(f"/dev/shm{gpu.arena.name}", 0)

    beside(act)
    gpu.work(record)


def punch(offset_bytes: int) -> Misbehaviour:
    """Makes holes of all pages from there on: to the TEE they are zeros."""

    def misbehave(gpu: HostileGpu, record: Record) -> None:
        size_bytes = gpu.arena.plan.total_bytes - offset_bytes
        memory = os.open(f"/dev/shm{gpu.arena.name}", os.O_RDWR)
        keep_size, punch_hole = 1, 2
        libc = ctypes.CDLL(None, use_errno=True)
        offset_of_64_bits = ctypes.c_int64(offset_bytes), ctypes.c_int64(size_bytes)
        if libc.fallocate(memory, keep_size | punch_hole, *offset_of_64_bits) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")
        os.close(memory)
        gpu.work(record)

    return misbehave


def unlink(gpu: HostileGpu, record: Record) -> None:
    Path(f"/dev/shm{gpu.arena.name}").unlink()
    gpu.work(record)


def stop(gpu: HostileGpu, record: Record) -> None:
    _helped_by(lambda: gpu.until_the_tee_ends(), signal.SIGKILL)


def pause(gpu: HostileGpu, record: Record) -> None:
    _helped_by(lambda: time.sleep(0.3), signal.SIGCONT)
    gpu.work(record)


def _helped_by(wait: Callable[[], None], then: signal.Signals) -> None:
    """Stops this process; another one waits, and then sends it a signal."""
    stopped = os.getpid()
    if os.fork() == 0:
        with contextlib.suppress(BaseException):
            wait()
        os.kill(stopped, then)
        os._exit(0)
    os.kill(stopped, signal.SIGSTOP)


def vanish(gpu: HostileGpu, record: Record) -> None:
    os._exit(0)


FIELDS = tuple(name for name in Record._fields if name not in ("busy_ns", "value"))
MISBEHAVIOURS: dict[str, tuple[Moment, Misbehaviour]] = {
    "none": (never, silent),
    "no-pulse": (moment("READY", step=0), ready_late),
    "late": (moment("QKV"), late),
    "silent": (moment("SCORES"), silent),
    "drip": (moment("EMBED"), drip(0.4)),
    "drip-slowly": (moment("EMBED"), drip(3.0)),
    "twice": (moment("QKV"), twice),
    "out-of-order": (moment("SCORES", step=1), out_of_order),
    **{f"wrong-{field}": (moment("CONTEXT"), wrong(field)) for field in FIELDS},
    "failed": (moment("DOWN"), failed),
    "rejected": (moment("DOWN"), rejected),
    "boast": (moment("QKV"), boast),
    "nan": (moment("QKV"), not_finite("nan")),
    "nan-scores": (moment("SCORES"), not_finite("nan")),
    "infinity": (moment("GATE_UP"), not_finite("infinity")),
    "infinity-later": (moment("DOWN", layer=1), not_finite("infinity")),
    "nan-logits": (moment("LM_HEAD"), not_finite("nan")),
    "nan-first-row": (moment("LM_HEAD"), not_finite_in_row(0)),
    "nan-last-row": (moment("LM_HEAD"), not_finite_in_row(-1)),
    "scribble-slots": (moment("EMBED"), scribble(layout.SLOTS_OFFSET_BYTES, None)),
    "scribble-rings": (moment("EMBED"), scribble(layout.CONTROL_OFFSET_BYTES, layout.SLOTS_OFFSET_BYTES)),
    "scribble-header": (moment("EMBED"), scribble(0, layout.CONTROL_OFFSET_BYTES)),
    "scribble-all": (moment("EMBED"), scribble(0, None)),
    "flip-flags": (moment("EMBED"), flip_flags),
    "head-ahead": (moment("QKV"), move(SUBMISSION_HEAD, 1)),
    "head-behind": (moment("QKV"), move(SUBMISSION_HEAD, -layout.RING_DEPTH)),
    "tail-ahead": (moment("QKV"), move(COMPLETION_TAIL, 1 << 40)),
    "tail-behind": (moment("QKV"), move(COMPLETION_TAIL, -1)),
    "junk": (moment("QKV"), junk),
    "flood": (moment("QKV"), flood),
    "hang-up": (moment("QKV"), hang_up),
    "truncate": (moment("QKV"), truncate(0)),
    "truncate-slots": (moment("QKV"), truncate(layout.SLOTS_OFFSET_BYTES)),
    "truncate-logits": (moment("LM_HEAD"), truncate(layout.SLOTS_OFFSET_BYTES)),
    "punch": (moment("QKV"), punch(0)),
    "punch-slots": (moment("QKV"), punch(layout.SLOTS_OFFSET_BYTES)),
    "truncate-sometime": (moment("EMBED"), truncate_sometime),
    "unlink": (moment("QKV"), unlink),
    "stop": (moment("QKV"), stop),
    "pause": (moment("QKV"), pause),
    "vanish": (moment("QKV"), vanish),
}


def main(arguments: Sequence[str]) -> None:
    model, session, name = arguments
    play(HostileGpu(Path(model), session, has_pulse=name != "no-pulse"), *MISBEHAVIOURS[name])


def play(gpu: HostileGpu, moment: Moment, misbehave: Misbehaviour) -> None:
    # That the TEE has ended is what it is all for.
    with contextlib.suppress(PeerDied, ProtocolError):
        gpu.serve(moment, misbehave)


if __name__ == "__main__":
    main(sys.argv[1:])
