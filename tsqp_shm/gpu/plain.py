"""Mode `plain`: embedding, Linears, products of attention and its cache are this process's."""

from __future__ import annotations

from tsqp_shm.gpu import packed_products
from tsqp_shm.gpu.device import TORCH_DTYPES, Device
from tsqp_shm.gpu.kv_cache import KVCache
from tsqp_shm.gpu.loading import DeviceMemory, Loaded, Operations, Progress
from tsqp_shm.gpu.packed_products import PackedProducts
from tsqp_shm.gpu.products import GemmProducts, Products
from tsqp_shm.gpu.step import Step
from tsqp_shm.gpu.weights import Weights, load_weights, weights_size_bytes
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.protocol import Opcode, Record


def memory(network: Network, plan: Plan, device: Device) -> DeviceMemory:
    limits = plan.limits
    dtype = TORCH_DTYPES[limits.dtype]
    cache_bytes = KVCache.size_bytes(network, limits.max_num_seqs, limits.max_model_len, dtype)
    return DeviceMemory(limits.dtype, weights_size_bytes(network, dtype), cache_bytes)


def load(network: Network, plan: Plan, checkpoint: Checkpoint, device: Device, progress: Progress) -> Loaded:
    """Raises:
    ModelFileError: a tensor is missing, has another shape, or its file was truncated.
    """
    dtype = TORCH_DTYPES[plan.limits.dtype]
    weights = load_weights(network, checkpoint, dtype, device.torch_device, progress)
    return Loaded(split_operations(Step(plan, device), make_products(network, plan, weights, device)))


def make_products(network: Network, plan: Plan, weights: Weights, device: Device) -> Products:
    """The fastest products for this device, model and dtype."""
    if packed_products.is_available(network, plan, device.torch_device):
        return PackedProducts(network, plan, weights, device)
    return GemmProducts(network, plan, weights, device)


def split_operations(step: Step, products: Products) -> Operations:
    """Those of a step whose attention both sides compute."""

    def embed(record: Record) -> None:
        products.begin_step(step.begin(record))
        products.embed(record)

    def scores(record: Record) -> None:
        step.check_tile(record)
        products.scores(record)

    def context(record: Record) -> None:
        step.check_tile(record)
        products.context(record)

    return {
        Opcode.EMBED: embed,
        Opcode.QKV: products.qkv,
        Opcode.SCORES: scores,
        Opcode.CONTEXT: context,
        Opcode.LINEAR: products.linear,
    }
