"""The forward pass, as the TEE process sees it: the network's layers, for every family and every mode.

What it computes itself are norms, gates and the residual stream; attention and Linears are ports, each a generator that
waits for its own submissions, so that blocks of rows take turns whatever the mode.

Shapes: T tokens, C hidden, F feed-forward, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tsqp_shm.errors import PadsExhausted
from tsqp_shm.model.network import Network
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.slots import Slots
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.attention import AttentionPort
from tsqp_shm.tee.batch import Chunk, Step
from tsqp_shm.tee.embedding import EmbeddingPort
from tsqp_shm.tee.interleave import Task, interleave
from tsqp_shm.tee.linears import LinearsPort
from tsqp_shm.tee.mlp import GatedMlp
from tsqp_shm.tee.ops import Float32, Operations
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.verification import Products, Unverified, Verification

# What is done with logits: never all of a prompt's at once, which would take T x V floats.
TakeLogits = Callable[[int, Unverified[Float32]], None]


def _nothing_to_check() -> None:
    """What arrives is not checked."""


def _lacks_no_pads(chunks: Sequence[Chunk]) -> Mapping[int, PadsExhausted]:
    """Nothing is refused for want of pads."""
    return {}


@dataclass(frozen=True)
class Ports:
    """What differs between modes.

    Attributes:
        wait: returns when the submission of that number is complete, and all before it.
        begin: the step that is handed in begins, whose checks are told to what is handed in; returns when nothing of an
            earlier one is in flight any more.
        check_arrived: the step breaks off; checks what has arrived of it, without waiting.
        lack_pads: which chunks of a step have to be refused for want of pads, by their places, and why.
        keeps_caches: whether another engine of the same session finds the keys and values of this one's.
        staggers_blocks: whether blocks begin one after the other, as one needs this side for long at one place.
    """

    embedding: EmbeddingPort
    attention: AttentionPort
    linears: LinearsPort
    wait: Callable[[int], object]
    begin: Callable[[Verification, Step], None]
    check_arrived: Callable[[], None] = _nothing_to_check
    lack_pads: Callable[[Sequence[Chunk]], Mapping[int, PadsExhausted]] = _lacks_no_pads
    keeps_caches: bool = False
    staggers_blocks: bool = False


class Engine:
    """Runs forward passes over ragged batches; holds no state of a sequence but what lies in the port's cache."""

    def __init__(self, network: Network, plan: Plan, ops: Operations, ports: Ports) -> None:
        self._network = network
        self._limits = plan.limits
        self._ops = ops
        self._ports = ports
        self._mlp = GatedMlp(plan, ports.linears, ops)
        self._x, self._hidden, self._logits = plan.slot("x"), plan.slot("hidden"), plan.slot("logits")
        # Private: of what is looked at only copies, and the residual stream, which never lies in the arena.
        self._rows: Float32 = np.empty((self._logits.num_rows, network.vocab_size), np.float32)
        self._residual: Float32 = np.zeros((plan.limits.max_batch_tokens, network.hidden_size), np.float32)

    @property
    def keeps_caches(self) -> bool:
        return self._ports.keeps_caches

    def lack_pads(self, chunks: Sequence[Chunk]) -> Mapping[int, PadsExhausted]:
        """As `Ports.lack_pads`."""
        return self._ports.lack_pads(chunks)

    def forward(self, chunks: Sequence[Chunk], take: TakeLogits) -> Products:
        """Runs one step: every chunk's tokens enter the cache.

        Args:
            take: called with (first, logits [R, V] f32), the wanted rows of all chunks in their order from that one on,
                a slot's worth at a time; they can be opened when this has returned. The array is used again, but the
                last one not before the next step.

        Returns:
            What has become of its products.

        Raises:
            IntegrityError: a product of the step is false; whatever else has ended it.
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        ports = self._ports
        verification = Verification()
        step = Step.cut(chunks, self._limits)
        ports.begin(verification, step)
        try:
            interleave([ports.embedding.begin(step)], ports.wait)
            ports.attention.begin(step)
            layers = [self._layers(step, block) for block in step.blocks]
            interleave(layers, ports.wait, staggered=ports.staggers_blocks)
            interleave([self._lm_head(step, take, verification)], ports.wait)
        except BaseException:
            try:
                # A peer that has cheated may well be gone before its product is looked at, and would be let in again.
                ports.check_arrived()
            finally:
                verification.require_no_failure()
            raise
        return verification.end()

    def _layers(self, step: Step, block: Block) -> Task:
        """A block's way through all layers."""
        first, rows = block.first_row, block.rows
        self._ports.embedding.load(block, self._residual[first : first + rows])
        delta = None
        for layer in self._network.layers:
            self._ops.add_norm(layer.attention_norm, self._residual, self._x, first, rows, delta=delta)
            yield from self._ports.attention.run(layer, step, block)
            self._ops.add_norm(layer.mlp_norm, self._residual, self._x, first, rows, delta=self._hidden)
            yield from self._mlp.run(layer, block)
            delta = self._hidden

    def _lm_head(self, step: Step, take: TakeLogits, verification: Verification) -> Task:
        """Adds the last delta, normalises the wanted rows and has their logits computed, a slot's worth at a time."""
        network = self._network
        for first in range(0, len(step.wanted), self._logits.num_rows):
            index = step.wanted[first : first + self._logits.num_rows]
            rows = len(index)
            self._ops.add_norm(
                network.final_norm, self._residual, self._x, 0, rows, delta=self._hidden, row_index=index
            )
            yield from self._ports.linears.apply(network.lm_head, Block(0, 0, rows, ()), self._x, self._logits)
            self._ops.load_rows(self._logits, 0, rows, self._rows[:rows])
            take(first, Unverified(self._rows[:rows], verification))


# Makes the engine of a session without a GPU process. What is handed in is called between two operations, whose step it
# may end: deadlines and the session's end are looked at there, as they are in waits.
MakeEngineAlone = Callable[[Slots, Callable[[], None], Statistics], Engine]
