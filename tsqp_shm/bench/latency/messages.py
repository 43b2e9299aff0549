"""The other way to cross: payloads inside ZeroMQ messages, over REQ/REP, raw or packed with msgpack."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import ExitStack
from typing import Any

import numpy as np
import zmq

from tsqp_shm.bench.latency.payload import Words, answer, check_answer

TIMEOUT_S = 20.0


class Messages:
    """One end of a REQ/REP pair and the private buffers that messages are made in.

    Attributes:
        forms: the ways to pack that are possible here: "zmq-raw", and "zmq-msgpack" where msgpack is installed.
    """

    def __init__(self, stack: ExitStack, endpoint: str, is_peer: bool, sizes: list[int]) -> None:
        context = stack.enter_context(zmq.Context())
        self._socket = stack.enter_context(context.socket(zmq.REP if is_peer else zmq.REQ))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        if is_peer:
            self._socket.connect(endpoint)
        else:
            self._socket.bind(endpoint)
        self.forms = ["zmq-raw"]
        if importlib.util.find_spec("msgpack") is not None:
            self.forms.append("zmq-msgpack")
            self._msgpack: Any = importlib.import_module("msgpack")
        self._buffers: dict[int, Words] = {size: np.zeros(size // 8, np.uint64) for size in sizes}

    def trip(self, form: str, size: int, value: int) -> None:
        buffer = self._buffers[size]
        buffer.fill(value)
        self._send(form, buffer)
        check_answer(self._receive(form), value)

    def serve_one(self, form: str, size: int) -> None:
        buffer = self._buffers[size]
        answer(self._receive(form), out=buffer)
        self._send(form, buffer)

    def _send(self, form: str, words: Words) -> None:
        if form == "zmq-raw":
            # Not copied: the buffer is written again only after the answer, so after it was sent.
            self._socket.send(words.data, 0, copy=False)
            return
        floats = words.view(np.float32)
        packed = {"shape": list(floats.shape), "dtype": str(floats.dtype), "data": floats.tobytes()}
        self._socket.send(self._msgpack.packb(packed))

    def _receive(self, form: str) -> Words:
        if form == "zmq-raw":
            return np.frombuffer(self._socket.recv(copy=False).buffer, np.uint64)
        packed = self._msgpack.unpackb(self._socket.recv())
        floats = np.frombuffer(packed["data"], packed["dtype"]).reshape(packed["shape"])
        words: Words = floats.view(np.uint64)
        return words
