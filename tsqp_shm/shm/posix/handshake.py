"""What both ends of a connection do first: each proves that it knows the session's secret, and says nothing of it.

    each side    32 random bytes
    each side    the MAC, under the secret, of its role and both sides' bytes

Then come records. The secret lies in the arena, which no other user may open, so whoever has proved it could write
completions into the arena as well. Nothing that was recorded of one connection serves another, and neither side's proof
is the other's.
"""

from __future__ import annotations

import hmac
import secrets

NONCE_BYTES = 32
PROOF_BYTES = 32
_PURPOSE = b"tsqp-shm doorbell 1, "
_OTHER = {"tee": "gpu", "gpu": "tee"}


class Handshake:
    """One side of it, "tee" or "gpu", over one connection.

    Attributes:
        hello: what this side sends at once.
        is_proven: whether the other side has proved that it knows the secret.
        is_refused: whether it has shown that it does not.
        is_echo: whether it has only said again what this side said.
        rest: what came behind the other side's proof.
    """

    def __init__(self, secret: bytes, role: str) -> None:
        self.hello = secrets.token_bytes(NONCE_BYTES)
        self.is_proven = False
        self.is_refused = False
        self.is_echo = False
        self.rest = b""
        self._secret = secret
        self._role = role
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
        return hmac.digest(self._secret, _PURPOSE + role.encode() + nonces["tee"] + nonces["gpu"], "sha256")
