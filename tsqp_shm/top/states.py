"""What each side did at one look, of what its words and the rings' records say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tsqp_shm.shm.observer import Look
from tsqp_shm.shm.plan import Operation
from tsqp_shm.shm.protocol import Opcode, Record, operation_of


class State(NamedTuple):
    """Attributes:
    doing: in words.
    identity: tells it from the same thing done again.
    kind: what it counts as among the looks of a while: in words, and the operation that these are of, if any.
    """

    doing: str
    identity: object
    kind: tuple[str, str | None]


class States:
    """Reads the states of one session.

    Args:
        rings: whether its records go through the rings, where they can be seen.
        linears: what records name by their index.
    """

    def __init__(self, rings: bool, linears: Sequence[Operation]) -> None:
        self._rings = rings
        self._linears = linears

    def of_tee(self, look: Look) -> State:
        control, progress = look.control, look.progress
        waited_for = look.in_flight[0] if look.in_flight else None
        if self._rings and waited_for is not None and control.collected >= control.completed:
            what, name = self._operation(waited_for), self._name(waited_for)
            if control.tee_parked % 2:
                return State(f"asleep, waits for {what}", waited_for.sequence, ("asleep, waits for", name))
            # Of one that is awake no word says which.
            verb = "awake, waits for or works beside"
            return State(f"{verb} {what}", waited_for.sequence, (verb, name))
        is_in_step = progress.step_began_ns > progress.step_ended_ns
        if not is_in_step and not progress.running and not progress.waiting:
            return State("idle: nothing to complete", "idle", ("idle", None))
        # Where the arena carries no times, a step is told from the time between two by the session alone.
        is_timed = progress.step_ended_ns or progress.step_began_ns
        if is_timed and not is_in_step:
            return State("between two steps", progress.steps, ("between two steps", None))
        verb = "computes" if is_in_step else "at work"
        sequences = _counted(progress.running, "sequence") + (" in this step" if is_in_step else "")
        identity = "step" if is_in_step else progress.steps
        # Behind READY nothing was computed yet.
        if self._rings and look.behind is not None and look.behind.opcode != Opcode.READY:
            after = f"{verb} after {self._operation(look.behind)}; {sequences}"
            return State(after, identity, (f"{verb} after", self._name(look.behind)))
        return State(f"{verb}, {sequences}", identity, (verb, None))

    def of_gpu(self, look: Look) -> State:
        control = look.control
        if not self._rings:
            return State("not to be seen: its records are messages (doorbell zmq)", 0, ("not to be seen", None))
        if look.in_flight:
            record = look.in_flight[0]
            doing = "works on" if control.taken > control.completed else "is about to take"
            return State(f"{doing} {self._operation(record)}", record.sequence, ("works on", self._name(record)))
        asleep = "asleep" if control.gpu_parked % 2 else "awake"
        return State(f"{asleep}, waits for a submission", control.completed, ("waits", None))

    def _name(self, record: Record) -> str:
        return operation_of(record.opcode, record.target, self._linears).name

    def _operation(self, record: Record) -> str:
        name, layer = operation_of(record.opcode, record.target, self._linears)
        return f"{name}, layer {layer or 0}, {_counted(record.rows, 'row')}" if record.rows else name


def _counted(count: int, thing: str) -> str:
    return f"1 {thing}" if count == 1 else f"{count} {thing}s"
