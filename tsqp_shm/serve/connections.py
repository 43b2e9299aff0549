"""Connections as a server can afford them: so many, and none that takes for ever to say what it wants."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tsqp_shm.errors import ConfigError
from tsqp_shm.serve.settings import ServeSettings

MAX_HEADER_BYTES = 1 << 15


def guarded(settings: ServeSettings) -> type[asyncio.Protocol]:
    """HTTP/1.1 within these settings.

    uvicorn ends connections that idle between two requests, and none that sends a request's head byte by byte.
    """

    class Guarded(H11Protocol):
        _head_deadline: asyncio.TimerHandle | None = None
        _write_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.abort()
                return
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget_head()
            elif self._head_deadline is None:
                self._expect_head()

        def pause_writing(self) -> None:
            """What is to be sent piles up, as the client takes none of it: it has so long to begin."""
            super().pause_writing()
            self._write_deadline = self.loop.call_later(settings.receive_s, self._abort)

        def resume_writing(self) -> None:
            self._forget_write()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_head()
            self._forget_write()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # What comes of the next request's head comes within the time of an idle connection, or is timed again.
            self._forget_head()

        def _expect_head(self) -> None:
            self._head_deadline = self.loop.call_later(settings.receive_s, self._end_slow)

        def _forget_head(self) -> None:
            if self._head_deadline is not None:
                self._head_deadline.cancel()
                self._head_deadline = None

        def _forget_write(self) -> None:
            if self._write_deadline is not None:
                self._write_deadline.cancel()
                self._write_deadline = None

        def _end_slow(self) -> None:
            self._head_deadline = None
            self._abort()

        def _abort(self) -> None:
            # To close would be to wait until the client takes what is to be sent.
            if self.transport is not None:
                self.transport.abort()

    return Guarded


def listening(settings: ServeSettings) -> socket.socket:
    """A socket that listens where the settings say; of a Unix socket the file is this user's alone.

    Raises:
        ConfigError: it cannot.
    """
    if settings.uds is not None:
        return _listening_at(Path(settings.uds))
    try:
        infos = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        expected = f"an address of this machine that is free: {error.strerror}"
        raise ConfigError("host", f"{settings.host}:{settings.port}", expected) from error
    return listener


def _listening_at(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode) and not _answers(path):
                # Of a server that was killed.
                path.unlink()
        # The mode that the file is made with: there is no moment at which others could connect.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        listener.close()
        raise ConfigError("uds", str(path), f"a path that is free: {error.strerror or error}") from error
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
