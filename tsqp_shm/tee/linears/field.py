"""Linears of the GPU process as integers of a field, each product checked: it multiplies, and decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tsqp_shm import _native
from tsqp_shm.errors import PadsExhausted
from tsqp_shm.model.network import Linear
from tsqp_shm.shm.plan import Plan, Slot
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.batch import Chunk, Step
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.submission import SubmissionQueue
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.verification import Verification


class _Product(NamedTuple):
    """One that was submitted and is not checked yet.

    Attributes:
        sent: what was submitted, where a transcript wants it.
    """

    sequence: int
    linear: Linear
    y: Slot
    out: Slot
    first_row: int
    rows: int
    sent: npt.NDArray[np.uint32] | None


class FieldLinears:
    """A block's rows as integers m into the arena; what comes of them, y, is checked as it is read.

    Args:
        checks: of each Linear, at its index.
        transcript: takes every product; None: nobody asks for them.
    """

    def __init__(
        self,
        plan: Plan,
        checks: Sequence[_native.FieldCheck],
        queue: SubmissionQueue,
        ops: Operations,
        transcript: Transcript | None = None,
    ) -> None:
        self._checks = checks
        self._queue = queue
        self._ops = ops
        self._transcript = transcript
        self._operations = plan.linear_operations
        self._slots = [
            (plan.slot(linear.slots[0]), plan.slot(linear.slots[1])) for linear in plan.linears if linear.slots
        ]
        # In the order of their numbers, which is that of their completions.
        self._unchecked: deque[_Product] = deque()
        self._verification = Verification()

    def begin(self, verification: Verification, step: Step) -> None:
        self._queue.begin_step()
        self._unchecked.clear()
        self._verification = verification

    def apply(self, linear: Linear, block: Block, x: Slot, out: Slot, pads: _native.PadRows | None = None) -> Task:
        """As `LinearsPort.apply`.

        Args:
            pads: of the Linear, as many as the block has rows: they are taken from what crosses; None: it crosses as it
                is.
        """
        first, rows = block.first_row, block.rows
        m, y = self._slots[linear.index]
        sent = None if self._transcript is None else np.empty((rows, linear.inputs), np.uint32)
        self._ops.quantise(self._checks[linear.index], x, m, first, rows, sent, pads)
        sequence = self._queue.submit(
            Opcode.LINEAR, target=linear.index, in_slot=m, out_slot=y, first_row=first, rows=rows
        )
        # What the next one reads is far away by then, and this side waits now.
        self._checks[(linear.index + 1) % len(self._checks)].fetch()
        self._verification.expect()
        self._unchecked.append(_Product(sequence, linear, y, out, first, rows, sent))
        yield sequence
        self._check(sequence)

    def check_arrived(self) -> None:
        self._check(self._queue.take_arrived())

    def lack_pads(self, chunks: Sequence[Chunk]) -> Mapping[int, PadsExhausted]:
        return {}

    def _check(self, sequence: int) -> None:
        """All that is complete up to that number."""
        while self._unchecked and self._unchecked[0].sequence <= sequence:
            product = self._unchecked.popleft()
            check = self._checks[product.linear.index]
            rows = product.first_row, product.rows
            received = None if product.sent is None else np.empty((product.rows, product.linear.outputs), np.uint32)
            held = self._ops.check(check, product.y, product.out, *rows, received)
            # Before anything that can go wrong: whoever fills a disk is not to hide a false product.
            self._verification.add(self._operations[product.linear.index], product.rows, held=held)
            if self._transcript is not None and product.sent is not None and received is not None:
                self._transcript.add(product.linear, product.first_row, product.sent, received)
