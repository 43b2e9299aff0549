"""Sessions in this process: the GPU role on a thread of it, over `LocalTransport` or another.

Nothing is computed by other code than in two processes; a test may look at both sides, and put a device of its own in
the GPU role's hands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tsqp_shm import LLM
from tsqp_shm.config import EngineConfig
from tsqp_shm.gpu import worker
from tsqp_shm.gpu.device import Device
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.roles.thread import RoleThread
from tsqp_shm.shm.arena import Arena
from tsqp_shm.shm.local import LocalTransport
from tsqp_shm.shm.transport import Hold, Transport
from tsqp_shm.tee.runtime import Runtime

GPU_CONFIG = EngineConfig(device="cpu", timeout_s=20.0)


class LocalGpus:
    """GPU roles on threads, each started for the session over this object's transport.

    Attributes:
        threads: every one that was started, the oldest first.
    """

    def __init__(self, model: Path, transport: Transport | None = None) -> None:
        self.transport = transport or LocalTransport()
        self.threads: list[RoleThread] = []
        self._model = model

    def start(self, session: Hold) -> RoleThread:
        play = partial(worker.serve, self._model, self.transport, GPU_CONFIG, len, int)
        self.threads.append(RoleThread.start("gpu", play))
        return self.threads[-1]

    def llm(self, **config: Any) -> LLM:
        return LLM(self._model, transport=self.transport, start_gpu=self.start, timeout_s=30.0, **config)

    @contextlib.contextmanager
    def runtime(self, **config: Any) -> Iterator[Runtime]:
        """A session whose steps the test runs itself, by `step`."""
        with Checkpoint.open(self._model) as checkpoint:
            settings = EngineConfig(timeout_s=30.0, **config)
            runtime = Runtime(ModelSpec.from_folder(self._model), checkpoint, settings, self.transport, self.start)
        with contextlib.closing(runtime):
            runtime.open()
            yield runtime


def with_device(make: Callable[[Arena], Device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the GPU roles of this process compute on a device that the test makes."""
    monkeypatch.setattr(worker, "open_device", lambda name, pinning, arena: make(arena))
