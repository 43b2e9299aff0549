"""A process that is not dumpable: what others of its user are refused, and what goes on to work around it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from arenas import arena_of
from models import RandomModel, with_bytes_as_tokens

from tsqp_shm.errors import TsqpError
from tsqp_shm.hardening import examine, harden
from tsqp_shm.roles.resources import num_open_descriptors
from tsqp_shm.sessions import Survey, clean_sessions
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.posix.transport import PosixTransport

PLAN = Plan.of_slots([("x", "float32", 100, 300)])
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root becomes another user")
NOBODY = 65534


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def make_dumpable() -> None:
    """As a process is that was started by its user: one that has changed its user is not."""
    assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0


def test_a_hardened_process_is_not_dumpable_and_leaves_no_core(forked):
    def run():
        make_dumpable()
        assert examine()["dumpable"]
        assert harden() == {"dumpable": False, "core": False}
        assert harden() == examine() == {"dumpable": False, "core": False}
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)

    forked(run).join()


def test_children_stay_so_and_a_program_begins_anew(forked):
    def run():
        harden()
        child = os.fork()
        if child == 0:
            os._exit(examine()["dumpable"])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        code = "from tsqp_shm.hardening import examine; print(examine())"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said == "{'dumpable': True, 'core': False}\n"

    forked(run).join()


def test_a_system_that_refuses_is_one_line(forked, monkeypatch):
    def refuse(limit, values):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "setrlimit", refuse)

    def run():
        with pytest.raises(TsqpError, match=r"makes no keys: .*Operation not permitted"):
            harden()

    forked(run).join()


def looked_at(pid: int) -> dict[str, bool]:
    """Which files of a process another one of its user can read."""
    found = {}
    for name in ("stat", "status", "cmdline", "comm", "maps", "environ", "mem", "fd", "exe"):
        path = Path(f"/proc/{pid}/{name}")
        try:
            if name == "fd":
                list(path.iterdir())
            elif name == "exe":
                path.readlink()
            elif name == "mem":
                path.open("rb").close()
            else:
                path.read_bytes()
            found[name] = True
        except PermissionError:
            found[name] = False
    return found


@needs_root
def test_another_process_of_the_user_sees_times_and_counts_and_no_memory(forked):
    """Nothing of what the package reads of a TEE process from outside is among what is refused, `ps` apart."""

    def run():
        become_nobody()
        make_dumpable()
        hardened, told = os.pipe()
        child = os.fork()
        if child == 0:
            harden()
            # Its own files it can read all the same, for what a role needs.
            assert num_open_descriptors() > 0
            assert Path("/proc/self/status").read_text()
            os.write(told, b"x")
            signal.pause()
        try:
            os.read(hardened, 1)
            assert {name for name, is_read in looked_at(child).items() if is_read} == {
                "stat", "status", "cmdline", "comm",
            }  # fmt: skip
            assert all(looked_at(os.getpid()).values())
            # Signals and limits ask for the user alone.
            resource.prlimit(child, resource.RLIMIT_CORE)
        finally:
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    forked(run).join()


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of another user's, to which the way is open to him."""
    with tempfile.TemporaryDirectory(prefix="tsqp-home", dir="/tmp") as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


@needs_root
def test_ps_and_clean_work_beside_a_tee_process_that_lets_nobody_look(home, forked):
    def run():
        become_nobody()
        make_dumpable()
        os.environ["TSQP_SHM_RUNTIME_DIR"] = str(home)
        begun, tell = os.pipe()
        tee = os.fork()
        if tee == 0:
            session = Session.begin("hidden")
            harden()
            with arena_of(session, PLAN) as arena:
                arena.publish()
                os.write(tell, b"x")
                signal.pause()
        try:
            os.read(begun, 1)
            (listed,) = Survey.take().sessions
            assert (listed.is_alive, listed.tee_pid, listed.pids) == (True, tee, [tee])
            assert not PosixTransport("hidden").glance().is_gone
            clean_sessions(dry_run=False)
            assert [session.pids for session in Survey.take().sessions] == [[tee]]
        finally:
            os.kill(tee, signal.SIGKILL)
            os.waitpid(tee, 0)
        (listed,) = Survey.take().sessions
        assert (listed.is_alive, listed.pids) == (False, [])
        clean_sessions(dry_run=False)
        assert Survey.take().sessions == []

    forked(run).join()


SESSION = """
import os, signal, subprocess, sys
from pathlib import Path
from tsqp_shm import LLM, SamplingParams
from process_table import children

model, trace = sys.argv[1:]
params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)

def said(*words):
    return subprocess.run([sys.executable, "-m", "tsqp_shm", *words], capture_output=True, text=True, check=True).stdout

def ids():
    return llm.generate([3, 4, 5], params)[0].outputs[0].token_ids

with LLM(model, mode="blinded", session="hidden", restart_gpu=1, trace=trace, pad_ready=64, pad_stock=300) as llm:
    assert llm.generate("abc", params)
    expected = ids()
    gpu = llm.bring_up()["processes"]["gpu"]["pid"]
    try:
        Path("/proc/self/maps").read_text(), Path(f"/proc/{gpu}/maps").read_text()
        subprocess.run(["cat", f"/proc/{os.getpid()}/maps"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        assert b"Permission denied" in error.stderr
    else:
        raise AssertionError("it can be looked at")
    for confined in children():
        if b"confined" in Path(f"/proc/{confined}/cmdline").read_bytes():
            looked = subprocess.run(["cat", f"/proc/{confined}/maps"], capture_output=True)
            assert b"Permission denied" in looked.stderr
            break
    else:
        raise AssertionError("no process reads the tokenizer")
    assert said("ps").splitlines()[1].split()[-2:] == [str(os.getpid()), str(gpu)], said("ps")
    shown = said("top", "--once", "--interval", "0.3")
    assert "idle: nothing to complete" in shown
    assert "rows in stock" in shown
    os.kill(gpu, signal.SIGKILL)
    assert ids() == expected
    assert llm.statistics.gpu_restarts == 1
"""


@pytest.mark.long
@needs_root
def test_a_session_whose_tee_process_lets_nobody_look_is_seen_restarted_and_traced(tmp_path):
    """Without the capabilities by which root may look at all processes."""
    trace = tmp_path / "trace.json"
    model = with_bytes_as_tokens(RandomModel("llama").write(tmp_path / "model"))
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", SESSION, str(model), str(trace)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"(TEE|GPU) process", trace.read_text())) == {"TEE", "GPU"}
