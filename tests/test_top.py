"""`tsqp-shm top` on real sessions: what it shows is so, and it cannot disturb."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
from models import RandomModel, model_folder

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.shm import layout
from tsqp_shm.shm.observer import Observer
from tsqp_shm.shm.plan import Operation
from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.posix.objects import arena_name
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.progress import STATS_SOCKET, WITHHELD, Progress
from tsqp_shm.shm.protocol import Opcode
from tsqp_shm.top.summary import Summary
from tsqp_shm.top.told import Pads, Told

COMMAND = [sys.executable, "-m", "tsqp_shm", "top"]


@pytest.fixture
def llm(fast) -> Iterator[LLM]:
    with fast.llm(model_folder(RandomModel("llama")), max_model_len=256, max_num_seqs=2) as llm:
        yield llm


def session_of(llm: LLM) -> str:
    return llm.bring_up()["session"]


def observer_of(session: str) -> Observer:
    return Observer(session, PosixTransport(session))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)


def seen(llm: LLM, *arguments: str, busy: bool = False) -> str:
    """What a view shows, while completions run or none does."""
    process = subprocess.Popen([*COMMAND, "--once", *arguments], stdout=subprocess.PIPE, text=True)
    while busy and process.poll() is None:
        llm.generate([3, 4, 5], SamplingParams(max_tokens=20, ignore_eos=True, temperature=0))
    shown, _ = process.communicate()
    assert process.returncode == 0
    return shown


def facts_until(summary: Summary, observer: Observer, condition) -> dict:
    end = time.monotonic() + 20
    while True:
        summary.take(observer.look())
        facts = summary.facts()
        if condition(facts):
            return facts
        assert time.monotonic() < end, facts
        time.sleep(0.02)


@pytest.mark.parametrize("doorbell", ["adaptive", "zmq"])
def test_a_busy_session_shows_its_rates(fast, doorbell):
    with fast.llm(model_folder(RandomModel("llama")), max_model_len=256, max_num_seqs=2, doorbell=doorbell) as llm:
        facts = json.loads(seen(llm, "--json", "--interval", "0.5", busy=True))
        assert facts["session"] == session_of(llm)
    assert facts["tokens_per_s"] > facts["generated_per_s"] > 0
    assert facts["doorbells_per_s"] > 0
    assert facts["round_trip_p99_us"] >= facts["round_trip_p50_us"] > 0
    assert facts["sequences"]["of"] == 2
    assert facts["totals"]["doorbells"] > facts["totals"]["generated"] > 0
    for side in ("tee", "gpu"):
        assert not facts[side]["is_silent"]
        assert facts[side]["heartbeat_age_s"] < 5


def test_an_idle_session_shows_what_it_has_done_and_that_it_waits(llm):
    llm.generate([3, 4, 5], SamplingParams(max_tokens=7, ignore_eos=True, temperature=0))
    doorbells = llm.statistics.doorbells
    shown = seen(llm, "--interval", "0.3")
    assert "idle: nothing to complete" in shown
    assert "waits for a submission" in shown
    facts = json.loads(seen(llm, "--interval", "0.3", "--json"))
    assert facts["totals"] == {"steps": 7, "tokens": 9, "generated": 7, "doorbells": doorbells}
    assert (facts["generated_per_s"], facts["sequences"]["running"]) == (0, 0)
    # The first view has taken that long at least.
    assert facts["tee"]["since_s"] > 0.3
    assert facts["slots"] == {"in_use": [], "of": 18}


def test_a_cancelled_completion_is_not_shown_as_running(llm):
    stream = llm.stream([3, 4, 5], SamplingParams(max_tokens=50, ignore_eos=True, temperature=0))
    stream.close()
    updates = SimpleQueue()
    completion = llm.start([3, 4, 5], SamplingParams(max_tokens=50, ignore_eos=True, temperature=0))
    llm.runtime.add([completion], updates.put)
    updates.get()
    with closing(observer_of(session_of(llm))) as observer:
        assert observer.look().progress.running == 1
    llm.runtime.cancel([completion])
    # An order behind that one.
    assert llm.runtime.load().running == 0
    with closing(observer_of(session_of(llm))) as observer:
        assert observer.look().progress.running == 0


def test_a_stopped_gpu_process_is_seen_with_what_it_has_not_done(llm):
    pid = llm.bring_up()["processes"]["gpu"]["pid"]
    # Idle, so the queue is this test's to use.
    queue, slots = llm.runtime.connection.queue, llm.runtime.connection.arena.plan
    down = slots.linear_operations.index(Operation("DOWN", 1))
    with closing(observer_of(session_of(llm))) as observer:
        summary = Summary(observer)
        os.kill(pid, signal.SIGSTOP)
        try:
            sequence = queue.submit(
                Opcode.LINEAR, target=down, in_slot=slots.slot("act"), out_slot=slots.slot("hidden"), rows=3
            )
            facts = facts_until(summary, observer, lambda facts: facts["gpu"]["is_silent"])
        finally:
            os.kill(pid, signal.SIGCONT)
        assert facts["gpu"]["doing"] == "is about to take DOWN, layer 1, 3 rows"
        assert facts["tee"]["doing"].endswith("DOWN, layer 1, 3 rows")
        assert facts["gpu"]["since_s"] > 0.5
        assert facts["slots"]["in_use"] == ["hidden", "act"]
        assert not facts["tee"]["is_silent"]
        queue.wait(sequence)
        facts_until(summary, observer, lambda facts: facts["gpu"]["doing"].endswith("waits for a submission"))


def test_what_the_arena_of_a_blinded_session_does_not_say_it_tells(fast):
    """Stock and rate of pads, and the times by which a step and the time between two are told apart."""
    settings = {"pad_stock": 300, "pad_ready": 100, "max_model_len": 256, "max_num_seqs": 2}
    with fast.llm(model_folder(RandomModel("llama")), mode="blinded", **settings) as llm:
        llm.generate([3, 4, 5], SamplingParams(max_tokens=7, ignore_eos=True, temperature=0))
        with closing(observer_of(session_of(llm))) as observer:
            assert not any(observer.look().progress.withheld().values())
        facts = json.loads(seen(llm, "--interval", "0.3", "--json"))
        shown = seen(llm, "--interval", "0.3")
        pads = llm.stats()["pads"]
    assert facts["pads"].items() >= {name: pads[name] for name in ("used", "burned", "tee_products", "fault")}.items()
    assert (facts["pads"]["capacity_rows"], facts["totals"]["generated"]) == (300, 7)
    assert facts["round_trip_p99_us"] >= facts["round_trip_p50_us"] > 0
    assert facts["tee"]["doing"] == "idle: nothing to complete"
    assert facts["tee"]["since_s"] > 0.3
    assert " of 300 rows in stock, " in shown
    assert f"{pads['used']:,} used, {pads['burned']:,} burned, {pads['tee_products']:,} products in the TEE" in shown


def test_a_session_that_does_not_answer_is_shown_all_the_same(llm):
    with socket.socket(socket.AF_UNIX) as silent:
        path = sessions_folder() / session_of(llm) / STATS_SOCKET
        silent.bind(str(path))
        silent.listen()
        assert "the session does not tell" in seen(llm, "--interval", "0.1")


PADS = Pads(700, 4096, made=91_000, used=12_345, burned=6, pads_per_s=321.5, tee_products=42, fault=None)


def test_the_tees_state_without_times_is_what_its_counts_say(llm):
    with closing(observer_of(session_of(llm))) as observer:
        idle = observer.look()

        def doing(told: dict[str, int] | None = None, **progress: int) -> str:
            summary = Summary(observer)
            summary.take(replace(idle, progress=idle.progress.public()._replace(**progress)))
            if told is not None:
                summary.hear(Told(PADS, {**dict.fromkeys(WITHHELD, 0), **told}))
            facts = summary.facts()
            assert ("pads" in facts) == (told is not None)
            return facts["tee"]["doing"]

        assert doing() == "idle: nothing to complete"
        assert doing(running=2) == doing(running=2, told={}) == "at work, 2 sequences"
        now_ns = time.perf_counter_ns()
        assert doing(running=2, told={"step_began_ns": now_ns}) == "computes, 2 sequences in this step"
        times = {"step_began_ns": now_ns - 1, "step_ended_ns": now_ns}
        assert doing(running=2, told=times) == "between two steps"


def descriptors_of(session: str) -> set[int]:
    """Of this process, those of the session's arena."""
    arena = Path(f"/dev/shm{arena_name(session)}")
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        # One is the descriptor of the folder that is read.
        with contextlib.suppress(FileNotFoundError):
            if path.readlink() == arena:
                found.add(int(path.name))
    return found


