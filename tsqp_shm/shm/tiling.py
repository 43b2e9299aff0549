"""How a ragged batch is cut for attention: chunks into segments, segments into tiles.

A chunk is what one sequence contributes to a forward pass. A segment is at most `tile_rows` consecutive rows of one
chunk. A tile is a run of segments that share one score slot: one prefill segment, or many decode rows together.
Both sides compute with these functions, so a tile's shape never has to be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Keys are scored in blocks of this many: shapes repeat from one decode step to the next, so that a GEMM library
# builds its kernels once and not for each new length. The surplus columns are masked by softmax.
KEY_BLOCK = 64

# Each has a few submissions in flight, which must fit the ring together.
MAX_BLOCKS = 8


class Segment(NamedTuple):
    """Rows [first_row, first_row + rows) of the batch are positions [position, position + rows) of a sequence."""

    sequence: int
    position: int
    first_row: int
    rows: int


class Tile(NamedTuple):
    """Segments [first_segment, first_segment + num_segments) of the step, scored together."""

    first_segment: int
    num_segments: int


class Block(NamedTuple):
    """Rows that go through the layers together: whole tiles, one behind the other."""

    number: int
    first_row: int
    rows: int
    tiles: tuple[Tile, ...]


class KeyRange(NamedTuple):
    """Keys [start, end) of the cache that a segment may see; `columns` is their number rounded up to KEY_BLOCK."""

    start: int
    end: int
    columns: int


def padded_length(length: int) -> int:
    """Rounds a number of keys up to whole blocks."""
    return -(-length // KEY_BLOCK) * KEY_BLOCK


def key_range(segment: Segment, window: int | None) -> KeyRange:
    """The keys a segment needs: up to its last row, and no further back than its first row's window."""
    start = 0
    if window is not None:
        start = max(0, segment.position - window + 1) // KEY_BLOCK * KEY_BLOCK
    end = segment.position + segment.rows
    return KeyRange(start, end, padded_length(end - start))


def cut_segments(chunks: Iterable[tuple[int, int, int]], tile_rows: int) -> list[Segment]:
    """Cuts chunks (sequence, position, tokens), which lie one behind the other in the batch, into segments."""
    segments = []
    first_row = 0
    for sequence, position, tokens in chunks:
        for done in range(0, tokens, tile_rows):
            rows = min(tile_rows, tokens - done)
            segments.append(Segment(sequence, position + done, first_row + done, rows))
        first_row += tokens
    return segments


def group_tiles(segments: Sequence[Segment], tile_rows: int) -> list[Tile]:
    """Packs consecutive segments into tiles of at most `tile_rows` rows, which is what a score slot holds."""
    tiles: list[Tile] = []
    rows = tile_rows
    for index, segment in enumerate(segments):
        if rows + segment.rows > tile_rows:
            tiles.append(Tile(index, 0))
            rows = 0
        rows += segment.rows
        tiles[-1] = Tile(tiles[-1].first_segment, tiles[-1].num_segments + 1)
    return tiles


def cut_blocks(segments: Sequence[Segment], tiles: Sequence[Tile], block_rows: int) -> list[Block]:
    """Groups consecutive tiles into blocks of at least `block_rows` rows, at most MAX_BLOCKS of them; the last takes
    what is left."""
    total_rows = segments[-1].first_row + segments[-1].rows
    block_rows = max(block_rows, -(-total_rows // MAX_BLOCKS))
    blocks: list[Block] = []
    first_row, of_block = 0, []
    for tile in tiles:
        of_block.append(tile)
        last = segments[tile.first_segment + tile.num_segments - 1]
        end_row = last.first_row + last.rows
        if end_row - first_row >= block_rows or end_row == total_rows:
            blocks.append(Block(len(blocks), first_row, end_row - first_row, tuple(of_block)))
            first_row, of_block = end_row, []
    return blocks
