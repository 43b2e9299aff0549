"""What both ends of a connection do first: each proves that it knows the session's secret, and says nothing of it.

    each side    32 random bytes
    each side    the MAC, under the secret, of its role, both sides' bytes and both ends of the connection

Then come records. The secret lies in the arena, which no other user may open, so whoever has proved it could write
completions into the arena as well. Nothing that was recorded of one connection serves another, neither side's proof
is the other's, and what is said over one connection proves nothing over another that is held at the same time: whoever
relays between the two sides has two.
"""

from __future__ import annotations

import hmac
import secrets
import socket

NONCE_BYTES = 32
PROOF_BYTES = 32
_PURPOSE = b"tsqp-shm doorbell 2, "
_OTHER = {"tee": "gpu", "gpu": "tee"}


def tcp_ends(fd: int, role: str) -> bytes:
    """Both ends of a TCP connection as the kernel has them, the TEE's first.

    Args:
        fd: of the connection; it stays its owner's.

    Raises:
        OSError: the connection has ended.
    """
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=fd)
    try:
        ends = {role: connection.getsockname(), _OTHER[role]: connection.getpeername()}
    finally:
        connection.detach()
    return repr((ends["tee"], ends["gpu"])).encode()


class Handshake:
    """One side of it, "tee" or "gpu", over one connection.

    Args:
        ends: `tcp_ends` of the connection; nothing where it has a path, at which file modes admit no other user.

    Attributes:
        hello: what this side sends at once.
        is_proven: whether the other side has proved that it knows the secret.
        is_refused: whether it has shown that it does not.
        is_echo: whether it has only said again what this side said.
        rest: what came behind the other side's proof.
    """

    def __init__(self, secret: bytes, role: str, ends: bytes = b"") -> None:
        self.hello = secrets.token_bytes(NONCE_BYTES)
        self.is_proven = False
        self.is_refused = False
        self.is_echo = False
        self.rest = b""
        self._secret = secret
        self._role = role
        self._ends = ends
        self._heard = b""

    def push(self, chunk: bytes) -> bytes:
        """Takes bytes of the other side in. Returns what is to be sent."""
        has_answered = len(self._heard) >= NONCE_BYTES
        # UNTRUSTED: until it is proven no more is kept than what a proof takes; any more is of one who waits for none.
        self._heard += chunk
        self.is_echo = self._heard.startswith(self.hello)
        if self.is_echo:
            self.is_refused = True
        elif len(self._heard) >= NONCE_BYTES + PROOF_BYTES:
            proof, self.rest = self._heard[NONCE_BYTES:][:PROOF_BYTES], self._heard[NONCE_BYTES + PROOF_BYTES :]
            self.is_proven = hmac.compare_digest(proof, self._proof(_OTHER[self._role]))
            self.is_refused = not self.is_proven
        if self.is_refused or has_answered or len(self._heard) < NONCE_BYTES:
            return b""
        return self._proof(self._role)

    def _proof(self, role: str) -> bytes:
        nonces = {self._role: self.hello, _OTHER[self._role]: self._heard[:NONCE_BYTES]}
        said = _PURPOSE + role.encode() + nonces["tee"] + nonces["gpu"] + self._ends
        return hmac.digest(self._secret, said, "sha256")
