"""The evidence of a session: one canonical JSON file of how each request was computed and checked, without a word of
what it said.

docs/evidence.md has its form. It is written as a whole and put in the place of the one before, so that whoever looks,
at any moment and after a kill, finds a whole one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsqp_shm._version import __version__
from tsqp_shm.config import Limits
from tsqp_shm.errors import EvidenceError, IntegrityError, TsqpError
from tsqp_shm.files import replace_file
from tsqp_shm.model.field_weights import FIELD
from tsqp_shm.model.network import Network
from tsqp_shm.modes import MODES
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.receipts import Receipt, Receipts, canonical
from tsqp_shm.tee.verification import Products

SCHEMA = "tsqp-shm evidence 1"
# What has become of the session's pads so far; None in a mode without.
LookAtPads = Callable[[], "dict[str, Any] | None"]
_OF_PADS = (
    "key_id", "capacity_rows", "stock_rows", "made", "made_per_s", "used", "burned", "tee_products"
)  # fmt: skip
# Writing takes at most such a part of the time of a session that is never idle.
_SHARE_OF_TIME = 1 / 20


@dataclass
class _Counts:
    """Of one completion.

    Attributes:
        passes: in which it had a part.
        rows: of its tokens, that went through the layers.
        wanted_rows: of these, that went through lm_head.
        in_tee: rows of products that the TEE process has computed itself, where others go to the GPU process.
    """

    passes: int = 0
    rows: int = 0
    wanted_rows: int = 0
    in_tee: int = 0


@dataclass
class _Request:
    """One that has not ended. Those of its completions that have, as records."""

    receipt: Receipt
    running: dict[Completion, _Counts] = field(default_factory=dict)
    ended: list[dict[str, Any]] = field(default_factory=list)


class Evidence:
    """Is told of requests by the thread that runs the steps, of a pass when its checks have ended.

    Args:
        path: of the file.

    Attributes:
        receipts: draws the receipt of each request; any thread may ask.
    """

    def __init__(self, path: Path) -> None:
        self.receipts = Receipts()
        self._path = path
        self._session: dict[str, Any] = {}
        self._num_layer_linears = 0
        self._is_checked = False
        self._has_pads = False
        self._look_at_pads: LookAtPads = lambda: None
        self._requests: dict[int, _Request] = {}
        # Of those that have ended, in JSON, by their numbers.
        self._records: dict[int, bytes] = {}
        self._is_dirty = True
        self._written_s = 0.0
        self._write_took_s = 0.0

    def begin(self, network: Network, limits: Limits, weights: dict[str, Any], pads: LookAtPads) -> None:
        """The session begins.

        Args:
            weights: `Anchor.describe()`.
            pads: gives what has become of the session's pads so far; None in a mode without.

        Raises:
            EvidenceError: the file cannot be written.
        """
        mode = MODES[limits.mode]
        self._num_layer_linears = len(network.linears) - 1
        self._is_checked = mode.num_vectors > 0
        self._has_pads = mode.has_pads
        self._look_at_pads = pads
        self._session = {
            "mode": mode.name,
            "arithmetic": limits.arithmetic,
            "field": FIELD,
            "vectors": mode.num_vectors,
            "maker": (pads() or {}).get("maker"),
            **weights,
            "max_model_len": limits.max_model_len,
            "versions": {"tsqp_shm": __version__, "model_digest": 2, "linears_digest": 1},
            "attestation": "none (simulation)",
            "failures": [],
        }
        self._write()

    def add(self, completion: Completion) -> None:
        """One is to be run."""
        if completion.receipt is None:
            completion.receipt = self.receipts.next()
        receipt = completion.receipt
        request = self._requests.setdefault(receipt.request, _Request(receipt))
        request.running[completion] = _Counts()

    def count(self, batch: Sequence[tuple[Completion | None, Chunk]], products: Products) -> None:
        """A pass is over, and all its checks have held.

        Args:
            products: as they were counted when each was checked or computed; each row goes through every Linear once.
        """
        rows = sum(self._num_products(len(chunk.token_ids), chunk.num_logits) for _, chunk in batch)
        counted = products.checked + sum(kept.rows for kept in products.kept)
        if counted != (rows if self._is_checked else 0):
            raise AssertionError(f"{counted} rows of products were checked or computed in a pass that has {rows}")
        first = first_wanted = 0
        for completion, chunk in batch:
            end, end_wanted = first + len(chunk.token_ids), first_wanted + chunk.num_logits
            in_tee = products.kept_of((first, first + chunk.num_tokens), (first_wanted, end_wanted))
            first, first_wanted = end, end_wanted
            if completion is not None and completion.receipt is not None:
                counts = self._requests[completion.receipt.request].running[completion]
                counts.passes += 1
                counts.rows += chunk.num_tokens
                counts.wanted_rows += chunk.num_logits
                counts.in_tee += in_tee

    def _num_products(self, rows: int, wanted_rows: int) -> int:
        """Rows of products: each goes through the layers' Linears, those that are wanted through lm_head too."""
        return rows * self._num_layer_linears + wanted_rows

    def fail(self, fault: TsqpError) -> None:
        """The session is over by a fault. Of it nothing is told but its class, and where a false result was found."""
        failure: dict[str, Any] = {"error": type(fault).__name__}
        if isinstance(fault, IntegrityError):
            failure.update(layer=fault.layer, operation=fault.operation)
        self._session["failures"].append(failure)
        self._is_dirty = True

    def look(self, *, may_wait: bool) -> None:
        """Between two steps, and before anybody is told of an end: takes the requests that have ended.

        Args:
            may_wait: whether there will be another look soon.

        Raises:
            EvidenceError: the file cannot be written.
        """
        for number, request in list(self._requests.items()):
            for completion in [each for each in request.running if each.finish_reason is not None]:
                request.ended.append(self._of_completion(completion, request, request.running.pop(completion)))
                last = completion
            if not request.running:
                del self._requests[number]
                self._records[number] = canonical(_of_request(request, last))
                self._is_dirty = True
        # One that was written long ago is written at once: a request that ends alone has its record when it is told.
        is_due = time.monotonic() - self._written_s >= self._write_took_s / _SHARE_OF_TIME
        if self._is_dirty and (is_due or not may_wait):
            self._write()

    def _of_completion(self, completion: Completion, request: _Request, counts: _Counts) -> dict[str, Any]:
        products = self._num_products(counts.rows, counts.wanted_rows)
        in_tee = counts.in_tee if self._is_checked else products
        error = completion.error
        return {
            "index": completion.index,
            "answer": request.receipt.hash_tokens(completion.token_ids),
            "answer_tokens": len(completion.token_ids),
            "max_tokens": completion.max_tokens,
            "cached_tokens": completion.num_cached_tokens,
            "cached_from": completion.cached_from,
            "finish_reason": completion.finish_reason,
            "error": None if error is None else type(error).__name__,
            "passes": counts.passes,
            "rows": counts.rows,
            "wanted_rows": counts.wanted_rows,
            "products": products,
            "products_checked": products - in_tee,
            "products_in_tee": in_tee,
            "pads_used": products - in_tee if self._has_pads else 0,
        }

    def _write(self) -> None:
        requests = b",".join(self._records[number] for number in sorted(self._records))
        session = canonical({**self._session, "pads": self._pads()})
        started_s = time.monotonic()
        try:
            replace_file(
                self._path,
                b'{"requests":[%b],"schema":"%b","session":%b}\n' % (requests, SCHEMA.encode(), session),
            )
        except OSError as error:
            raise EvidenceError(self._path, f"cannot be written: {error.strerror}") from error
        self._written_s = time.monotonic()
        self._write_took_s = self._written_s - started_s
        self._is_dirty = False

    def _pads(self) -> dict[str, Any] | None:
        """Of the session as a whole, rates too: no time finer than a pass is told."""
        pads = self._look_at_pads()
        return None if pads is None else {name: pads[name] for name in _OF_PADS}


def _of_request(request: _Request, completion: Completion) -> dict[str, Any]:
    return {
        "request": request.receipt.request,
        "prompt": request.receipt.hash_tokens(completion.prompt_token_ids),
        "prompt_tokens": len(completion.prompt_token_ids),
        "params": request.receipt.params(completion.params, completion.seed),
        "completions": sorted(request.ended, key=lambda record: int(record["index"])),
    }
