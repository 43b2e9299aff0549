"""The keys and values of every sequence, on the device, for all layers, allocated once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu.device import Device
from tsqp_shm.shm.plan import Model
from tsqp_shm.shm.tiling import KEY_BLOCK, KeyRange, Segment, padded_length


class StaleRange(NamedTuple):
    """Cached positions [start, end) of a sequence that hold what an earlier sequence left."""

    sequence: int
    start: int
    end: int


class SequenceLengths:
    """How far each sequence's cache is filled. A sequence starts over when it writes position 0: nothing is freed."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self._lengths = [0] * max_num_seqs
        self._max_model_len = max_model_len

    def advance(self, segments: list[Segment]) -> list[StaleRange]:
        """Makes room for a step's segments.

        Returns:
            What has to be zeroed first: a probability beyond the last key is zero, and zero times what another
            sequence left there must be zero.

        Raises:
            ProtocolError: a segment lies outside the cache or leaves a hole behind the sequence's end.
        """
        stale = []
        for segment in segments:
            if segment.sequence >= len(self._lengths):
                raise ProtocolError("segment sequence", f"below {len(self._lengths)}", segment.sequence)
            end = segment.position + segment.rows
            length = self._lengths[segment.sequence]
            if end > self._max_model_len or segment.position > length:
                raise ProtocolError("segment position", f"at most {length}", segment.position)
            if segment.position < length:
                stale.append(StaleRange(segment.sequence, segment.position, padded_length(length)))
            self._lengths[segment.sequence] = end
        return stale


class Run(NamedTuple):
    """Columns [start, start + length) of one row of the cache, where positions lie that follow on each other."""

    row: int
    start: int
    length: int


class BlockTable:
    """Where a sequence's keys and values lie: its positions [KEY_BLOCK * b, KEY_BLOCK * (b + 1)) are block
    `entries[sequence, b]` of the cache.

    The cache has as many blocks as its sequences can fill, in rows of as many as one sequence can. The identity gives
    each sequence a row of its own.

    Attributes:
        entries: [sequences, blocks of each] i32.
    """

    def __init__(self, entries: npt.NDArray[np.int32]) -> None:
        self.entries = entries
        self._blocks_each = entries.shape[1]
        # Of the sequences that were used: a thousand of a million tokens would take gigabytes.
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    @classmethod
    def identity(cls, max_num_seqs: int, max_model_len: int) -> BlockTable:
        shape = max_num_seqs, padded_length(max_model_len) // KEY_BLOCK
        return cls(np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape))

    def runs(self, sequence: int, start: int, end: int) -> list[Run]:
        """The positions [start, end) of a sequence, in order: one run where the table is the identity."""
        blocks, run_ends = self._rows.get(sequence) or self._row(sequence)
        found = []
        while start < end:
            block, within = divmod(start, KEY_BLOCK)
            run_end = min(end, run_ends[block] * KEY_BLOCK)
            row, column = divmod(blocks[block], self._blocks_each)
            found.append(Run(row, column * KEY_BLOCK + within, run_end - start))
            start = run_end
        return found

    def _row(self, sequence: int) -> tuple[list[int], list[int]]:
        """A sequence's blocks, and for each the first one behind it that does not follow on it in its row."""
        blocks = self.entries[sequence].tolist()
        row = self._rows[sequence] = blocks, self._ends_of_runs(blocks)
        return row

    def _ends_of_runs(self, blocks: list[int]) -> list[int]:
        ends = list(range(1, len(blocks) + 1))
        for index in reversed(range(len(blocks) - 1)):
            if blocks[index + 1] == blocks[index] + 1 and blocks[index + 1] % self._blocks_each:
                ends[index] = ends[index + 1]
        return ends


class KVCache:
    """Shapes: keys [layers, rows, G, D, S], transposed as the score product reads them; values [layers, rows, G, S, D].
    S is max_model_len in whole key blocks; there are as many rows as sequences, and where a sequence's blocks lie in
    them is in the table.
    """

    def __init__(
        self,
        model: Model,
        blocks: BlockTable,
        max_model_len: int,
        dtype: torch.dtype,
        device: Device,
    ) -> None:
        rows, blocks_each = blocks.entries.shape
        heads, dim, columns = model.num_kv_heads, model.head_dim, blocks_each * KEY_BLOCK
        self._keys = device.zeros((model.num_layers, rows, heads, dim, columns), dtype)
        self._values = device.zeros((model.num_layers, rows, heads, columns, dim), dtype)
        self._blocks = blocks
        self._lengths = SequenceLengths(rows, max_model_len)

    @staticmethod
    def size_bytes(model: Model, max_num_seqs: int, max_model_len: int, dtype: torch.dtype) -> int:
        elements = model.num_layers * max_num_seqs * model.num_kv_heads * model.head_dim
        return 2 * elements * padded_length(max_model_len) * dtype.itemsize

    def begin_step(self, segments: list[Segment]) -> None:
        """Makes room for a step's segments. Raises what `SequenceLengths.advance` does."""
        for stale in self._lengths.advance(segments):
            for run in self._blocks.runs(stale.sequence, stale.start, stale.end):
                self._values[:, run.row, :, run.start : run.start + run.length] = 0

    def append(self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes a segment's keys and values. Shapes: both [rows, G, D]."""
        row = 0
        for run in self._blocks.runs(segment.sequence, segment.position, segment.position + segment.rows):
            columns, rows = slice(run.start, run.start + run.length), slice(row, row + run.length)
            self._keys[layer, run.row, :, :, columns] = keys[rows].permute(1, 2, 0)
            self._values[layer, run.row, :, columns] = values[rows].transpose(0, 1)
            row += run.length

    def keys(self, layer: int, sequence: int, keys: KeyRange) -> torch.Tensor:
        """Shapes: [G, D, columns]. A view where the keys lie in one run, else a copy."""
        runs = self._blocks.runs(sequence, keys.start, keys.start + keys.columns)
        parts = [self._keys[layer, run.row, :, :, run.start : run.start + run.length] for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def values(self, layer: int, sequence: int, keys: KeyRange) -> torch.Tensor:
        """Shapes: [G, columns, D]. A view or a copy, as `keys`."""
        runs = self._blocks.runs(sequence, keys.start, keys.start + keys.columns)
        parts = [self._values[layer, run.row, :, run.start : run.start + run.length] for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
