"""The keys and values of every sequence, on the device, for all layers, allocated once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu.device import Device
from tsqp_shm.shm.plan import Geometry
from tsqp_shm.shm.tiling import KeyRange, Segment, padded_length


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


class KVCache:
    """Shapes: keys [layers, sequences, G, D, S], transposed as the score product reads them; values
    [layers, sequences, G, S, D]. S is max_model_len in whole key blocks.
    """

    def __init__(
        self, model: Geometry, max_num_seqs: int, max_model_len: int, dtype: torch.dtype, device: Device
    ) -> None:
        columns = padded_length(max_model_len)
        heads, dim = model.num_kv_heads, model.head_dim
        self._keys = device.zeros((model.num_layers, max_num_seqs, heads, dim, columns), dtype)
        self._values = device.zeros((model.num_layers, max_num_seqs, heads, columns, dim), dtype)
        self._lengths = SequenceLengths(max_num_seqs, max_model_len)

    @staticmethod
    def size_bytes(model: Geometry, max_num_seqs: int, max_model_len: int, dtype: torch.dtype) -> int:
        elements = model.num_layers * max_num_seqs * model.num_kv_heads * model.head_dim
        return 2 * elements * padded_length(max_model_len) * dtype.itemsize

    def begin_step(self, segments: list[Segment]) -> None:
        """Makes room for a step's segments. Raises what `SequenceLengths.advance` does."""
        for stale in self._lengths.advance(segments):
            self._values[:, stale.sequence, :, stale.start : stale.end] = 0

    def append(self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes a segment's keys and values. Shapes: both [rows, G, D]."""
        end = segment.position + segment.rows
        self._keys[layer, segment.sequence, :, :, segment.position : end] = keys.permute(1, 2, 0)
        self._values[layer, segment.sequence, :, segment.position : end] = values.transpose(0, 1)

    def keys(self, layer: int, sequence: int, keys: KeyRange) -> torch.Tensor:
        """Shapes: [G, D, columns]."""
        return self._keys[layer, sequence, :, :, keys.start : keys.start + keys.columns]

    def values(self, layer: int, sequence: int, keys: KeyRange) -> torch.Tensor:
        """Shapes: [G, columns, D]."""
        return self._values[layer, sequence, :, keys.start : keys.start + keys.columns]
