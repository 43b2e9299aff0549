"""The load: so many clients, each with one request at a time, in one thread that takes little of the servers' cores."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tsqp_shm.bench.serve.asked import Asked, Request, read_answer

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Loaded:
    """Attributes:
    seconds: from the first request to the end of the last.
    cpu_s: processor time of this process meanwhile, which is the generator's.
    answers: one for each request, in their order.
    """

    seconds: float
    cpu_s: float
    answers: tuple[Asked, ...]


def ask(
    port: int, requests: Sequence[Request], clients: int, body: Callable[[Request], dict[str, Any]], timeout_s: float
) -> Loaded:
    """Asks a server on this machine. What fails is an answer too, and the next request is sent.

    Args:
        clients: so many requests are under way at once, as long as there are so many.
        body: of a request, as the server knows its fields.
        timeout_s: longest that all of it may take; what is not there then has failed.
    """
    # Made before, as making it is no part of what a server does.
    asked = [_spelled(port, body(request)) for request in requests]
    return asyncio.run(_ask(port, asked, clients, timeout_s))


class _Connection(asyncio.Protocol):
    """Notes when which bytes came, until the server closes."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.is_over = asyncio.Event()

    def itself(self) -> _Connection:
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_over.set()


async def _ask(port: int, asked: Sequence[bytes], clients: int, timeout_s: float) -> Loaded:
    connections: list[tuple[float, _Connection | str]] = [(0.0, "not asked in time")] * len(asked)
    waiting, loop = deque(enumerate(asked)), asyncio.get_running_loop()

    async def client() -> None:
        while waiting:
            number, request = waiting.popleft()
            began_s = time.perf_counter()
            connection = _Connection(request)
            connections[number] = began_s, connection
            try:
                transport, _ = await loop.create_connection(connection.itself, HOST, port)
            except OSError as error:
                connections[number] = began_s, f"no connection: {error.strerror or error}"
                continue
            try:
                await connection.is_over.wait()
            finally:
                transport.abort()

    began_s, cpu_before_s = time.perf_counter(), time.process_time()
    tasks = [asyncio.ensure_future(client()) for _ in range(clients)]
    _, late = await asyncio.wait(tasks, timeout=timeout_s)
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_before_s
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    answers = [
        Asked(made) if isinstance(made, str) else read_answer(began_s, made.pieces) for began_s, made in connections
    ]
    return Loaded(seconds, cpu_s, tuple(answers))


def _spelled(port: int, body: dict[str, Any]) -> bytes:
    """A request whose answer ends with the connection, so that nothing has to be read to see its end."""
    content = json.dumps(body).encode()
    head = [
        "POST /v1/completions HTTP/1.1",
        f"Host: {HOST}:{port}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + content
