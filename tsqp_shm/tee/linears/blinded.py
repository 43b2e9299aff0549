"""Linears of the GPU process on rows that are blinded with one-time pads, and of this one where there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from tsqp_shm.errors import PadsExhausted
from tsqp_shm.model.network import Linear
from tsqp_shm.shm.plan import Slot
from tsqp_shm.shm.tiling import Block
from tsqp_shm.tee.batch import Chunk, Step
from tsqp_shm.tee.interleave import Task
from tsqp_shm.tee.linears.field import FieldLinears
from tsqp_shm.tee.linears.local import LocalLinears
from tsqp_shm.tee.pads import Pads
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.verification import Kept, Verification

LM_HEAD = "lm_head"


class BlindedLinears:
    """A block's rows go to the GPU process as far as there are pads, and are computed here where there are none: with
    the same bits. Where a row is computed depends on lengths and on how many pads there are, and on nothing else.

    Args:
        look: called now and then while pads are waited for; what it raises ends the step.
        transcript: takes every product; None: nobody asks for them.
    """

    def __init__(
        self,
        field: FieldLinears,
        local: LocalLinears,
        pads: Pads,
        look: Callable[[], None],
        transcript: Transcript | None = None,
    ) -> None:
        self._field = field
        self._local = local
        self._pads = pads
        self._look = look
        self._transcript = transcript
        self._verification = Verification()
        # Of the step: the blocks whose rows stay here, and how many rows lm_head has had.
        self._kept_blocks: frozenset[int] = frozenset()
        self._wanted_rows = 0
        # Of each Linear, how many blocks are with the GPU process.
        self._num_out: Counter[int] = Counter()

    def begin(self, verification: Verification, step: Step) -> None:
        self._field.begin(verification, step)
        self._verification = verification
        self._wanted_rows = 0
        self._num_out.clear()
        prompts = [chunk for chunk in step.chunks if chunk.is_prompt]
        rows = sum(len(chunk.token_ids) + chunk.pending for chunk in prompts)
        # Prompts take turns: what those that came before will need is spoken for.
        rows += max((chunk.ahead for chunk in prompts), default=0)
        self._kept_blocks = frozenset() if self._pads.take_prompts(rows) else _blocks_with_prompts(step)

    def check_arrived(self) -> None:
        self._field.check_arrived()

    def lack_pads(self, chunks: Sequence[Chunk]) -> Mapping[int, PadsExhausted]:
        """As `Ports.lack_pads`: who fits goes on, whoever else is in the step."""
        left = self._pads.refuses_beyond
        lacking: dict[int, PadsExhausted] = {}
        if left is None:
            return lacking
        for index, chunk in enumerate(chunks):
            # Of a prompt all that is to come, or others would find nothing where it is refused in the end.
            rows = 0 if chunk.is_prompt and self._pads.keeps_prompts else len(chunk.token_ids) + chunk.pending
            if rows > max(0, left - chunk.ahead):
                lacking[index] = PadsExhausted(rows, max(0, left - chunk.ahead))
            else:
                left -= rows
        return lacking

    def apply(self, linear: Linear, block: Block, x: Slot, out: Slot) -> Task:
        # Of a prompt lm_head sees a row, and the rows of a step whose logits are wanted make a block of their own.
        is_of_layer, pads, first = linear.role != LM_HEAD, None, block.first_row
        if not is_of_layer:
            first, self._wanted_rows = self._wanted_rows, self._wanted_rows + block.rows
        if not (is_of_layer and block.number in self._kept_blocks):
            pads = self._pads.take(linear, block.rows)
            while pads is None and self._pads.waits:
                if self._num_out[linear.index]:
                    # Another block's are out, and only when they are back there may be room for more.
                    yield None
                else:
                    self._pads.wait(linear, block.rows, self._look)
                pads = self._pads.take(linear, block.rows)
        if pads is not None:
            self._num_out[linear.index] += 1
            yield from self._field.apply(linear, block, x, out, pads)
            self._num_out[linear.index] -= 1
            return
        self._pads.products_in_tee += block.rows
        self._verification.keep(Kept(is_of_layer, first, block.rows))
        if self._transcript is not None:
            self._transcript.keep(linear, block.first_row, block.rows)
        yield from self._local.apply(linear, block, x, out)


def _blocks_with_prompts(step: Step) -> frozenset[int]:
    kept, first = set(), 0
    for chunk in step.chunks:
        end = first + len(chunk.token_ids)
        if chunk.is_prompt:
            kept |= {
                block.number for block in step.blocks if block.first_row < end and first < block.first_row + block.rows
            }
        first = end
    return frozenset(kept)
