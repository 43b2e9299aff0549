"""Mode `blinded`: what `verified` does, on rows that one-time pads make uniform before they cross."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tsqp_shm.config import EngineConfig, Limits
from tsqp_shm.hardening import harden
from tsqp_shm.model.digest import ModelDigest
from tsqp_shm.model.network import Network
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.shm.slots import Slots
from tsqp_shm.tee.engine import Engine
from tsqp_shm.tee.linears import CheckedLinears
from tsqp_shm.tee.linears.blinded import BlindedLinears
from tsqp_shm.tee.linears.field import FieldLinears
from tsqp_shm.tee.linears.local import LocalLinears
from tsqp_shm.tee.locking import lock_private
from tsqp_shm.tee.ops import Operations
from tsqp_shm.tee.pads import Pads
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.submission import SubmissionQueue
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.verified import Verified


class Blinded(Verified):
    """`Verified`, with the weights: pads are made of them, and rows that have none are computed here.

    Args:
        config, limits: of the session; how many pads there are, and what is done where there are none.

    Raises:
        As `Verified`.
    """

    is_blinded = True

    def __init__(
        self,
        network: Network,
        checkpoint: Checkpoint,
        config: EngineConfig,
        limits: Limits,
        digest: ModelDigest | None = None,
        transcript: Transcript | None = None,
    ) -> None:
        # Long before there is a key: what has opened this process's memory by then keeps it.
        harden()
        super().__init__(network, checkpoint, digest, transcript)
        self._config, self._limits = config, limits
        self._begun: Pads | None = None
        # What of its private memory is locked, where that is asked for.
        self._locks: dict[str, Any] | None = None

    @property
    def _pads(self) -> Pads:
        if self._begun is None:
            raise AssertionError("a session of mode blinded was connected before it had begun")
        return self._begun

    def begin(self, session: str, stack: ExitStack) -> None:
        """The session begins: draws its seed, and has pads made from here on, until the stack ends it.

        Args:
            session: its name.

        Raises:
            As `Pads`.
        """
        self._begun = Pads(session, self.linears_digest, self.weights, self._config, self._limits)
        stack.callback(self._begun.close)

    def wait_until_ready(self, report: Callable[[str], None], look: Callable[[], None]) -> None:
        self._pads.wait_until_ready(report, look)

    def meet(self, device: str) -> None:
        self._pads.meet(device)

    def work(self, is_busy: bool) -> None:
        self._pads.work(is_busy)

    def make_engine(self, slots: Slots, queue: SubmissionQueue, statistics: Statistics) -> Engine:
        engine = super().make_engine(slots, queue, statistics)
        if self._config.lock_memory:
            self._locks = lock_private(slots, self._caches, stock=self._pads.is_locked)
        return engine

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pads": {**self._pads.describe(), "locks": self._locks}}

    def pads(self) -> dict[str, Any]:
        return self._pads.facts()

    def _linears(self, of_gpu: FieldLinears, queue: SubmissionQueue, ops: Operations) -> CheckedLinears:
        local = LocalLinears(self.weights, ops, queue.look)
        return BlindedLinears(of_gpu, local, self._pads, queue.look, self._transcript)
