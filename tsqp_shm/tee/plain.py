"""Mode `plain`: embedding and Linears by the GPU process, attention split; it hides and checks nothing."""

from __future__ import annotations

from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.attention.split import SplitAttention
from tsqp_shm.tee.embedding import RemoteEmbedding
from tsqp_shm.tee.engine import Engine, Ports
from tsqp_shm.tee.linears.remote import RemoteLinears
from tsqp_shm.tee.loaded import Loaded
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue


class Plain(Loaded):
    """Of the weights, this mode wants the norms'.

    Raises:
        ModelFileError: a tensor is missing or has another shape.
    """

    def __init__(self, network: Network, checkpoint: Checkpoint) -> None:
        self._network = network
        self._norms = NormWeights.load(network, checkpoint)

    def make_engine(self, slots: Slots, queue: SubmissionQueue, statistics: Statistics) -> Engine:
        ops = Operations(self._network, self._norms, slots, statistics)
        ports = Ports(
            embedding=RemoteEmbedding(slots, queue, ops),
            attention=SplitAttention(slots.plan, queue, ops),
            linears=RemoteLinears(queue),
            wait=queue.wait,
            begin=lambda verification, step: queue.begin_step(),
        )
        return Engine(self._network, slots.plan, ops, ports)
