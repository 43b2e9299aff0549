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
from tsqp_shm.modes import MODES
from tsqp_shm.shm.layout import DTYPES
from tsqp_shm.shm.plan import Plan


@dataclass(frozen=True)
class Need:
    """Attributes:
    arena_bytes: of shared memory; 0 in a mode that has none.
    memory_bytes: of weights, full cache and slots together, where the GPU process's device is the CPU.
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
    plan = Plan.derive(network, limits)
    row_elements = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    cache_elements = row_elements * limits.max_model_len * limits.max_num_seqs
    head = f"{spec.family}, {spec.num_layers} layers, {limits.max_model_len} tokens a sequence"
    if MODES[limits.mode].has_gpu_process:
        cache_bytes = cache_elements * DTYPES[limits.dtype].size_bytes
        weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
        slots, weights, arena_bytes = f"arena {mib(plan.total_bytes)}", "weight files", plan.total_bytes
        slots_bytes = arena_bytes
    else:
        cache_bytes = cache_elements * DTYPES["bfloat16"].size_bytes
        # A byte for each weight of a Linear; the embedding stays in its file.
        weights_bytes = sum(linear.parameters for linear in network.linears)
        slots, weights, arena_bytes = f"slots {mib(plan.private_bytes)}", "weights in int8", 0
        slots_bytes = plan.private_bytes
    found = f"{head}: {slots}, cache up to {mib(cache_bytes)}, {weights} {mib(weights_bytes)}"
    return Finding("model", GOOD, found), Need(arena_bytes, slots_bytes + cache_bytes + weights_bytes)
