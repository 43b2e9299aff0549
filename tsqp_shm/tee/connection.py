"""What the steps of a session run on: an engine over slots, and whoever is at their other end, if anybody is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tsqp_shm.shm.plan import Plan
from tsqp_shm.tee.engine import Engine
from tsqp_shm.tee.progress import ProgressWriter

# What an error says of a session that somebody has ended on purpose.
CLOSED = "this LLM is closed"


class Connection(Protocol):
    """`gpu_connection.GpuConnection` leads to a GPU process, `alone.Alone` to nobody.

    Attributes:
        plan: of the slots.
        engine: over them.
        progress: what is to be seen from outside.
        num_lent: of slots, the runs of rows that the other end has.
        pads: what has become of the session's pads so far; None in a mode without.
    """

    @property
    def plan(self) -> Plan: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def progress(self) -> ProgressWriter: ...
    @property
    def num_lent(self) -> int: ...
    @property
    def pads(self) -> dict[str, Any] | None: ...

    def begin(self) -> None:
        """Something is about to be computed."""

    def rest(self) -> None:
        """Nothing is to be computed for the moment."""

    def settle(self) -> None:
        """Returns when nothing is in flight any more."""

    def describe(self) -> dict[str, Any]:
        """The bring-up report as plain values: the mode, and what there is in it."""

    def facts(self, *, asks: bool) -> dict[str, Any]:
        """What `describe` says, and what has crossed so far.

        Args:
            asks: whether the other end may be asked.
        """

    def mark_broken(self) -> None:
        """The session is over by an error; the other end is not asked any more."""

    def abandon(self) -> None:
        """Closes where the other end is dead."""

    def close(self) -> None:
        """Ends the other end, and lets go of the slots. Closing twice does nothing."""


# Opens a connection. Called with what it is to call now and then while something is waited for or computed, and with
# how long it may take until the other end is ready.
Connect = Callable[[Callable[[], None], float], Connection]
