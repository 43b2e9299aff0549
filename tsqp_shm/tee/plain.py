"""Mode `plain`: embedding and Linears by the GPU process, attention split; it hides and checks nothing."""

from __future__ import annotations

from collections.abc import Sequence

from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.attention.split import SplitAttention
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.embedding import RemoteEmbedding
from tsqp_shm.tee.engine import Engine, Ports, TakeLogits
from tsqp_shm.tee.linears.remote import RemoteLinears
from tsqp_shm.tee.loaded import Loaded
from tsqp_shm.tee.norms import NormWeights
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue
from tsqp_shm.tee.verification import Products


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

        def on(plan: Plan) -> tuple[Network, Plan, Operations, Ports]:
            ports = Ports(
                embedding=RemoteEmbedding(plan, slots, queue, ops),
                attention=SplitAttention(plan, queue, ops),
                linears=RemoteLinears(queue),
                wait=queue.wait,
                begin=lambda verification, step: queue.begin_step(),
            )
            return self._network, plan, ops, ports

        few = slots.plan.of_few_rows
        return Engine(*on(slots.plan)) if few is None else _EngineByRows(*on(slots.plan), Engine(*on(few)))


class _EngineByRows(Engine):
    """Two on one queue: a step of few rows goes through the slots in float32."""

    def __init__(self, network: Network, plan: Plan, ops: Operations, ports: Ports, of_few_rows: Engine) -> None:
        super().__init__(network, plan, ops, ports)
        self._most = plan.limits.float32_rows
        self._of_few_rows = of_few_rows

    def forward(self, chunks: Sequence[Chunk], take: TakeLogits) -> Products:
        are_few = sum(len(chunk.token_ids) for chunk in chunks) <= self._most
        return self._of_few_rows.forward(chunks, take) if are_few else super().forward(chunks, take)
