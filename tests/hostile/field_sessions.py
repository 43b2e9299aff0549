"""Sessions of modes with checked products whose GPU process plays on a thread of this one: they begin and end at once,
and a test sees both sides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from callers import told_of
from hostile_field import FieldGpu, Misbehaviour, Moment, play
from safetensors.torch import load_file, save_file

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import PeerDied, TsqpError
from tsqp_shm.modes import MODES
from tsqp_shm.shm.local import LocalTransport
from tsqp_shm.shm.progress import Progress
from tsqp_shm.shm.transport import Hold
from tsqp_shm.tee.updates import Update

LIMITS = {"max_model_len": 320, "max_num_seqs": 3, "max_batch_tokens": 320, "block_rows": 128}
# To the model of `with_one_token_that_overflows`, this one is no number.
OVERFLOWING = 7


class _Over:
    """Ends the waits of a GPU process whose session has ended."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.heartbeat_age_s = 0.0

    def check(self) -> None:
        if self.event.is_set():
            raise PeerDied("tee", "the session has ended")


class HostileThread:
    """A hold on a GPU process that plays on a thread, and that dies when the test says so.

    Attributes:
        gpu: None until it has joined.
        dies: called where its life is looked at.
        left: what the TEE had last said of itself; None until the end.
    """

    def __init__(
        self,
        make: Callable[[], FieldGpu],
        script: tuple[Moment, Misbehaviour],
        dies: Callable[[], bool],
    ) -> None:
        self.gpu: FieldGpu | None = None
        self.left: Progress | None = None
        self.dies = dies
        self._over = _Over()
        self._thread = threading.Thread(target=self._play, args=(make, script), daemon=True)
        self._thread.start()

    def _play(self, make: Callable[[], FieldGpu], script: tuple[Moment, Misbehaviour]) -> None:
        self.gpu = make()
        self.gpu.watch = self._over  # type: ignore[assignment]
        play(self.gpu, *script)

    def death(self) -> TsqpError | None:
        return PeerDied("gpu", "signal SIGKILL") if self.dies() else None

    def came_up(self) -> None:
        pass

    def stop(self) -> None:
        self._over.event.set()
        self._thread.join()
        if self.gpu is not None and self.left is None:
            self.left = self.gpu.progress()
            self.gpu.close()

    kill = stop


def never_dies() -> bool:
    return False


@contextmanager
def against(
    model: Path,
    *scripts: tuple[Moment, Misbehaviour],
    dies: Callable[[], bool] = never_dies,
    play_by: type[FieldGpu] = FieldGpu,
    mode: str = "verified",
    **config: Any,
) -> Iterator[tuple[LLM, list[HostileThread]]]:
    """An LLM, and its GPU processes: the first plays the first script, and so on.

    Args:
        dies: of the first one.
        play_by: who plays them.
    """
    transport = LocalTransport()
    started: list[HostileThread] = []

    def start(session: Hold) -> HostileThread:
        number = len(started)
        started.append(
            HostileThread(partial(play_by, model, transport), scripts[number], never_dies if number else dies)
        )
        return started[-1]

    # In `blinded` everything crosses, so that a false product has the place that it has in `verified`.
    pads = {"pads_out": "wait", "prefill": "gpu"} if MODES[mode].has_pads else {}
    settings = {"timeout_s": 20.0, **LIMITS, **pads, **config}
    with LLM(model, mode=mode, transport=transport, start_gpu=start, **settings) as llm:
        yield llm, started


def ask(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[Update]]:
    """What each caller is told, all together in one batch, until its last update."""
    queues: list[SimpleQueue[Update]] = [SimpleQueue() for _ in prompts]
    completions = [llm.start(prompt, replace(params)) for prompt in prompts]
    by_completion = dict(zip(completions, queues, strict=True))
    llm.runtime.add(completions, lambda update: by_completion[update.completion].put(update))
    return [told_of(llm, completion, queue) for completion, queue in by_completion.items()]


def tokens_of(updates: list[Update]) -> list[int]:
    return [token for update in updates for token in update.token_ids]


def with_one_token_that_overflows(folder: Path) -> Path:
    """Makes of a model one to which a token is no number, while every weight is: nothing but this token has a part in
    the first dimension, and a gate of the first layer takes that beyond float32."""
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[OVERFLOWING] = 0
    embedding[OVERFLOWING, 0] = 1
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    for part in ("gate", "up"):
        weights[f"model.layers.0.mlp.{part}_proj.weight"][0] = 0
        weights[f"model.layers.0.mlp.{part}_proj.weight"][0, 0] = 3e19
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
