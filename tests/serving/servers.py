"""Servers to be asked, as processes of their own, as a user starts them."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "tsqp_shm", "serve"]
UP_S = 60.0


class Server:
    """One that has said where it listens.

    Attributes:
        url: of it; a Unix socket's begins with unix:.
        lines: what it has said on stderr so far.
    """

    def __init__(self, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        words = [*COMMAND, *map(str, arguments)]
        if "--uds" not in words:
            words += ["--port", "0"]
        self.process = subprocess.Popen(
            words, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._listening: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        url = self._listening.get(timeout=UP_S)
        if url is None:
            self.process.wait(UP_S)
        assert url is not None, self.lines
        self.url = url

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if match := re.search(r"listening on (\S+)", line):
                self._listening.put(match[1])
        self._listening.put(None)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def until_ready(self) -> Server:
        end = time.monotonic() + UP_S
        while self.get("/health")[0] != 200:
            assert self.process.poll() is None and time.monotonic() < end, self.lines
            time.sleep(0.05)
        return self

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by lowercase name, and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=UP_S)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, {name.replace("_", "-"): each for name, each in headers.items()})
            response = connection.getresponse()
            return response.status, {name.lower(): each for name, each in response.getheaders()}, response.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        status, _, body = self.ask("GET", path, **headers)
        return status, _json(body)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, _, content = self.ask("POST", path, body, **headers)
        return status, _json(content)

    @contextmanager
    def streaming(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a stream as they come, until [DONE]."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=UP_S)
        try:
            connection.request("POST", path, json.dumps({**body, "stream": True}))
            response = connection.getresponse()
            assert response.status == 200, response.read()
            yield _events(response)
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        _, _, body = self.ask("GET", "/metrics")
        return sum(float(line.rpartition(" ")[2]) for line in body.decode().splitlines() if line.startswith(name))

    def until(self, name: str, value: float) -> None:
        """Until a metric has it."""
        end = time.monotonic() + UP_S
        while self.metric(name) != value:
            assert time.monotonic() < end, (name, self.metric(name))
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(UP_S)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *of_error: object) -> None:
        self.stop()


def demo_server(model: Path, *arguments: object, environment: Mapping[str, str] | None = None) -> Server:
    return Server(model, *arguments, environment=environment).until_ready()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)
    raise AssertionError("the stream ended before its end")
