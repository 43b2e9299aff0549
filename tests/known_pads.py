"""Pads whose seed is known, and what they must be: by the standard library's HMAC, and draws of single rows."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from checked_linear import CheckedLinear, M, X

from tsqp_shm import _native

SESSION, DIGEST, EPOCH = b"a session", b"sha256:0123", 7
SEED = bytes(range(32))
SOON_S = 30.0  # in which what will come has come


def pad_keys(num_linears: int) -> _native.PadKeys:
    return _native.PadKeys(SESSION, DIGEST, EPOCH, num_linears, SEED)


def known_pads(linear: int, first_row: int, rows: int, inputs: int) -> np.ndarray:
    """r of those rows. Shapes: [rows, inputs] u32."""
    root = hmac.digest(b"tsqp-shm pads 1", SEED, hashlib.sha256)
    info = b"pad key"
    for part in (SESSION, DIGEST):
        info += len(part).to_bytes(2, "big") + part
    info += EPOCH.to_bytes(8, "big") + linear.to_bytes(4, "big")
    key = hmac.digest(root, info + b"\x01", hashlib.sha256)
    return np.stack([_native.draw_pads(key, row, inputs) for row in range(first_row, first_row + rows)])


@contextmanager
def stocked(linears: Sequence[CheckedLinear], capacity: int, threads: int = 1) -> Iterator[_native.PadStock]:
    stock = _native.PadStock(pad_keys(len(linears)), [linear.linear for linear in linears], capacity, threads)
    try:
        yield stock
    finally:
        stock.close()


def taken(stock: _native.PadStock, linear: int, rows: int) -> _native.PadRows:
    assert stock.wait(linear, rows, SOON_S)
    pads = stock.take(linear, rows)
    assert pads is not None
    return pads


def begin(linear: CheckedLinear, pads: _native.PadRows, first_row: int = 0, copy: np.ndarray | None = None) -> None:
    linear.check.begin(linear.slots, X, M, first_row, pads.rows, copy, pads)
