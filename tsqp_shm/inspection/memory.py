"""What each mode takes of memory, worked out of the network and the limits; nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tsqp_shm.config import Limits
from tsqp_shm.model.field_weights import MAX_INPUTS, packed_bytes
from tsqp_shm.model.network import Network
from tsqp_shm.modes import MODES, Mode
from tsqp_shm.shm.layout import DTYPES
from tsqp_shm.shm.plan import IN_FLOAT32, Plan, Slot
from tsqp_shm.shm.tiling import padded_length

_FLOAT32_BYTES = 4
_WORD_BYTES = 4
_BFLOAT16_BYTES = 2
# As `native/attention` lays values out.
_LANES = 16
LENGTH, SEQUENCES, BATCH, TILES = "--max-model-len", "--max-num-seqs", "--max-batch-tokens", "--tile-rows"
FEW_ROWS = "--float32-rows"
STOCK = "--pad-stock"


@dataclass(frozen=True)
class Part:
    """Attributes:
    where: "arena", "GPU process" or "TEE process".
    flags: what changes it.
    """

    where: str
    what: str
    size_bytes: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModeMemory:
    """Attributes:
    refused: why the model does not run in this mode; None: it does.
    parts: beside the programs themselves, Python and its libraries.
    """

    mode: str
    refused: str | None
    parts: tuple[Part, ...]

    def total(self, where: str) -> int:
        return sum(part.size_bytes for part in self.parts if part.where == where)

    @property
    def places(self) -> list[str]:
        return list(dict.fromkeys(part.where for part in self.parts))


def memory_of(network: Network, limits: Limits, embedding_bytes: int | None, pad_rows: int = 0) -> ModeMemory:
    """What a session of the limits' mode takes.

    Args:
        embedding_bytes: as the checkpoint stores it; None: it is not there, and counts as bfloat16.
        pad_rows: of its stock of pads, in a mode that has one.
    """
    plan = Plan.derive(network, limits)
    mode = MODES[limits.mode]
    parts = list(_arena(plan)) if mode.has_gpu_process else []
    if mode.splits_attention:
        parts += _split(network, plan)
    else:
        if mode.has_gpu_process:
            parts += [*_field_weights(network, "GPU process"), *_checks(network, mode.num_vectors)]
        if mode.has_pads or not mode.has_gpu_process:
            parts += _field_weights(network, "TEE process")
        if mode.has_pads:
            stock_bytes = pad_rows * pad_row_bytes(network)
            parts.append(Part("TEE process", f"pad stock of {pad_rows:,} rows", stock_bytes, (STOCK,)))
        parts += _own(network, plan, embedding_bytes)
    return ModeMemory(limits.mode, _refusal(network, mode), (*parts, *_of_tee(network, plan)))


def pad_row_bytes(network: Network) -> int:
    """What the pads of one row through the model take: of all Linears the product, as a pad itself is drawn again."""
    return sum(linear.outputs for linear in network.linears) * _WORD_BYTES


def _arena(plan: Plan) -> Iterator[Part]:
    used = sum(slot.size_bytes for slot in plan.shared_slots)
    yield from _slots("arena", plan.shared_slots)
    yield Part("arena", "header, rings, ends of pages", plan.total_bytes - used)


def _split(network: Network, plan: Plan) -> Iterator[Part]:
    """Where a GPU process has the weights as they are, and the cache."""
    element_bytes = DTYPES[plan.limits.dtype].size_bytes
    yield Part("GPU process", f"weights, {plan.limits.dtype}", network.parameters * element_bytes)
    elements = sum(2 * layer.attention.kv_width for layer in network.layers)
    yield _cache("GPU process", plan, elements, plan.limits.dtype, element_bytes)


def _field_weights(network: Network, where: str) -> Iterator[Part]:
    """Linears as integers, with whoever multiplies."""
    weights_bytes, others_bytes = map(sum, zip(*map(packed_bytes, network.linears), strict=True))
    yield Part(where, "weights, int8", weights_bytes)
    yield Part(where, "their scales, sums and biases", others_bytes)


def _checks(network: Network, num_vectors: int) -> Iterator[Part]:
    """What checks the products of another process: the vectors, and what of the weights makes results."""
    words = sum(num_vectors * (linear.outputs + linear.inputs) for linear in network.linears)
    yield Part("TEE process", "check vectors", words * _FLOAT32_BYTES)
    words = sum(linear.outputs * (2 if linear.parts[0].bias is not None else 1) for linear in network.linears)
    yield Part("TEE process", "scales and biases", words * _FLOAT32_BYTES)


def _own(network: Network, plan: Plan, embedding_bytes: int | None) -> Iterator[Part]:
    """Where embedding, attention and its cache are the TEE process's."""
    if embedding_bytes is None:
        embedding_bytes = network.embedding.rows * network.embedding.size * _BFLOAT16_BYTES
    yield Part("TEE process", "embedding, as stored", embedding_bytes)
    # A key lies as it is, a value is padded to whole lanes.
    heads = [(layer.attention.num_kv_heads, layer.attention.head_dim) for layer in network.layers]
    elements = sum(count * (head_dim + _padded(head_dim, _LANES)) for count, head_dim in heads)
    yield _cache("TEE process", plan, elements, "bfloat16", _BFLOAT16_BYTES)
    yield from _slots("TEE process", plan.private_slots)


def _padded(count: int, to: int) -> int:
    return -(-count // to) * to


def _of_tee(network: Network, plan: Plan) -> Iterator[Part]:
    """What the TEE process keeps for itself in every mode, in float32."""
    tables = {(layer.attention.rope, layer.attention.head_dim) for layer in network.layers}
    tables_elements = sum(plan.limits.max_model_len * head_dim for _, head_dim in tables)
    norms_elements = sum(norm.size for norm in network.norms)
    residual_elements = plan.limits.max_batch_tokens * network.hidden_size
    yield Part("TEE process", "residual stream", residual_elements * _FLOAT32_BYTES, (BATCH,))
    yield Part("TEE process", "logits, copied", plan.slot("logits").size_bytes, (SEQUENCES,))
    yield Part("TEE process", "rope tables", tables_elements * _FLOAT32_BYTES, (LENGTH,))
    yield Part("TEE process", "norms", norms_elements * _FLOAT32_BYTES)


def _cache(where: str, plan: Plan, elements: int, dtype: str, element_bytes: int) -> Part:
    """Args:
    elements: of a position, in all layers.
    """
    positions = padded_length(plan.limits.max_model_len) * plan.limits.max_num_seqs
    return Part(where, f"key and value cache, {dtype}", elements * positions * element_bytes, (LENGTH, SEQUENCES))


def _slots(where: str, slots: tuple[Slot, ...]) -> Iterator[Part]:
    flags: dict[str, tuple[str, ...]] = {
        "logits": (SEQUENCES,),
        "y.logits": (SEQUENCES,),
        "segments": (BATCH, SEQUENCES),
    }
    for slot in slots:
        of_kind = (LENGTH, TILES) if slot.kind == "tile" else (BATCH,)
        if slot.name.startswith(IN_FLOAT32):
            of_kind = (LENGTH,) if slot.kind == "tile" else (FEW_ROWS,)
        yield Part(where, f"slot {slot.name}", slot.size_bytes, flags.get(slot.name, of_kind))


def _refusal(network: Network, mode: Mode) -> str | None:
    for linear in network.linears if mode.arithmetic is not None else ():
        if linear.inputs > MAX_INPUTS:
            return f"{linear.parts[0].weight} has {linear.inputs} inputs; at most {MAX_INPUTS} are summed exactly"
    return None
