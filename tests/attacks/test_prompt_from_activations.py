"""The prompt, from the rows that the first Linear multiplies: of `plain` and of `verified` all of it.

A token t enters the model as row e_t of the embedding table, which is public. What the first Linear reads of it is

    x = g * e_t / sqrt(mean(e_t^2) + eps)

with g the first norm's weight: a public vector for each t, and no other token has a part in it. In `plain` x crosses
as it is. In `verified` it crosses as m = rint(s x) mod p, and the row's scale s > 0 stays in the TEE; centred, m is s x
but for at most a half in each element, and a direction does not depend on s. With u_t = x_t / |x_t|, computed once for
the whole vocabulary,

    t = argmax_t <m, u_t>

so a row is a token, at the cost of one product of rows and table. No model is trained for it, and the rows of decode
give the answer's tokens in the same way. Of words that are uniform whatever x is, what is left is chance.

Source: Thomas et al., "An Attack to Break Permutation-Based Private Third-Party Inference Schemes for LLMs" (arXiv
    2505.18332) match hidden states against those of the vocabulary, layer by layer; here it is done at the first
    product, where nothing of earlier tokens has to be known.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from field_sessions import against
from hostile_field import FieldGpu, misbehaviour
from hostile_gpu import HostileGpu, never, play, silent
from models import RandomModel, model_folder, random_token_ids
from read_arena import EmbeddingTable, centred, recovered

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint, bfloat16_to_float32
from tsqp_shm.roles.thread import RoleThread
from tsqp_shm.shm.local import LocalTransport
from tsqp_shm.shm.protocol import Opcode, Record
from tsqp_shm.shm.slots import slot_array
from tsqp_shm.shm.transport import Hold

PROMPT = list(random_token_ids(290))
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
FIELD = 2**31 - 1


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


@pytest.fixture(scope="module")
def table(model) -> EmbeddingTable:
    return EmbeddingTable(model, Network.of(ModelSpec.from_folder(model)))


class EmbeddingGpu(HostileGpu):
    """Of mode `plain`: looks tokens up as it should, and keeps what it then reads for the first Linear.

    Attributes:
        rows: of the first Linear's input, in their order.
    """

    def __init__(self, model: Path, transport: LocalTransport) -> None:
        super().__init__(model, transport)
        self.rows: list[np.ndarray] = []
        of = Network.of(ModelSpec.from_folder(model)).embedding
        with Checkpoint.open(model) as checkpoint:
            self._embedding = checkpoint.tensor(of.weight, (of.rows, of.size)).data.copy()

    def fill(self, record: Record) -> None:
        if (record.opcode, record.target) == (Opcode.QKV, 0):
            x = slot_array(self.arena, self.plan.slot("x"))
            self.rows += list(bfloat16_to_float32(x[record.first_row : record.first_row + record.rows]))
        if record.opcode != Opcode.EMBED:
            return super().fill(record)
        tokens = slot_array(self.arena, self.plan.slot("tokens"))[: record.rows, 0]
        slot_array(self.arena, self.plan.slot("hidden"))[: record.rows] = self._embedding[tokens]
        return None


def seen_in_plain(model: Path) -> tuple[np.ndarray, list[int]]:
    """What the GPU process sees of a conversation, and the answer. Shapes: [T, C] f32."""
    transport, gpus = LocalTransport(), []

    def serve() -> None:
        gpus.append(EmbeddingGpu(model, transport))
        play(gpus[0], never, silent)

    def start(session: Hold) -> RoleThread:
        return RoleThread.start("gpu", serve)

    with LLM(model, transport=transport, start_gpu=start, max_model_len=320, timeout_s=20.0) as llm:
        answer = llm.generate([PROMPT], PARAMS)[0].outputs[0].token_ids
    with closing(gpus[0]):
        return np.array(gpus[0].rows), answer


class WatchingGpu(FieldGpu):
    """Of mode `verified`: multiplies as it should, and keeps what it reads for the first Linear.

    Attributes:
        rows: of the first Linear's input, in their order.
    """

    def __init__(self, model: Path, transport: LocalTransport) -> None:
        super().__init__(model, transport)
        self.rows: list[np.ndarray] = []

    def receive(self) -> Record:
        record = super().receive()
        if (record.opcode, record.target) == (Opcode.LINEAR, 0):
            self.rows += list(self.m_of(record).copy())
        return record


def seen_in_verified(model: Path) -> tuple[np.ndarray, list[int]]:
    """The same. Shapes: [T, C] u32."""
    with against(model, misbehaviour("none"), play_by=WatchingGpu) as (llm, (gpu,)):
        answer = llm.generate([PROMPT], PARAMS)[0].outputs[0].token_ids
    return np.array(gpu.gpu.rows), answer


def test_in_plain_the_rows_are_the_tokens(model, table):
    rows, answer = seen_in_plain(model)
    found = recovered([*PROMPT, *answer[:-1]], table.nearest(rows))
    print(f"{found:.1%} of the tokens")
    assert found > 0.99


def test_in_verified_the_rows_are_the_tokens(model, table):
    """All of the prompt, and of the answer all but the last token, which enters no pass."""
    rows, answer = seen_in_verified(model)
    found = recovered([*PROMPT, *answer[:-1]], table.nearest(centred(rows)))
    print(f"{found:.1%} of the tokens")
    assert found == 1


def test_of_uniform_words_chance_is_left(table):
    """So the attack can fail: what it takes from the rows it takes from the activations in them."""
    words = np.random.default_rng(5).integers(0, FIELD, (len(PROMPT), 72), np.uint32)
    hits = np.mean(np.array(table.nearest(centred(words))) == PROMPT)
    print(f"{hits:.1%} of the tokens")
    assert hits < 0.05
