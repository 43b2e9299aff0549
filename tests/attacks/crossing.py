"""What crosses in a conversation, as a GPU process sees it that does its work and keeps what it reads.

Attacks are told by how much of a prompt they find. The prompt is every token of the vocabulary once, in an order that
nothing else depends on: then whoever guesses, however he does it, has k or more tokens at their places with probability
at most 1 / k! over that order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from field_sessions import against
from hostile_field import FieldGpu, misbehaviour
from hostile_gpu import HostileGpu, never, play, silent
from models import RandomModel, model_folder
from read_arena import EmbeddingTable, centred

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint, bfloat16_to_float32
from tsqp_shm.roles.thread import RoleThread
from tsqp_shm.shm.local import LocalTransport
from tsqp_shm.shm.protocol import Opcode, Record
from tsqp_shm.shm.slots import slot_array
from tsqp_shm.shm.transport import Hold, Transport

FIELD = 2**31 - 1
VOCABULARY = 257
PROMPT = tuple(np.random.default_rng(16).permutation(VOCABULARY).tolist())
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
# 1 / 10! is 3e-7.
CHANCE = 10

Rows = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]


@cache
def model() -> Path:
    return model_folder(RandomModel("llama"))


@cache
def table() -> EmbeddingTable:
    return EmbeddingTable(model(), Network.of(ModelSpec.from_folder(model())))


class Watching:
    """A part of a GPU process: keeps what it reads to multiply.

    Attributes:
        seen: of each Linear, the rows in their order.
    """

    def __init__(self, model: Path, session: str | Transport, *, has_pulse: bool = True) -> None:
        super().__init__(model, session, has_pulse=has_pulse)  # type: ignore[call-arg]
        self.seen: dict[int, list[np.ndarray]] = defaultdict(list)

    def receive(self) -> Record:
        record: Record = super().receive()  # type: ignore[misc]
        if record.opcode in (Opcode.QKV, Opcode.LINEAR):
            self.seen[record.target] += list(self.input_of(record).copy())
        return record

    def input_of(self, record: Record) -> np.ndarray:
        raise NotImplementedError


class PlainWatcher(Watching, HostileGpu):
    """Of mode `plain`: looks tokens up as it should, so that the first Linear's rows are true. What comes of them is
    false, and the rows of later ones are not to be used."""

    def __init__(self, model: Path, session: str | Transport, *, has_pulse: bool = True) -> None:
        super().__init__(model, session, has_pulse=has_pulse)
        of = Network.of(ModelSpec.from_folder(model)).embedding
        with Checkpoint.open(model) as checkpoint:
            self._embedding = checkpoint.tensor(of.weight, (of.rows, of.size)).data.copy()

    def input_of(self, record: Record) -> np.ndarray:
        x = slot_array(self.arena, self.plan.slots[record.in_slot])[record.first_row : record.first_row + record.rows]
        return bfloat16_to_float32(x) if x.dtype == np.uint16 else x.astype(np.float32)

    def fill(self, record: Record) -> None:
        if record.opcode != Opcode.EMBED:
            return super().fill(record)
        tokens = slot_array(self.arena, self.plan.slot("tokens"))[: record.rows, 0]
        out = slot_array(self.arena, self.plan.slots[record.out_slot])
        rows = self._embedding[tokens]
        out[: record.rows] = rows if out.dtype == np.uint16 else bfloat16_to_float32(rows)
        return None


class FieldWatcher(Watching, FieldGpu):
    """Of the modes whose products are of the field: multiplies as it should."""

    def input_of(self, record: Record) -> np.ndarray:
        return self.m_of(record)


@dataclass(frozen=True)
class Seen:
    """Attributes:
    answer: what the caller was told.
    inputs: of each Linear, the rows that it multiplied: numbers, or words of the field.
    """

    answer: tuple[int, ...]
    inputs: dict[int, np.ndarray]

    def rows(self, linear: int = 0) -> Rows:
        """Words as the numbers that they stand for. Shapes: [T, K]."""
        rows = self.inputs[linear]
        return centred(rows) if rows.dtype == np.uint32 else rows

    def prompt_rows(self, linear: int = 0) -> Rows:
        """The same without those of the answer."""
        return self.rows(linear)[: len(PROMPT)]


def watched(model: Path, mode: str, prompts: Sequence[Sequence[int]], params: SamplingParams, **config: Any) -> Seen:
    """What crosses while a mode answers prompts, all of them at once; the answer is the first one's."""
    if mode == "plain":
        return _watched_in_plain(model, prompts, params, **config)
    with against(model, misbehaviour("none"), play_by=FieldWatcher, mode=mode, **config) as (llm, (gpu,)):
        outputs = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
    return _seen(outputs[0].outputs[0].token_ids, gpu.gpu)


def _watched_in_plain(model: Path, prompts: Sequence[Sequence[int]], params: SamplingParams, **config: Any) -> Seen:
    transport, gpus = LocalTransport(), []

    def serve() -> None:
        gpus.append(PlainWatcher(model, transport))
        play(gpus[0], never, silent)

    def start(session: Hold) -> RoleThread:
        return RoleThread.start("gpu", serve)

    with LLM(model, transport=transport, start_gpu=start, max_model_len=320, timeout_s=20.0, **config) as llm:
        outputs = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
    with closing(gpus[0]):
        return _seen(outputs[0].outputs[0].token_ids, gpus[0])


def _seen(answer: Sequence[int], gpu: Any) -> Seen:
    return Seen(tuple(answer), {linear: np.array(rows) for linear, rows in gpu.seen.items()})


@cache
def conversation(mode: str) -> Seen:
    """What crosses while `PROMPT` is answered."""
    return watched(model(), mode, [PROMPT], PARAMS)


def in_place(found: Sequence[int], prompt: Sequence[int] = PROMPT) -> int:
    """How many tokens of the prompt stand where they should."""
    hits = int(np.sum(np.array(found) == np.array(prompt)))
    print(f"{hits} of {len(prompt)} tokens: {hits / len(prompt):.1%}")
    return hits
