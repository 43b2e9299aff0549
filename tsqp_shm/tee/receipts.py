"""How evidence speaks of a request without saying what was asked or answered: hashes that nobody can guess at who has
not the request's nonce, which the requester alone gets.

docs/evidence.md has the form of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsqp_shm.errors import EvidenceError
from tsqp_shm.files import replace_file
from tsqp_shm.tee.sampling_params import SamplingParams

NONCE_BYTES = 32
NONCES_SCHEMA = "tsqp-shm nonces 1"
# Params that hold text or token ids of the requester's.
WITHHELD = ("stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids")


class Receipt(NamedTuple):
    """What a requester gets, to find and to open the record of a request.

    Attributes:
        request: its number in the evidence.
        nonce: 32 random bytes of this request alone.
    """

    request: int
    nonce: bytes

    def hash(self, content: bytes) -> str:
        return f"sha256:{hashlib.sha256(self.nonce + content).hexdigest()}"

    def hash_tokens(self, token_ids: Sequence[int]) -> str:
        """SHA-256(nonce || token ids as little-endian u32)."""
        return self.hash(np.array(token_ids, "<u4").tobytes())

    def params(self, params: SamplingParams, seed: int | None) -> dict[str, Any]:
        """Params as evidence has them: with the seed that was drawn, and what is withheld as
        SHA-256(nonce || name || JSON), by its name so that two of them that are equal do not show it.

        Args:
            seed: by which the request's tokens are drawn; None: none is drawn.
        """
        shown = {field.name: getattr(params, field.name) for field in fields(params)}
        return {
            **shown,
            "seed": seed,
            **{name: self.hash(name.encode() + canonical(shown[name])) for name in _withheld(params)},
        }


class Receipts:
    """Draws those of a session; any thread may ask."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def next(self) -> Receipt:
        return Receipt(next(self._numbers), os.urandom(NONCE_BYTES))


def withheld_params(params: SamplingParams) -> dict[str, Any]:
    """What evidence has of params as hashes alone."""
    return {name: getattr(params, name) for name in _withheld(params)}


def nonces_path(evidence: Path) -> Path:
    """Where launch keeps the nonces of FILE.json: FILE.nonces.json."""
    return evidence.with_name(f"{evidence.name.removesuffix('.json')}.nonces.json")


def write_nonces(path: Path, requests: Sequence[tuple[Receipt, SamplingParams]]) -> None:
    """The file that a requester keeps, of mode 0600.

    Raises:
        EvidenceError: it cannot be written.
    """
    told = [
        {"request": receipt.request, "nonce": receipt.nonce.hex(), "params": withheld_params(params)}
        for receipt, params in requests
    ]
    try:
        replace_file(path, canonical({"schema": NONCES_SCHEMA, "requests": told}) + b"\n")
    except OSError as error:
        raise EvidenceError(path, f"cannot be written: {error.strerror}") from error


def canonical(value: object) -> bytes:
    """JSON with sorted keys, without spaces, in ASCII: one value, one sequence of bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _withheld(params: SamplingParams) -> list[str]:
    return [name for name in WITHHELD if getattr(params, name)]