def test_it_has_no_way_to_write_and_does_not_map_a_slot(llm):
    before = descriptors_of(session_of(llm))
    with closing(observer_of(session_of(llm))) as observer:
        observer.look()
        (fd,) = descriptors_of(observer.session) - before
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        # One mapping, that of this process's own role.
        assert Path("/proc/self/maps").read_text().count(f"/dev/shm/tsqp-shm-{os.geteuid()}-{observer.session}") == 1


def test_it_ends_with_the_session(llm):
    process = subprocess.Popen(
        [*COMMAND, "--json", "--interval", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert json.loads(process.stdout.readline())["session"] == session_of(llm)
    llm.close()
    _, said = process.communicate()
    assert (process.returncode, said) == (0, f"session '{session_of(llm)}' has ended\n")


def test_without_a_session_it_is_one_line():
    result = run("--once")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no session is running" in result.stderr
    assert run("nowhere").stderr == (
        "tsqp-shm: there is no session 'nowhere'; no session is running; tsqp-shm launch starts one\n"
    )
    for arguments in (["--interval", "0"], ["--interval", "nan"], ["../up"]):
        result = run(*arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_a_dead_session_is_one_line(forked):
    child = forked(lambda: (Session.begin("deceased"), os.kill(os.getpid(), signal.SIGKILL)))
    assert child.wait() == -signal.SIGKILL
    result = run("deceased")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "dead" in result.stderr
    # What it left is the next start's to remove, not this one's.
    with Session.begin("survivor"):
        pass


def test_of_two_sessions_it_asks_which_and_one_without_an_arena_is_one_line():
    with Session.begin("first"), Session.begin("second"):
        result = run("--once")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "first, second" in result.stderr
        result = run("first")
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert "none at the moment" in result.stderr


def test_the_progress_words_fit_their_place():
    assert len(Progress._fields) * 8 <= layout.PROGRESS_BYTES
