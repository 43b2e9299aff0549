"""The bring-up report: what a session is, and what is protected in it and what not."""

from __future__ import annotations

from typing import Any, TextIO

from tsqp_shm.console.rows import print_rows
from tsqp_shm.llm import LLM
from tsqp_shm.modes import MODES

_WITHOUT_PADS = {
    "tee": "what has none is computed here",
    "wait": "what has none waits for one",
    "refuse": "what has none is refused",
}


def print_bring_up(llm: LLM, out: TextIO, *, verbose: bool) -> None:
    """Args:
    verbose: all of it; else three lines, which leave out nothing that is not protected, pinned or locked.
    """
    rows = _all_rows(llm, llm.bring_up()) if verbose else _three_rows(llm, llm.bring_up())
    print_rows(rows, out)
    print(file=out, flush=True)


def _three_rows(llm: LLM, facts: dict[str, Any]) -> list[tuple[str, str]]:
    mode = MODES[facts["mode"]]
    others = ", ".join(other for other in MODES if other != mode.name)
    device = f"{facts['arithmetic']} on {_device(facts)}"
    memory = [_slots(facts)]
    if "pads" in facts:
        memory.append(f"pads: {_stock(facts['pads'])}, {_WITHOUT_PADS[facts['pads']['out']]}; their keys are locked")
        if facts["pads"]["locks"]:
            memory.append(_locks(facts["pads"]["locks"]))
    return [
        ("mode", f"{mode.name}: {mode.protects} (Other modes: {others}.)"),
        ("model", f"{facts['model']}, weights {_weights(facts['weights'])}; {device}; {_limits(llm)}"),
        ("memory", "; ".join(memory)),
    ]


def _all_rows(llm: LLM, facts: dict[str, Any]) -> list[tuple[str, str]]:
    mode = MODES[facts["mode"]]
    # In one of them the GPU process sees less than in this one.
    others = [f"--mode {other.name}: {other.summary}" for other in MODES.values() if other is not mode]
    rows = [("mode", f"{mode.name}: {mode.protects}"), ("others", "; ".join(others))]
    rows += [("model", facts["model"]), ("weights", _weights(facts["weights"]))]
    rows += _rows_of_two(facts) if mode.has_gpu_process else _rows_of_one(facts)
    return [*rows, ("limits", _limits(llm))]


def _weights(weights: dict[str, Any]) -> str:
    digest = weights["model_digest"]
    if weights["is_pinned"]:
        return f"pinned by {digest}"
    return "as found, not pinned" if digest is None else f"as found, not pinned: {digest}"


def _limits(llm: LLM) -> str:
    return f"{llm.max_model_len:,} tokens a sequence, {llm.config.max_num_seqs:,} sequences"


def _device(facts: dict[str, Any]) -> str:
    if "device" in facts:
        return f"{facts['device']}, slots {facts['transfer']}"
    threads = facts["threads"]
    return f"the CPU, {threads} thread{'s' * (threads > 1)}"


def _slots(facts: dict[str, Any]) -> str:
    """The memory through which operands pass."""
    if "arena" not in facts:
        return f"slots of {_mib(facts['slots_bytes'])}, private"
    return f"arena of {_mib(facts['arena']['bytes'])}, {_locked(facts['arena'])}"


def _locked(arena: dict[str, Any]) -> str:
    return "locked" if arena["locked"] else f"not locked ({arena['locked_reason']})"


def _stock(pads: dict[str, Any]) -> str:
    locked = "locked" if pads["locked"] else "not locked"
    return f"stock of {pads['capacity_rows']:,} rows, {_mib(pads['bytes'])}, {locked}"


def _locks(locks: dict[str, Any]) -> str:
    kinds = ", ".join(kind for kind, is_locked in locks.items() if is_locked is True)
    return "; ".join(part for part in (f"locked: {kinds}" if kinds else "", locks["reason"]) if part)


def _rows_of_two(facts: dict[str, Any]) -> list[tuple[str, str]]:
    arena, doorbell, processes = facts["arena"], facts["doorbell"], facts["processes"]
    return [
        ("device", f"{facts['device']}, {facts['arithmetic']}, slots {facts['transfer']}"),
        ("processes", f"tee {processes['tee']['pid']}, gpu {processes['gpu']['pid']}, session {facts['session']}"),
        ("arena", f"{arena['name']}, {arena['bytes']:,} bytes, {arena['slots']} slots"),
        ("pages", f"{arena['pages']:,} of 4 KiB, all backed and mapped, {_locked(arena)}"),
        ("doorbell", f"{doorbell['mode']}, {doorbell['endpoint']}"),
        *([("checks", _checks(facts["checks"]))] if "checks" in facts else []),
        *(_pads(facts["pads"]) if "pads" in facts else []),
    ]


def _rows_of_one(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("device", f"{_device(facts)}, {facts['arithmetic']}"),
        ("process", f"tee {facts['processes']['tee']['pid']}, session {facts['session']}"),
        ("slots", f"{facts['slots_bytes']:,} bytes of private memory"),
    ]


def _checks(checks: dict[str, Any]) -> str:
    """What the TEE process keeps of the model's Linears."""
    weights = "the Linears' weights beside them" if checks["has_weights"] else "no Linear's weights"
    return f"{checks['vectors']} secret vectors a Linear, {checks['bytes']:,} bytes here, and {weights}"


def _pads(pads: dict[str, Any]) -> list[tuple[str, str]]:
    threads = pads["threads"]
    makers = f"maker {pads['maker']}, {threads} thread{'s' * (threads != 1)} at idle"
    return [
        ("pads", f"{_stock(pads)}; {makers}; {_WITHOUT_PADS[pads['out']]}, prefill {pads['prefill']}"),
        (
            "keys",
            f"key {pads['key_id'][:16]}, locked; no core dumps, and no other process of this user can begin to look in",
        ),
        *([("locked", _locks(pads["locks"]))] if pads["locks"] else []),
    ]


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
