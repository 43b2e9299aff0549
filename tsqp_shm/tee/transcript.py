"""The transcript of a session: every word that was sent to be multiplied and every word that came back.

docs/evidence.md has its form; `scripts/check_transcript.py` reads it and computes all of it again. It holds what
crosses in clear: whoever has it can find prompts and answers in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tsqp_shm.errors import EvidenceError
from tsqp_shm.files import make_file
from tsqp_shm.model.network import Linear, Network
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.receipts import canonical

SCHEMA = "tsqp-shm transcript 1"
BEGIN, PRODUCT, END, KEPT = 1, 2, 3, 4

UInt32 = NDArray[np.uint32]


class Transcript:
    """Is told of passes by the thread that runs the steps, of products by whoever has them computed.

    Raises:
        EvidenceError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        try:
            self._descriptor = make_file(path)
        except OSError as error:
            raise EvidenceError(path, f"cannot be written: {error.strerror}") from error

    def begin(self, network: Network) -> None:
        """The session begins."""
        layer_of = {linear.index: layer.index for layer in network.layers for linear in layer.linears}
        linears = [
            {
                "layer": layer_of.get(linear.index),
                "role": linear.role,
                "inputs": linear.inputs,
                "outputs": linear.outputs,
            }
            for linear in network.linears
        ]
        self._write(canonical({"schema": SCHEMA, "linears": linears}), b"\n")

    def begin_pass(self, parts: Iterable[tuple[Completion | None, Chunk]]) -> None:
        """Rows of a pass follow in the order of its parts.

        Args:
            parts: whose tokens they are; None: of nobody who has asked for a completion.
        """
        words: list[int] = []
        for completion, chunk in parts:
            receipt = None if completion is None else completion.receipt
            index = 0 if completion is None else completion.index
            request = receipt.request if receipt else 0
            if chunk.num_tokens:
                words += [request, index, chunk.position, chunk.num_tokens, chunk.num_logits]
            if chunk.num_surplus:
                words += [0, 0, chunk.position + chunk.num_tokens, chunk.num_surplus, 0]
        self._write(_words(BEGIN, len(words) // 5, *words))

    def add(self, linear: Linear, first_row: int, m: UInt32, y: UInt32) -> None:
        """A product, whether or not it is a true one.

        Shapes: m [rows, inputs], y [rows, outputs] u32; of lm_head the rows are those that are wanted.
        """
        self._write(_words(PRODUCT, linear.index, first_row, len(m)), _bytes(m), _bytes(y))

    def keep(self, linear: Linear, first_row: int, rows: int) -> None:
        """A product that this process computes itself, where others of the pass do not stay here."""
        self._write(_words(KEPT, linear.index, first_row, rows))

    def end_pass(self) -> None:
        """All checks of the pass have held; of one that has no end nothing came out."""
        self._write(_words(END))

    def close(self) -> None:
        """Closing twice does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _write(self, *pieces: bytes | memoryview) -> None:
        # Without a buffer: a forked child would have it too, and write it once more at its end.
        left = [memoryview(piece).cast("B") for piece in pieces]
        try:
            while left and self._descriptor is not None:
                written = os.writev(self._descriptor, left)
                while left and written >= len(left[0]):
                    written -= len(left.pop(0))
                if left:
                    left[0] = left[0][written:]
        except OSError as error:
            raise EvidenceError(self._path, f"cannot be written: {error.strerror}") from error


def _words(*words: int) -> bytes:
    return np.array(words, "<u4").tobytes()


def _bytes(words: UInt32) -> memoryview:
    return np.ascontiguousarray(words, "<u4").data
