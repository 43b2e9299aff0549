"""What a model needs of this machine, worked out without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor.finding import BAD, GOOD, Finding, mib
from tsqp_shm.errors import TsqpError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.layout import DTYPES
from tsqp_shm.shm.plan import Plan


@dataclass(frozen=True)
class Need:
    """Attributes:
    arena_bytes: of shared memory.
    memory_bytes: of weights, full cache and arena together, where the GPU process's device is the CPU.
    """

    arena_bytes: int
    memory_bytes: int


def examine_model(folder: Path, config: EngineConfig) -> tuple[Finding, Need | None]:
    """Reads the config and the heads of the weight files."""
    try:
        spec = ModelSpec.from_folder(folder)
        network = Network.of(spec)
        limits = config.limits(spec.max_positions, network.layer_parameters)
        Checkpoint.open(folder).close()
    except TsqpError as error:
        return Finding("model", BAD, str(error), "it cannot be run", "name another model or mend its folder"), None
    element_bytes = DTYPES[limits.dtype].size_bytes
    arena_bytes = Plan.derive(network, limits).total_bytes
    row_elements = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    cache_bytes = row_elements * limits.max_model_len * limits.max_num_seqs * element_bytes
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    found = (
        f"{spec.family}, {spec.num_layers} layers, {limits.max_model_len} tokens a sequence: arena {mib(arena_bytes)}, "
        f"cache up to {mib(cache_bytes)}, weight files {mib(weights_bytes)}"
    )
    return Finding("model", GOOD, found), Need(arena_bytes, arena_bytes + cache_bytes + weights_bytes)
