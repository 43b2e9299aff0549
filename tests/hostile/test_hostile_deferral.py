"""Nothing of a pass comes out before its checks: not where the one who cheats dies, nor where the pass would have been
the last."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import run
from field_sessions import LIMITS, HostileThread, against, ask, tokens_of
from hostile_field import misbehaviour
from hostile_gpu import FAULT_STEP, HostileGpu
from models import RandomModel, random_token_ids, with_bytes_as_tokens

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.errors import IntegrityError
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.shm.protocol import Record
from tsqp_shm.shm.transport import Hold
from tsqp_shm.trace.recorder import Recording

PROMPTS = [list(random_token_ids(length, vocab_size=256, seed=length)) for length in (270, 9)]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)
NEVER = misbehaviour("none")
SESSION_NAMES = (f"deferral{os.getpid()}-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its tokens are bytes, each a piece of text."""
    fields = {"vocab_size": 256, "eos_token_id": 0}
    return with_bytes_as_tokens(RandomModel("llama", fields).write(tmp_path_factory.mktemp("deferral") / "model"))


@cache
def honest_tokens(model: Path, prompts: tuple[int, ...] = (0, 1)) -> list[list[int]]:
    with LLM(model, mode="tee-only", **LIMITS) as llm:
        return [tokens_of(mine) for mine in ask(llm, [PROMPTS[index] for index in prompts], PARAMS)]


# One that is gone before its last product is looked at.


@dataclass
class LastWill:
    """A product that is given in the very look by which its maker is found dead, so that nobody has read it yet.

    Args:
        name: what it makes of the product, and when.
    """

    name: str
    asked: threading.Event = field(default_factory=threading.Event)
    looked: threading.Event = field(default_factory=threading.Event)
    given: threading.Event = field(default_factory=threading.Event)

    @property
    def script(self):
        moment, misbehave = misbehaviour(self.name)

        def leave(gpu: HostileGpu, record: Record) -> None:
            self.asked.set()
            self.looked.wait(20)
            misbehave(gpu, record)
            self.given.set()

        return moment, leave

    def dies(self) -> bool:
        if not self.asked.is_set():
            return False
        self.looked.set()
        self.given.wait(20)
        return True


@pytest.mark.parametrize(
    ("name", "doorbell"),
    [
        ("plus-one:down", "adaptive"),
        ("word-p:lm_head", "zmq"),
        pytest.param("plus-one:lm_head", "adaptive", marks=pytest.mark.long),
        pytest.param("word-p:down", "zmq", marks=pytest.mark.long),
        pytest.param("plus-one:o", "spin", marks=pytest.mark.long),
    ],
)
def test_the_last_product_of_one_that_died_is_checked_and_no_other_is_let_in(model, name, doorbell):
    will = LastWill(name)
    with against(model, will.script, NEVER, dies=will.dies, restart_gpu=1, doorbell=doorbell) as (llm, started):
        told = ask(llm, PROMPTS, PARAMS)
        assert will.given.is_set()
        assert [type(mine[-1].error) for mine in told] == [IntegrityError] * 2
        assert [tokens_of(mine) for mine in told] == [tokens[: FAULT_STEP - 1] for tokens in honest_tokens(model)]
        assert len(started) == 1
        assert llm.statistics.gpu_restarts == 0


def silence(gpu: HostileGpu, record: Record) -> None:
    gpu.until_the_tee_ends()


def answer_twice(gpu: HostileGpu, record: Record) -> None:
    gpu.answer(record)


@pytest.mark.parametrize("then", [pytest.param(silence, marks=pytest.mark.long), answer_twice])
def test_whatever_else_ends_the_pass_the_false_product_is_what_is_told(model, then):
    """Silence would be a timeout, and an answer that was not due a broken protocol."""
    moment, misbehave = misbehaviour("plus-one:o")

    def misbehave_twice(gpu: HostileGpu, record: Record) -> None:
        misbehave(gpu, record)
        then(gpu, record)

    with against(model, (moment, misbehave_twice), timeout_s=2.0) as (llm, _):
        told = ask(llm, PROMPTS, PARAMS)
        assert [type(mine[-1].error) for mine in told] == [IntegrityError] * 2


def test_logits_that_were_asked_for_do_not_come_out_either(model):
    with against(model, misbehaviour("plus-one:lm_head:1")) as (llm, _), pytest.raises(IntegrityError):
        llm.logits(PROMPTS[1])


def rows_of_passes(gpu: HostileThread) -> list[int]:
    """How many tokens went through the model in each of its passes: each is a row of the first Linear."""
    rows: dict[int, int] = {}
    for each in gpu.gpu.asked:
        if each.rows and Record.unpack(bytes.fromhex(each.record)).target == 0:
            rows[each.step] = rows.get(each.step, 0) + each.rows
    return list(rows.values())


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long, id="prompts"), pytest.param(4, id="decode")])
def test_one_that_dies_honestly_is_replaced_and_only_its_last_pass_is_computed_again(model, step):
    """The caches of keys and values are the TEE's own: nothing of the prompt goes through the model a second time."""
    with against(model, NEVER) as (llm, (whole,)):
        assert [tokens_of(mine) for mine in ask(llm, PROMPTS, PARAMS)] == honest_tokens(model)
    will = LastWill(f"true:o:{step}")
    with against(model, will.script, NEVER, dies=will.dies, restart_gpu=1) as (llm, started):
        assert [tokens_of(mine) for mine in ask(llm, PROMPTS, PARAMS)] == honest_tokens(model)
        assert llm.statistics.gpu_restarts == 1
    first, second = (rows_of_passes(gpu) for gpu in started)
    assert first[: step - 1] + second == rows_of_passes(whole)


