"""What a session writes down of its requests, for whoever steps it: evidence, a transcript, both or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tsqp_shm.config import Limits
from tsqp_shm.errors import TsqpError
from tsqp_shm.model.network import Network
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.evidence import Evidence, LookAtPads
from tsqp_shm.tee.receipts import Receipt
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.verification import Products


class Witness:
    """Every method raises EvidenceError where a file cannot be written.

    Attributes:
        transcript: for whoever has products computed elsewhere.
    """

    def __init__(self, evidence: Evidence | None = None, transcript: Transcript | None = None) -> None:
        self.transcript = transcript
        self._evidence = evidence

    @property
    def has_evidence(self) -> bool:
        return self._evidence is not None

    def evidence_of(self, numbers: Iterable[int]) -> bytes | None:
        """As `Evidence.content`; None too where nobody writes evidence."""
        return None if self._evidence is None else self._evidence.content(numbers)

    def receipt(self) -> Receipt | None:
        """Of the next request; None: nobody writes evidence. Any thread may ask."""
        return None if self._evidence is None else self._evidence.receipts.next()

    def begin(self, network: Network, limits: Limits, weights: dict[str, Any], pads: LookAtPads) -> None:
        """The session begins; the arguments are those of `Evidence.begin`."""
        if self._evidence is not None:
            self._evidence.begin(network, limits, weights, pads)
        if self.transcript is not None:
            self.transcript.begin(network)

    def add(self, completion: Completion) -> None:
        """One is to be run."""
        if self._evidence is not None:
            self._evidence.add(completion)

    def begin_pass(self, batch: Sequence[tuple[Completion | None, Chunk]]) -> None:
        if self.transcript is not None:
            self.transcript.begin_pass(batch)

    def end_pass(self, batch: Sequence[tuple[Completion | None, Chunk]], products: Products) -> None:
        """All checks of the pass have held. To be called before a completion takes anything of it.

        Args:
            products: what has become of them.
        """
        if self.transcript is not None:
            self.transcript.end_pass()
        if self._evidence is not None:
            self._evidence.count(batch, products)

    def fail(self, fault: TsqpError) -> None:
        """The session is over by a fault."""
        if self._evidence is not None:
            self._evidence.fail(fault)

    def look(self, *, may_wait: bool) -> None:
        """Between two steps, before whoever waits for a completion is told that it has ended; see `Evidence.look`."""
        if self._evidence is not None:
            self._evidence.look(may_wait=may_wait)

    def close(self) -> None:
        """Closing twice does nothing."""
        if self.transcript is not None:
            self.transcript.close()
