"""What the HTTP side of a server is started with, as a value."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from tsqp_shm.config import require_choice, require_range
from tsqp_shm.errors import ConfigError

_KEY = re.compile(r"[\x21-\x7e]+")
ON_INTEGRITY = ("exit", "lock")


@dataclass(frozen=True)
class ServeSettings:
    """Units: times in seconds, sizes in bytes.

    Attributes:
        uds: a Unix socket in the place of host and port.
        api_keys: who names one of them is served; none: everybody who can connect is.
        served_model_name: what clients call the model; None: the folder's name.
        ssl_certfile, ssl_keyfile: TLS ends in this process.
        allowed_origins: of pages of other origins that may call from a browser.
        max_queue: completions that may wait while others run; more are refused with 429.
        drain_s: how long running requests have to end after SIGTERM.
        on_integrity: what follows a false result: the process ends with exit code 4, or stays and answers nothing but
            that.
        max_body_bytes: of one request.
        max_held_bytes: of all requests' bodies together.
        max_connections: open at once.
        receive_s: how long a client may take to send a request, and to take a piece of an answer.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = ()
    served_model_name: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    allowed_origins: tuple[str, ...] = ()
    max_queue: int = 256
    drain_s: float = 30.0
    on_integrity: str = "exit"
    max_body_bytes: int = 8 << 20
    max_held_bytes: int = 256 << 20
    max_connections: int = 1024
    receive_s: float = 20.0

    def __post_init__(self) -> None:
        require_range("port", self.port, 0, 65535)
        require_range("max_queue", self.max_queue, 0, 1 << 20)
        require_range("max_connections", self.max_connections, 1, 1 << 16)
        require_range("max_body_bytes", self.max_body_bytes, 1 << 10, 1 << 30)
        require_range("max_held_bytes", self.max_held_bytes, self.max_body_bytes, 1 << 36)
        require_choice("on_integrity", self.on_integrity, ON_INTEGRITY)
        for name in ("drain_s", "receive_s"):
            if not 0 < getattr(self, name) <= 86400:
                raise ConfigError(name.removesuffix("_s"), getattr(self, name), "seconds, more than 0, at most 86400")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_keyfile", self.ssl_keyfile, "both --ssl-certfile and --ssl-keyfile, or neither")
        if not all(_KEY.fullmatch(key) for key in self.api_keys):
            # No header could carry it, so it would lock everybody out.
            raise ConfigError("api_key", "one that cannot be sent", "printable ASCII without spaces, one at least")
        if "\n" in (self.uds or ""):
            raise ConfigError("uds", self.uds, "a path on one line")

    @property
    def key_digests(self) -> tuple[bytes, ...]:
        """Of one length, whatever the keys'."""
        return tuple(digest_of(key) for key in self.api_keys)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