@pytest.mark.parametrize(
    "doorbell", ["zmq", *(pytest.param(doorbell, marks=pytest.mark.long) for doorbell in ("adaptive", "spin"))]
)
def test_a_process_that_cheats_and_kills_itself_is_not_replaced(model, field_server, forked, doorbell):
    names = iter(["plus-one-and-die:o", "none"])

    def start_gpu(session: Hold) -> None:
        field_server.start(str(model), session.name, next(names))

    def play() -> None:
        settings = {"start_gpu": start_gpu, "session": next(SESSION_NAMES), "doorbell": doorbell, "restart_gpu": 1}
        with LLM(model, mode="verified", timeout_s=20.0, **settings, **LIMITS) as llm:
            told = ask(llm, PROMPTS, PARAMS)
            assert [type(mine[-1].error) for mine in told] == [IntegrityError] * 2
            assert llm.statistics.gpu_restarts == 0

    forked(play).join()


# One that cheats where the answer would end.

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The pass in which each of these ends the answer.
LAST = 4


class Answer(NamedTuple):
    """What the model says to a prompt in letters, of which the last has not been there before."""

    prompt: str
    text: str


@pytest.fixture(scope="module")
def answer(model) -> Answer:
    with LLM(model, mode="tee-only", **LIMITS) as llm:
        params = replace(PARAMS, max_tokens=LAST, allowed_token_ids=llm.tokenizer.encode(LETTERS))
        outputs = llm.generate([f"Why {number}?" for number in range(20)], params, use_tqdm=False)
        said = [Answer(output.prompt, output.outputs[0].text) for output in outputs]
    return next(answer for answer in said if answer.text[-1] not in answer.text[:-1])


def ending(llm: LLM, end: str, answer: Answer) -> SamplingParams:
    allowed = {"allowed_token_ids": llm.tokenizer.encode(LETTERS)}
    (last,) = llm.tokenizer.encode(answer.text[-1])
    params = replace(PARAMS, max_tokens=LAST + 4, **allowed)
    return {
        "max_tokens": replace(params, max_tokens=LAST),
        "stop string": replace(params, stop=[answer.text[-1]]),
        "stop token": replace(params, stop_token_ids=[last]),
        "eos": replace(params, ignore_eos=False),
    }[end]


@pytest.mark.parametrize(
    "end", ["max_tokens", "stop string", *(pytest.param(end, marks=pytest.mark.long) for end in ("stop token", "eos"))]
)
def test_one_that_cheats_only_in_the_last_pass_has_nothing_of_it_come_out(model, answer, end, tmp_path):
    if end == "eos":
        model = with_eos(model, tmp_path, answer)
    with LLM(model, mode="tee-only", **LIMITS) as llm:
        (output,) = llm.generate([answer.prompt], ending(llm, end, answer), use_tqdm=False)
        assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == (
            "length" if end == "max_tokens" else "stop", LAST,
        )  # fmt: skip
    said: list[str] = []
    recording = tmp_path / "tee.rec"
    cheat = misbehaviour(f"plus-one:lm_head:{LAST}")
    with against(model, cheat, report=said.append, trace=recording) as (llm, (gpu,)):
        completion = llm.start(answer.prompt, ending(llm, end, answer))
        shown = ""
        with pytest.raises(IntegrityError):
            for piece in llm.stream_completion(completion):
                shown += piece
        assert answer.text[:-1].startswith(shown)
        assert completion.text == answer.text[:-1]
        assert len(completion.token_ids) == LAST - 1
        facts = llm.stats()
        assert {row["operation"]: row["calls"] for row in facts["operations"]}["SAMPLE"] == LAST - 1
        statistics = llm.statistics
    assert [line for line in said if not line.startswith("waiting: ")] == []
    # What others see of it, the one who cheats among them: no step more than those before.
    assert (statistics.steps, statistics.generated) == (LAST - 1, LAST - 1)
    seen = [each.progress for each in gpu.gpu.asked if each.step == LAST] + [gpu.left]
    assert {(each.steps, each.generated) for each in seen} == {(LAST - 1, LAST - 1)}
    assert len({each.tokens for each in seen}) == 1
    assert names_in(recording).count("SAMPLE") == LAST - 1


def names_in(recording: Path) -> list[str]:
    return [event.name for event in Recording.read(recording).events]


def with_eos(model: Path, folder: Path, answer: Answer) -> Path:
    """The same model, which ends its answers by that letter."""
    copy = folder / "with eos"
    shutil.copytree(model, copy)
    with closing(Tokenizer.from_folder(copy)) as tokenizer:
        (eos,) = tokenizer.encode(answer.text[-1])
    for name in ("config.json", "generation_config.json"):
        (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), "eos_token_id": eos}))
    return copy


@pytest.mark.parametrize("flags", [[], pytest.param(["--json"], marks=pytest.mark.long)], ids=["text", "json"])
def test_on_the_command_line_it_is_exit_code_4_and_one_line(model, field_server, answer, flags):
    """Of the text, nothing but what came before the pass; of a result in JSON, nothing."""
    session = next(SESSION_NAMES)
    field_server.start(str(model), session, f"plus-one:lm_head:{LAST}")
    command = ["tee", model, "--session", session, "--mode", "verified", "--prompt", answer.prompt, *flags]
    done = run(*command, "-q", "--max-new-tokens", LAST, "--ignore-eos")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tsqp-shm: a result of the gpu process is false: lm_head (see ")
    assert done.returncode == 4
    with LLM(model, mode="tee-only", **LIMITS) as llm:
        (output,) = llm.generate([answer.prompt], replace(PARAMS, max_tokens=LAST - 1), use_tqdm=False)
    assert ("" if flags else output.outputs[0].text).startswith(done.stdout)
