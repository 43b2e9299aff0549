"""Mode `plain`: embedding and Linears by the GPU process, attention split; it hides and checks nothing."""

from __future__ import annotations

from functools import partial

from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.attention.split import SplitAttention
from tsqp_shm.tee.embedding import RemoteEmbedding
from tsqp_shm.tee.engine import Engine, MakeEngine, Ports
from tsqp_shm.tee.linears.remote import RemoteLinears
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue


def load_plain(network: Network, checkpoint: Checkpoint) -> MakeEngine:
    """Of the weights, this mode wants the norms'.

    Raises:
        ModelFileError: a tensor is missing or has another shape.
    """
    return partial(_plain_engine, network, NormWeights.load(network, checkpoint))


def _plain_engine(
    network: Network, norms: NormWeights, slots: Slots, queue: SubmissionQueue, statistics: Statistics
) -> Engine:
    """An engine whose ports lead to the GPU process at the other end of `queue`."""
    ops = Operations(network, norms, slots, statistics)
    ports = Ports(
        embedding=RemoteEmbedding(slots, queue, ops),
        attention=SplitAttention(slots.plan, queue, ops),
        linears=RemoteLinears(queue),
        wait=queue.wait,
        begin=lambda verification, step: queue.begin_step(),
    )
    return Engine(network, slots.plan, ops, ports)
