"""What a model needs of this machine, worked out without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.finding import BAD, GOOD, Finding, mib
from tsqp_shm.errors import TsqpError
from tsqp_shm.inspection.findings import embedding_bytes, read_network
from tsqp_shm.inspection.memory import memory_of, pad_row_bytes


@dataclass(frozen=True)
class Need:
    """Attributes:
    arena_bytes: of shared memory; 0 in a mode that has none.
    memory_bytes: of weights, full cache and slots in all, where the GPU process's device is the CPU; pads left aside.
    num_linears: each of which has a key in a mode with pads.
    pad_row_bytes: what the pads of one row through the model take there.
    max_model_len: rows of a longest sequence.
    """

    arena_bytes: int
    memory_bytes: int
    num_linears: int
    pad_row_bytes: int
    max_model_len: int


def examine_model(folder: Path, config: EngineConfig) -> tuple[Finding, Need | None]:
    """Reads the config and the heads of the weight files."""
    try:
        spec, network = read_network(folder)
        limits = config.limits(spec.max_positions, network.layer_parameters)
        memory = memory_of(network, limits, embedding_bytes(folder, network))
    except TsqpError as error:
        return Finding("model", BAD, str(error), "it cannot be run", "name another model or mend its folder"), None
    if memory.refused is not None:
        return Finding("model", BAD, memory.refused, f"mode {memory.mode} cannot run it", "another --mode"), None
    totals = {where: memory.total(where) for where in memory.places}
    parts = ", ".join(f"{where} {mib(total)}" for where, total in totals.items())
    found = f"{spec.family}, {spec.num_layers} layers, {limits.max_model_len} tokens a sequence: {parts}"
    need = Need(
        totals.get("arena", 0),
        sum(totals.values()),
        len(network.linears),
        pad_row_bytes(network),
        limits.max_model_len,
    )
    return Finding("model", GOOD, found), need
