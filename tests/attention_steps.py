"""A cache, rows of queries, keys and values, and what attention makes of them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from slot_memory import F32, Arena

from tsqp_shm import _native

BLOCK = 64
# (sequence, position, first row, rows)
Segment = tuple[int, int, int, int]


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    """Finite float32 values to the nearest of bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def qkv_elements(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def out_elements(self) -> int:
        return self.heads * self.head_dim


class Step:
    """A slot of q, k and v and one of results, of `rows` rows each, in private memory."""

    def __init__(self, rows: int, shape: Shape) -> None:
        self.shape = shape
        arena = Arena((rows, shape.qkv_elements, F32), (rows, shape.out_elements, F32))
        self.slots, (self.qkv, self.out) = arena.slots, arena.view

    def attend(self, cache: _native.KeyValueCache, segments: Sequence[Segment], **options: Any) -> np.ndarray:
        """Results of all rows: those of no segment are NaN."""
        self.out[:] = np.nan
        _native.attend(
            cache,
            self.slots,
            0,
            1,
            np.array(segments, np.int32).reshape(-1, 4),
            num_heads=self.shape.heads,
            **{"scale": self.shape.head_dim**-0.5, **options},
        )
        return self.out.copy()


def new_cache(
    shape: Shape, positions: int, sequences: int = 1, element: str = "bfloat16", shuffle: int | None = None
) -> _native.KeyValueCache:
    """With room for `positions` of each sequence; `shuffle` is the seed by which its blocks lie anywhere."""
    each = -(-positions // BLOCK)
    blocks = np.arange(sequences * each, dtype=np.int32)
    if shuffle is not None:
        np.random.default_rng(shuffle).shuffle(blocks)
    return _native.KeyValueCache(shape.kv_heads, shape.head_dim, blocks.reshape(sequences, each), element)


def chunked(
    qkv: np.ndarray,
    shape: Shape,
    chunks: Sequence[int],
    cache: _native.KeyValueCache,
    sequence: int = 0,
    **options: Any,
) -> np.ndarray:
    """The rows of one sequence from position 0, chunk by chunk, a step for each."""
    found, position = [], 0
    for rows in chunks:
        step = Step(rows, shape)
        step.qkv[:] = qkv[position : position + rows]
        found.append(step.attend(cache, [(sequence, position, 0, rows)], **options))
        position += rows
    return np.concatenate(found)


def exact(
    qkv: np.ndarray,
    shape: Shape,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Float64 attention of all rows of a sequence from position 0; keys and values as they are given."""
    rows, (heads, groups, dim) = len(qkv), shape
    q, k, v = np.split(qkv.astype(np.float64), [heads * dim, (heads + groups) * dim], axis=1)
    repeated = [np.repeat(x.reshape(rows, groups, dim), heads // groups, axis=1) for x in (k, v)]
    scores = np.einsum("thd,shd->hts", q.reshape(rows, heads, dim), repeated[0])
    scores *= np.float32(dim**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    t, s = np.arange(rows)[:, None], np.arange(rows)[None]
    visible = (s <= t) & (s > t - (window or rows))
    scores = np.where(visible, scores, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (heads, rows, 1))
        scores = np.concatenate([scores, column], axis=2)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights = (weights / weights.sum(axis=2, keepdims=True))[:, :, :rows]
    return np.einsum("hts,shd->thd", weights, repeated[1]).reshape(rows, -1)


def rounded_keys_and_values(qkv: np.ndarray, shape: Shape) -> np.ndarray:
    """As a bfloat16 cache holds them, queries as they are."""
    at = shape.heads * shape.head_dim
    return np.concatenate([qkv[:, :at], rounded_to_bf16(qkv[:, at:])], axis=1)
