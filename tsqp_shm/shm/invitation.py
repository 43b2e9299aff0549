"""The invitation: what the TEE tells the GPU process in the header page, before the version word publishes it.

The GPU process copies it out once and checks every field of the copy. The TEE reads nothing of it back. In a mode
without a GPU process it invites nobody: the same page then tells those who look from outside what the session is.
"""

from __future__ import annotations

import json
import mmap
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tsqp_shm import _native
from tsqp_shm.config import DOORBELLS, MAX_WAIT_US, Limits, require_choice, require_endpoint, require_range
from tsqp_shm.errors import ArenaError, ArenaMismatch, ConfigError, TsqpError
from tsqp_shm.modes import MODES
from tsqp_shm.shm import layout

_DIGEST = re.compile("|sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Invitation:
    """What the GPU process has to know to take part in a session.

    Attributes:
        endpoint: address of the doorbell's waker, "" where each side knows its own.
        doorbell: "adaptive", "zmq" or "spin"; "" in a mode without a GPU process.
        spin_us, yield_us: thresholds of the wait.
        limits: from which the GPU process derives its own plan.
        geometry: of the TEE's plan, so that a mismatch can be named.
        tee_pid: for display.
        linears_digest: of the Linears as integers ("sha256:" and 64 digits), which the GPU process compares with its
            own; "" in a mode that does not multiply them.
    """

    endpoint: str
    doorbell: str
    spin_us: int
    yield_us: int
    limits: Limits
    geometry: dict[str, Any]
    tee_pid: int
    linears_digest: str = ""

    def __post_init__(self) -> None:
        for field, kind in (("endpoint", str), ("geometry", dict)):
            if not isinstance(getattr(self, field), kind):
                raise ConfigError(field, getattr(self, field), f"a {kind.__name__}")
        if self.endpoint:
            require_endpoint(self.endpoint)
        require_choice("doorbell", self.doorbell, DOORBELLS if MODES[self.limits.mode].has_gpu_process else ("",))
        require_range("spin_us", self.spin_us, 0, MAX_WAIT_US)
        require_range("yield_us", self.yield_us, 0, MAX_WAIT_US)
        require_range("tee_pid", self.tee_pid, 1, 1 << 31)
        if not isinstance(self.linears_digest, str) or not _DIGEST.fullmatch(self.linears_digest):
            raise ConfigError("linears_digest", self.linears_digest, "sha256: and 64 hexadecimal digits")

    def pack(self) -> bytes:
        """The bytes that cross."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, content: bytes) -> Invitation:
        """Reads what `pack` wrote.

        Raises:
            TsqpError: another version of this package wrote it, or something else did.
        """
        try:
            # UNTRUSTED: a broken TEE process must end in one clear line here; every field is checked when it is made.
            values = json.loads(content)
            for part, fields in ((values, cls.__dataclass_fields__), (values["limits"], Limits.__dataclass_fields__)):
                # Before a call would repeat an unknown name as it stands, to whatever terminal shows the error.
                if not set(part) <= set(fields):
                    raise ValueError("it has fields that are not known here")
            return cls(**{**values, "limits": Limits(**values["limits"])})
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise TsqpError(
                f"the invitation of the TEE process cannot be read; do both run the same version of tsqp-shm? ({error})"
            ) from error


class Header(Protocol):
    """Memory whose first page is mapped."""

    @property
    def name(self) -> str: ...
    @property
    def buffer(self) -> mmap.mmap: ...


def put_invitation(header: Header, content: bytes) -> None:
    """Writes the bytes into the header page of memory that is not published yet.

    Raises:
        ArenaError: they are too many.
    """
    _require_room(header.name, content)
    _native.store_word(header.buffer, layout.INVITATION_LENGTH_OFFSET_BYTES, len(content))
    for start in range(0, len(content), 8):
        word = int.from_bytes(content[start : start + 8].ljust(8, b"\0"), sys.byteorder)
        _native.store_word(header.buffer, layout.INVITATION_OFFSET_BYTES + start, word)


def page_with(name: str, content: bytes) -> bytes:
    """Header and control page of an arena that nobody else maps, published, with these bytes in the header's.

    Raises:
        ArenaError: they are too many.
    """
    _require_room(name, content)
    page = bytearray(layout.SUBMISSION_RING_OFFSET_BYTES)
    for offset_bytes, value in (
        (layout.HEADER_MAGIC_OFFSET_BYTES, layout.MAGIC),
        (layout.HEADER_VERSION_OFFSET_BYTES, layout.VERSION),
        (layout.INVITATION_LENGTH_OFFSET_BYTES, len(content)),
    ):
        page[offset_bytes : offset_bytes + 8] = value.to_bytes(8, sys.byteorder)
    page[layout.INVITATION_OFFSET_BYTES : layout.INVITATION_OFFSET_BYTES + len(content)] = content
    return bytes(page)


def _require_room(name: str, content: bytes) -> None:
    if len(content) > layout.MAX_INVITATION_BYTES:
        raise ArenaError(
            name,
            f"the invitation takes {len(content):,} bytes and its page has room for {layout.MAX_INVITATION_BYTES:,}; "
            "a shorter --endpoint takes less",
        )


def take_invitation(header: Header) -> bytes:
    """A private copy of the bytes in a published header page.

    Raises:
        ArenaMismatch: there are more of them than can be.
    """
    # UNTRUSTED: every word is copied once, the length before the others; `Invitation.parse` decides what is believed.
    length = _native.load_word(header.buffer, layout.INVITATION_LENGTH_OFFSET_BYTES)
    _require_length(header.name, length)
    words = (
        _native.load_word(header.buffer, layout.INVITATION_OFFSET_BYTES + start).to_bytes(8, sys.byteorder)
        for start in range(0, length, 8)
    )
    return b"".join(words)[:length]


def invitation_in(name: str, page: bytes) -> bytes:
    """The same of a header page that was copied as a whole, for whoever only looks.

    Raises:
        ArenaMismatch: as `take_invitation`.
    """
    start = layout.INVITATION_LENGTH_OFFSET_BYTES
    length = int.from_bytes(page[start : start + 8], sys.byteorder)
    _require_length(name, length)
    return page[layout.INVITATION_OFFSET_BYTES :][:length]


def _require_length(name: str, length: int) -> None:
    if length > layout.MAX_INVITATION_BYTES:
        raise ArenaMismatch(name, "length of the invitation", f"at most {layout.MAX_INVITATION_BYTES:,}", f"{length:,}")
