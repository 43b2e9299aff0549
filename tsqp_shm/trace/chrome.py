"""Recordings as one trace in Chrome's Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

Source: "Trace Event Format" (the Chromium project): complete events (X) with `ts` and `dur` in microseconds, which nest
    on one thread; metadata (M) for names; flows (s, t, f) from a ring over its operation to the end of its wait.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from tsqp_shm.shm.plan import Operation
from tsqp_shm.shm.protocol import NO_SLOT, operation_of
from tsqp_shm.trace.recorder import ROLES, WAITS, Event, Recording

_TITLES = {"tee": "TEE process", "gpu": "GPU process (untrusted; its own word)"}
_THREADS = {"tee": "kernels and waits", "gpu": "operations and waits"}
_CATEGORIES = {"ring": "doorbell", "run": "operation", **dict.fromkeys(WAITS, "wait")}


def write_trace(recordings: Sequence[Recording], out: TextIO) -> None:
    """Writes one JSON object, an event a line.

    Raises:
        OSError: it cannot be written.
    """
    ordered = sorted(recordings, key=lambda recording: ROLES[recording.role])
    start_ns = min((event.begin_ns for recording in ordered for event in recording.events), default=0)
    # Sequence numbers begin anew with each epoch, so with each restart of the GPU process.
    epochs = dict.fromkeys(event.epoch for event in ordered[0].events if event.sequence)
    flows = {epoch: number << 32 for number, epoch in enumerate(epochs)}
    facts = {
        "clock": "CLOCK_MONOTONIC",
        "start_ns": start_ns,
        "dropped": {recording.role: recording.dropped for recording in ordered},
        # Who sums up waits adds these; those within a wait, a spin for one, are a part of it.
        "waits_left_out": {recording.role: _left_out(recording) for recording in ordered},
    }
    out.write(f'{{"displayTimeUnit": "ns", "otherData": {json.dumps(facts)}, "traceEvents": [\n')
    events = (event for recording in ordered for event in _events(recording, start_ns, flows))
    lines = (json.dumps(event, separators=(",", ":")) for event in events)
    out.write(next(lines, ""))
    for line in lines:
        out.write(",\n" + line)
    out.write("\n]}\n")


def _left_out(recording: Recording) -> dict[str, Any]:
    return {
        "shorter_than_us": recording.least_wait_ns / 1e3,
        **{
            kind: {"count": left_out.num_waits, "us": _microseconds(left_out.time_ns)}
            for kind, left_out in recording.left_out.items()
        },
    }


def _events(recording: Recording, start_ns: int, flows: dict[int, int]) -> Iterator[dict[str, Any]]:
    # Not the real pids: the GPU process's recording must not be able to name the TEE's track.
    track = {"pid": ROLES[recording.role], "tid": ROLES[recording.role]}
    for name, value in (
        ("process_name", f"{_TITLES[recording.role]}, pid {recording.pid}"),
        ("thread_name", _THREADS[recording.role]),
    ):
        yield {"ph": "M", "name": name, **track, "args": {"name": value}}
    yield {"ph": "M", "name": "process_sort_index", **track, "args": {"sort_index": ROLES[recording.role]}}
    # Of two that begin together the longer one is around the other.
    for event in sorted(recording.events, key=lambda event: (event.begin_ns, -event.end_ns)):
        yield {
            "ph": "X",
            "name": _title(event, recording.linears),
            "cat": _CATEGORIES.get(event.name, "kernel"),
            **track,
            "ts": _microseconds(event.begin_ns - start_ns),
            "dur": _microseconds(event.end_ns - event.begin_ns),
            "args": _arguments(event, recording),
        }
        flow = _FLOWS.get((recording.role, event.name))
        if flow and event.sequence and event.epoch in flows:
            # An end lies within the slice it belongs to, and a slice does not hold its last moment.
            at_ns = max(event.begin_ns, event.end_ns - 1) if flow == "f" else event.begin_ns
            yield {
                "ph": flow,
                "id": flows[event.epoch] | event.sequence,
                "name": "doorbell",
                "cat": "doorbell",
                **track,
                "ts": _microseconds(at_ns - start_ns),
                **({"bp": "e"} if flow == "f" else {}),
            }


# Where the arrow of a doorbell begins, passes and ends.
_FLOWS = {("tee", "ring"): "s", ("gpu", "run"): "t", ("tee", "wait"): "f"}


def _microseconds(time_ns: int) -> float:
    return round(time_ns / 1e3, 3)


def _title(event: Event, linears: Sequence[Operation]) -> str:
    if event.name not in ("ring", "wait", "run") or not event.sequence:
        return event.name
    operation = operation_of(event.opcode, event.target, linears).name
    return operation if event.name == "run" else f"{event.name} {operation}"


def _arguments(event: Event, recording: Recording) -> dict[str, Any]:
    if not event.sequence:
        return {}
    if event.name not in _CATEGORIES:
        # A kernel has no record of its own; its place is after the doorbell rung last.
        return {"after": event.sequence}

    slots = {
        side: recording.slot_names[index] if index < len(recording.slot_names) else index
        for side, index in (("in_slot", event.in_slot), ("out_slot", event.out_slot))
        if index != NO_SLOT
    }
    operation, layer = operation_of(event.opcode, event.target, recording.linears)
    return {
        "sequence": event.sequence,
        "opcode": operation,
        "layer": layer or 0,
        "rows": event.rows,
        **slots,
        "first_segment": event.first_segment,
        "segments": event.num_segments,
    }
