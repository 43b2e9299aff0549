"""A ragged batch: what each sequence contributes to a forward pass, and how it is cut for attention and for the blocks
that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tsqp_shm.config import Limits
from tsqp_shm.shm.tiling import Block, Segment, Tile, cut_blocks, cut_segments, group_tiles

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Chunk:
    """What one sequence contributes to a forward pass.

    Attributes:
        sequence: index of its cache, below max_num_seqs.
        position: position of the first token; everything before it is in the cache.
        token_ids: at least one.
        num_logits: of how many of the last tokens that are somebody's logits are wanted.
        pending: how many rows of the sequence are to follow that are known already.
        num_surplus: how many of the last token_ids are nobody's: they make a prompt look longer from outside.
        ahead: of a prompt, how many rows are to come of those that came before it and have no part in this pass.
    """

    sequence: int
    position: int
    token_ids: Sequence[int]
    num_logits: int = 1
    pending: int = 0
    num_surplus: int = 0
    ahead: int = 0

    @property
    def num_tokens(self) -> int:
        """Of somebody's."""
        return len(self.token_ids) - self.num_surplus

    @property
    def is_prompt(self) -> bool:
        """Whether it belongs to a prompt: what was drawn enters token by token."""
        return self.pending + len(self.token_ids) > 1

    @property
    def wanted_positions(self) -> range:
        """Those after which logits are wanted."""
        end = self.position + self.num_tokens
        return range(end - self.num_logits, end)


class Step(NamedTuple):
    """One forward pass.

    Shapes: token_ids, positions [T] i32; wanted [R] i32, the rows whose logits are wanted.
    """

    chunks: Sequence[Chunk]
    token_ids: Int32
    positions: Int32
    segments: list[Segment]
    blocks: list[Block]
    wanted: Int32

    @classmethod
    def cut(cls, chunks: Sequence[Chunk], limits: Limits) -> Step:
        """The chunks one behind the other."""
        token_ids = np.concatenate([np.asarray(chunk.token_ids, np.int32) for chunk in chunks])
        positions = np.concatenate(
            [np.arange(c.position, c.position + len(c.token_ids), dtype=np.int32) for c in chunks]
        )
        segments = cut_segments(((c.sequence, c.position, len(c.token_ids)) for c in chunks), limits.tile_rows)
        blocks = cut_blocks(segments, group_tiles(segments, limits.tile_rows), limits.block_rows)
        return cls(chunks, token_ids, positions, segments, blocks, _wanted_rows(chunks))

    def segments_of(self, tile: Tile) -> list[Segment]:
        return self.segments[tile.first_segment : tile.first_segment + tile.num_segments]

    def positions_of(self, block: Block) -> Int32:
        return self.positions[block.first_row : block.first_row + block.rows]


def _wanted_rows(chunks: Sequence[Chunk]) -> Int32:
    wanted = []
    end = 0
    for chunk in chunks:
        end += len(chunk.token_ids)
        last = end - chunk.num_surplus
        wanted.append(np.arange(last - chunk.num_logits, last, dtype=np.int32))
    return np.concatenate(wanted)
