"""The keys and values of every sequence, on the device, for all layers, allocated once."""

from __future__ import annotations

import torch

from tsqp_shm.errors import ProtocolError
from tsqp_shm.gpu.device import Device
from tsqp_shm.shm.plan import Geometry
from tsqp_shm.shm.tiling import KeyRange, Segment, padded_length


class KVCache:
    """Shapes: keys [layers, sequences, G, D, S], transposed as the score product reads them; values
    [layers, sequences, G, S, D]. S is max_model_len in whole key blocks.

    A sequence starts over when it writes position 0, so nothing has to be freed.
    """

    def __init__(
        self, model: Geometry, max_num_seqs: int, max_model_len: int, dtype: torch.dtype, device: Device
    ) -> None:
        columns = padded_length(max_model_len)
        heads, dim = model.num_kv_heads, model.head_dim
        self._keys = device.zeros((model.num_layers, max_num_seqs, heads, dim, columns), dtype)
        self._values = device.zeros((model.num_layers, max_num_seqs, heads, columns, dim), dtype)
        self._lengths = [0] * max_num_seqs
        self._max_model_len = max_model_len

    @staticmethod
    def size_bytes(model: Geometry, max_num_seqs: int, max_model_len: int, dtype: torch.dtype) -> int:
        elements = model.num_layers * max_num_seqs * model.num_kv_heads * model.head_dim
        return 2 * elements * padded_length(max_model_len) * dtype.itemsize

    def begin_step(self, segments: list[Segment]) -> None:
        """Makes room for a step's segments.

        Raises:
            ProtocolError: a segment lies outside the cache or leaves a hole behind the sequence's end.
        """
        for segment in segments:
            if segment.sequence >= len(self._lengths):
                raise ProtocolError("segment sequence", f"below {len(self._lengths)}", segment.sequence)
            end = segment.position + segment.rows
            length = self._lengths[segment.sequence]
            if end > self._max_model_len or segment.position > length:
                raise ProtocolError("segment position", f"at most {length}", segment.position)
            if segment.position < length:
                # Probabilities beyond the last key are zero, and zero times what another sequence left must be zero.
                self._values[:, segment.sequence, :, segment.position : padded_length(length)] = 0
            self._lengths[segment.sequence] = end

    def append(self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes a segment's keys and values. Shapes: both [rows, G, D]."""
        end = segment.position + segment.rows
        self._keys[layer, segment.sequence, :, :, segment.position : end] = keys.permute(1, 2, 0)
        self._values[layer, segment.sequence, :, segment.position : end] = values.transpose(0, 1)

    def by_sequence(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Keys [G, D, S] and values [G, S, D] of each layer and sequence."""
        return [
            list(zip(keys.unbind(0), values.unbind(0), strict=True))
            for keys, values in zip(self._keys.unbind(0), self._values.unbind(0), strict=True)
        ]

    def keys(self, layer: int, sequence: int, keys: KeyRange) -> torch.Tensor:
        """Shapes: [G, D, columns]."""
        return self._keys[layer, sequence, :, :, keys.start : keys.start + keys.columns]

    def values(self, layer: int, sequence: int, keys: KeyRange) -> torch.Tensor:
        """Shapes: [G, columns, D]."""
        return self._values[layer, sequence, :, keys.start : keys.start + keys.columns]
