"""All checks in their order, as a table or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.enclave import examine_enclave
from tsqp_shm.doctor.finding import BAD, GOOD, WARNING, Finding
from tsqp_shm.doctor.limits import examine_limits
from tsqp_shm.doctor.model import Need, examine_model
from tsqp_shm.doctor.pads import examine_pads
from tsqp_shm.doctor.processor import examine_processor
from tsqp_shm.doctor.sessions import examine_sessions
from tsqp_shm.doctor.shared_memory import examine_shared_memory
from tsqp_shm.doctor.transport import examine_transport
from tsqp_shm.doctor.versions import examine_versions
from tsqp_shm.modes import MODES
from tsqp_shm.printable import print_json
from tsqp_shm.wrapping import beside


def examine(model: Path | None, config: EngineConfig) -> Iterator[Finding]:
    """Every finding as soon as it is there.

    Args:
        model: whose need the machine is held against; None: no model's.
        config: what a session would be started with.
    """
    mode = MODES[config.mode]
    yield Finding("mode", GOOD, f"{mode.name}: {mode.protects}")
    need: Need | None = None
    if model is not None:
        finding, need = examine_model(model, config)
        yield finding
    yield from examine_versions(config)
    yield from examine_processor(config)
    yield from examine_limits(config, need.memory_bytes if need else None)
    if mode.has_gpu_process:
        yield from examine_shared_memory(need.arena_bytes if need else None)
    if mode.has_pads:
        yield from examine_pads(config, need)
    yield from examine_enclave(config)
    # Before the trial of the doorbell, which is a session too.
    yield from examine_sessions()
    if mode.has_gpu_process:
        yield from examine_transport(config)


def report(model: Path | None, config: EngineConfig, *, json_output: bool) -> int:
    """`tsqp-shm doctor`. Returns the exit code: 1 if something is bad."""
    findings = []
    for finding in examine(model, config):
        findings.append(finding)
        if not json_output:
            _show(finding)
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in (GOOD, WARNING, BAD)}
    if json_output:
        print_json({"findings": [asdict(finding) for finding in findings], "counts": counts})
    else:
        print(f"\n{counts[GOOD]} good, {counts[WARNING]} to be looked at, {counts[BAD]} bad")
    return 1 if counts[BAD] else 0


def _show(finding: Finding) -> None:
    print(beside(f"{finding.verdict:<9}{finding.check:<18}", finding.found, sys.stdout))
    for label, text in (("why", finding.why), ("do", finding.cure)):
        if text:
            print(beside(f"{'':<27}{label}: ", text, sys.stdout), flush=True)
