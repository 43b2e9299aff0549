"""The arena: memory that both sides map, laid out by a plan, under a header that says so.

Made whole before anyone can see that it is ready; the memory is a transport's.
"""

from __future__ import annotations

import mmap
import sys
import warnings

from tsqp_shm import _native
from tsqp_shm.errors import ArenaError, ArenaMismatch, ArenaNotReady
from tsqp_shm.shm import layout
from tsqp_shm.shm.invitation import put_invitation
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.transport import Memory, Residency


class Arena:
    """One side's mapping under a plan; use `Arena.create` or `Arena.attach`, either of which takes the memory over."""

    def __init__(self, memory: Memory, plan: Plan, epoch: int) -> None:
        self.plan = plan
        self.epoch = epoch
        self._memory: Memory | None = None
        self._name = memory.name
        self._residency = memory.residency
        try:
            # Whoever may open the object may truncate it; then whatever reads the arena next raises ProtocolError.
            self._guard = _native.ArenaGuard(memory.buffer)
        except BaseException:
            memory.close()
            raise
        self._memory = memory

    @classmethod
    def create(cls, memory: Memory, plan: Plan, epoch: int) -> Arena:
        """An arena in memory that nobody else uses; nobody can attach before `publish`.

        Args:
            memory: of the plan's size at least.
            epoch: random number of this arena, not 0.
        """
        return cls(memory, plan, epoch)

    def publish(self, invitation: bytes = b"") -> None:
        """Writes the header, the version word last: an opener sees "not ready" or a whole header.

        Args:
            invitation: what the other side has to know, as `Invitation.pack` gives it.

        Raises:
            ArenaError: the invitation is too long.
        """
        put_invitation(self, invitation)
        digest = memoryview(self.plan.digest).cast("Q")
        for offset_bytes, value in (
            *((layout.HEADER_DIGEST_OFFSET_BYTES + 8 * word, value) for word, value in enumerate(digest)),
            (layout.HEADER_MAGIC_OFFSET_BYTES, layout.MAGIC),
            (layout.HEADER_EPOCH_OFFSET_BYTES, self.epoch),
            (layout.HEADER_TOTAL_BYTES_OFFSET_BYTES, self.plan.total_bytes),
            # SYNC POINT: store_word releases; pairs with the acquire loads of the version in `attach` and in
            # `rendezvous`.
            (layout.HEADER_VERSION_OFFSET_BYTES, layout.VERSION),
        ):
            _native.store_word(self.buffer, offset_bytes, value)

    @classmethod
    def attach(cls, memory: Memory, plan: Plan) -> Arena:
        """Holds the header of published memory against the own plan.

        Raises:
            ArenaNotReady: it is not published.
            ArenaMismatch: it was made for another plan or by another version.
            ProtocolError: it was truncated meanwhile.
        """
        arena = cls(memory, plan, 0)
        try:
            arena.epoch = _read_header(arena)
        except BaseException:
            arena.close()
            raise
        return arena

    @property
    def name(self) -> str:
        return self._name

    @property
    def residency(self) -> Residency:
        return self._residency

    @property
    def buffer(self) -> mmap.mmap:
        """The mapping; whoever keeps a view of it must drop the view before `close`."""
        if self._memory is None:
            raise ArenaError(self.name, "is closed")
        return self._memory.buffer

    def renew_guard(self) -> None:
        """Guards the mapping anew where the program around this package has put another handler of SIGBUS into the
        guard's place; to be called now and then."""
        self._guard.renew()

    def close(self) -> None:
        """Lets go of the memory. Closing twice does nothing."""
        if self._memory is None:
            return
        memory, self._memory = self._memory, None
        self._guard.release()
        memory.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_memory", None) is not None:
            warnings.warn(f"arena {self.name} was not closed", ResourceWarning, stacklevel=1)


def _read_header(arena: Arena) -> int:
    # UNTRUSTED: each word is read once and only compared; the size and the layout are the own plan's.
    # SYNC POINT: load_word acquires; pairs with the release store of the version in `publish`.
    plan, version = arena.plan, _native.load_word(arena.buffer, layout.HEADER_VERSION_OFFSET_BYTES)
    if version == 0:
        raise ArenaNotReady(arena.name, "is not published yet")
    magic = _native.load_word(arena.buffer, layout.HEADER_MAGIC_OFFSET_BYTES)
    epoch = _native.load_word(arena.buffer, layout.HEADER_EPOCH_OFFSET_BYTES)
    total_bytes = _native.load_word(arena.buffer, layout.HEADER_TOTAL_BYTES_OFFSET_BYTES)
    digest = b"".join(
        _native.load_word(arena.buffer, offset_bytes).to_bytes(8, sys.byteorder)
        for offset_bytes in range(layout.HEADER_DIGEST_OFFSET_BYTES, layout.HEADER_BYTES, 8)
    )
    for field, expected, found in (
        ("magic", f"{layout.MAGIC:#x}", f"{magic:#x}"),
        ("layout version", layout.VERSION, version),
        ("total bytes", plan.total_bytes, total_bytes),
        ("plan digest", plan.digest.hex(), digest.hex()),
    ):
        if expected != found:
            raise ArenaMismatch(arena.name, field, expected, found)
    return epoch
