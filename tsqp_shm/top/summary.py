"""What looks at a session say together: rates, states and since when."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from typing import Any

from tsqp_shm.modes import MODES
from tsqp_shm.shm.liveness import SILENCE_S
from tsqp_shm.shm.observer import Look, Observer
from tsqp_shm.shm.protocol import NO_SLOT
from tsqp_shm.top.states import State, States
from tsqp_shm.top.told import Told

# Rates are of the looks of so long.
WINDOW_NS = 2_000_000_000


class Summary:
    """Takes looks at one session and tells what they say."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._mode = MODES[observer.invitation.limits.mode]
        self._rings = observer.invitation.doorbell not in ("zmq", "")
        self._states = States(self._rings, observer.plan.linear_operations)
        self._looks: deque[Look] = deque()
        # Of the same looks, what each side was at.
        self._kinds: dict[str, deque[tuple[str, str | None]]] = {"tee": deque(), "gpu": deque()}
        # What was seen last, and when it was seen first: of each side's state and heartbeat.
        self._seen: dict[str, tuple[object, int]] = {}
        self._doing: dict[str, State] = {}
        self._tells = False
        self._told: Told | None = None

    def hear(self, told: Told | None) -> None:
        """Takes what the session tells of itself at this moment, where it tells what its arena does not say; None: it
        did not answer."""
        self._tells, self._told = True, told

    def take(self, look: Look) -> None:
        self._looks.append(look)
        self._doing = {"tee": self._states.of_tee(look), "gpu": self._states.of_gpu(look)}
        for side, kinds in self._kinds.items():
            kinds.append(self._doing[side].kind)
        while look.at_ns - self._looks[0].at_ns > WINDOW_NS:
            self._looks.popleft()
            for kinds in self._kinds.values():
                kinds.popleft()
        for what, value in (
            ("tee", self._doing["tee"].identity),
            ("gpu", self._doing["gpu"].identity),
            ("tee heartbeat", look.control.tee_heartbeat),
            ("gpu heartbeat", look.control.gpu_heartbeat),
        ):
            if self._seen.get(what, (None, 0))[0] != value:
                self._seen[what] = (value, look.at_ns)

    def facts(self) -> dict[str, Any]:
        """As plain values. Units are in the names; None: not known."""
        first, last = self._looks[0].progress, self._looks[-1].progress
        facts = {
            "session": self._observer.session,
            "mode": self._mode.name,
            "generated_per_s": self._rate(first.generated, last.generated),
            "tokens_per_s": self._rate(first.tokens, last.tokens),
            "sequences": {
                "running": last.running,
                "waiting": last.waiting,
                "of": self._observer.invitation.limits.max_num_seqs,
            },
            "totals": {"steps": last.steps, "tokens": last.tokens, "generated": last.generated},
            "tee": self._state("tee"),
        }
        if self._tells:
            facts["pads"] = None if self._told is None else self._told.pads._asdict()
        return self._with_both_sides(facts) if self._mode.has_gpu_process else facts

    def _with_both_sides(self, facts: dict[str, Any]) -> dict[str, Any]:
        first, last = self._looks[0], self._looks[-1]
        progress = self._now().progress
        slots = self._observer.plan.shared_slots
        lent = {index for record in last.in_flight for index in (record.in_slot, record.out_slot)} - {NO_SLOT}
        facts["totals"]["doorbells"] = self._doorbells(last)
        facts["tee"].update(self._heartbeat("tee", last.control.tee_heartbeat))
        return {
            **facts,
            "doorbell": self._observer.invitation.doorbell,
            "doorbells_per_s": self._rate(self._doorbells(first), self._doorbells(last)),
            "round_trip_p50_us": progress.round_trip_p50_ns / 1e3 if progress.round_trip_p50_ns else None,
            "round_trip_p99_us": progress.round_trip_p99_ns / 1e3 if progress.round_trip_p99_ns else None,
            "slots": {"in_use": [slot.name for slot in slots if slot.index in lent], "of": len(slots)},
            "gpu": {**self._state("gpu"), **self._heartbeat("gpu", last.control.gpu_heartbeat)},
        }

    def _rate(self, before: int, after: int) -> float | None:
        elapsed_ns = self._looks[-1].at_ns - self._looks[0].at_ns
        return (after - before) * 1e9 / elapsed_ns if elapsed_ns else None

    def _now(self) -> Look:
        """The last look, with the times that the session told since."""
        look = self._looks[-1]
        if self._told is None:
            return look
        return replace(look, progress=look.progress._replace(**self._told.withheld))

    def _doorbells(self, look: Look) -> int:
        return look.control.submitted if self._rings else look.progress.doorbells

    def _state(self, side: str) -> dict[str, Any]:
        state = self._doing[side]
        if side == "tee" and self._told is not None:
            state = self._states.of_tee(self._now())
        kinds = Counter(self._kinds[side])
        return {
            "doing": state.doing,
            "since_s": max(0, self._looks[-1].at_ns - self._began_ns(side, state)) / 1e9,
            # Of the looks of a while, the shares; the largest first.
            "lately": [
                {"doing": doing, "operation": operation, "share": count / kinds.total()}
                for (doing, operation), count in kinds.most_common()
            ],
        }

    def _heartbeat(self, side: str, beat: int) -> dict[str, Any]:
        age_s = (self._looks[-1].at_ns - self._seen[f"{side} heartbeat"][1]) / 1e9
        return {"heartbeat_age_s": age_s if beat else None, "is_silent": not beat or age_s > SILENCE_S}

    def _began_ns(self, side: str, state: State) -> int:
        since_ns = self._seen[side][1]
        # Of the times between steps the TEE itself tells; of all else this process knows when it saw it first.
        progress = self._now().progress
        if side == "tee" and state.identity in ("idle", "step"):
            return (progress.step_ended_ns if state.identity == "idle" else progress.step_began_ns) or since_ns
        return since_ns
