"""A parent's hold on its child and the child's on its parent: neither outlives the other, and the end is explained."""

import json
import os
import select
import signal
import sys
from queue import SimpleQueue

import pytest

from tsqp_shm.errors import ConfigError, ModelFileError, PeerDied
from tsqp_shm.roles.process import LAST_WORDS_LINES, MAX_LINE_BYTES, RoleProcess

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip
# A role that is ready and lives for as long as its parent does.
LIVES = """
import os, signal, sys
from tsqp_shm.roles.lifeline import Lifeline
lifeline = Lifeline.from_environment()
lifeline.on_parent_gone(lambda: os.kill(os.getpid(), signal.SIGTERM))
lifeline.ready()
print("up", file=sys.stderr, flush=True)
signal.pause()
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Makes `RoleProcess.start` run a script, which takes the interpreter's place."""

    def write(code):
        path = tmp_path / "role"
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


@pytest.fixture
def start():
    """Starts a role. Returns it and the queue of the lines it prints."""
    started = []

    def start_role(role="gpu", arguments=(), **options):
        lines = SimpleQueue()
        started.append(RoleProcess.start(role, arguments, listen=lines.put, **options))
        return started[-1], lines

    yield start_role
    for process in started:
        process.stop()


@pytest.fixture
def waiting_gpu(start, tmp_path):
    """The real GPU process, which waits for a TEE process that does not come."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    process, lines = start("gpu", [str(tmp_path), "--session", "nobody", "--device", "cpu"])
    while "waiting" not in lines.get(timeout=50):
        pass
    return process


def ended(pidfd: int) -> bool:
    """Waits until a process has ended, which need not be a child."""
    return bool(select.select([pidfd], [], [], 50)[0])


def test_a_role_gets_its_arguments_and_what_is_added_to_its_environment(script, start):
    script("import os, sys; print(sys.argv[1:], os.environ['ADDED'], file=sys.stderr)")
    process, lines = start("tee", ["MODEL", "--flag"], environment={"ADDED": "value"})
    assert lines.get(timeout=30) == "['-m', 'tsqp_shm', 'tee', 'MODEL', '--flag'] value"
    assert process.wait(30) == 0


def test_a_role_is_ready_when_it_says_so(script, start):
    script(LIVES)
    process, lines = start()
    assert lines.get(timeout=30) == "up"
    assert process.is_ready
    assert process.exit_code is None
    assert process.death() is None


def test_a_role_that_has_not_said_so_is_not_ready(script, start):
    script(LIVES.replace("lifeline.ready()", ""))
    process, lines = start()
    assert lines.get(timeout=30) == "up"
    assert not process.is_ready


def test_a_role_that_is_told_to_stop_ends_by_itself(script, start):
    script(LIVES.replace("os.kill(os.getpid(), signal.SIGTERM)", "os._exit(7)"))
    process, lines = start()
    lines.get(timeout=30)
    assert process.stop() == 7
    assert process.stop() == 7


def test_a_role_that_drops_the_first_word_is_told_again(script, start, monkeypatch):
    monkeypatch.setattr("tsqp_shm.roles.process.POLITE_STOP_S", 40)
    script(
        LIVES.replace(
            "os.kill(os.getpid(), signal.SIGTERM)", "told.append(1) or len(told) == 2 and os._exit(7)"
        ).replace("lifeline.ready()", "told = []\nlifeline.ready()")
    )
    process, lines = start()
    lines.get(timeout=30)
    assert process.stop() == 7


def test_a_role_that_does_not_listen_is_killed(script, start, monkeypatch):
    monkeypatch.setattr("tsqp_shm.roles.process.POLITE_STOP_S", 0.01)
    monkeypatch.setattr("tsqp_shm.roles.process.FIRM_STOP_S", 0.01)
    script(
        "import signal, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', file=sys.stderr, flush=True)\nwhile True: signal.pause()"
    )
    process, lines = start()
    lines.get(timeout=30)
    assert process.stop() == -signal.SIGKILL


def test_a_role_that_is_killed_is_a_peer_that_died_by_the_signal(waiting_gpu):
    os.kill(waiting_gpu.pid, signal.SIGKILL)
    waiting_gpu.wait(30)
    death = waiting_gpu.death()
    assert isinstance(death, PeerDied)
    assert (death.role, death.exit) == ("gpu", "signal SIGKILL")
    assert "waiting" in death.last_words


def test_a_role_ends_by_itself_when_its_parent_is_killed(script, forked):
    script(LIVES)
    told, tell = os.pipe()

    def parent():
        lines = SimpleQueue()
        child = RoleProcess.start("gpu", [], listen=lines.put)
        lines.get(timeout=30)
        os.write(tell, str(child.pid).encode())
        signal.pause()

    process = forked(parent)
    pidfd = os.pidfd_open(int(os.read(told, 20)))
    process.kill()
    assert ended(pidfd)
    for descriptor in (told, tell, pidfd):
        os.close(descriptor)


def test_a_signal_in_the_middle_of_a_finaliser_is_not_lost(script, start):
    script(
        "import signal\nfrom tsqp_shm import cli\ncli._end_by_signals()\n"
        "class Finalised:\n    def __del__(self): signal.raise_signal(signal.SIGTERM)\n"
        "Finalised()\nsignal.pause()"
    )
    process, lines = start()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert lines.empty()


def test_the_gpu_process_ends_when_its_lifeline_is_cut(waiting_gpu):
    assert waiting_gpu.stop() == 128 + signal.SIGTERM


@pytest.mark.parametrize("role", ["tee", "gpu"])
def test_a_model_that_is_missing_is_the_error_of_whoever_started_the_role(start, role):
    process, _ = start(role, ["/nonexistent/model", "--session", "nobody"])
    assert process.wait(50) == ModelFileError.exit_code
    death = process.death()
    assert isinstance(death, ModelFileError)
    assert str(death).startswith("/nonexistent/model: not a folder")


def test_a_relayed_error_is_not_forgotten_when_the_role_was_ready_before(script, start):
    script(
        "import sys\nfrom tsqp_shm.errors import ConfigError\nfrom tsqp_shm.roles.lifeline import Lifeline\n"
        "lifeline = Lifeline.from_environment()\nlifeline.ready()\nerror = ConfigError('device', 'x', 'cpu')\n"
        "lifeline.failed(error)\nprint(f'tsqp-shm: {error}', file=sys.stderr)\nsys.exit(2)"
    )
    process, _ = start()
    process.wait(30)
    death = process.death()
    assert isinstance(death, ConfigError)
    assert str(death) == "device: got 'x', expected cpu"
    assert str(process.death()) == str(death)


def test_the_error_is_the_line_that_says_so_though_a_library_has_the_last_word(script, start):
    script(
        "import sys\nfrom tsqp_shm.errors import ConfigError\nfrom tsqp_shm.roles.lifeline import Lifeline\n"
        "error = ConfigError('device', 'x', 'cpu')\nLifeline.from_environment().failed(error)\n"
        "print(f'tsqp-shm: {error}\\na library says goodbye', file=sys.stderr)\nsys.exit(2)"
    )
    process, _ = start()
    process.wait(30)
    assert str(process.death()) == "device: got 'x', expected cpu"


def test_a_forked_child_does_not_hold_its_parent_s_role(script, start, forked):
    """With a copy of the lifeline the role would live for as long as the child does."""
    script(LIVES.replace("os.kill(os.getpid(), signal.SIGTERM)", "os._exit(7)"))
    process, lines = start()
    lines.get(timeout=30)
    forked(signal.pause)
    assert process.stop() == 7


def test_an_exit_that_nobody_explained_is_a_peer_that_died(script, start):
    script("import sys; print('tsqp-shm: device: no', file=sys.stderr); sys.exit(5)")
    process, _ = start()
    process.wait(30)
    death = process.death()
    assert isinstance(death, PeerDied)
    assert (death.exit, death.last_words) == ("exit code 5", "tsqp-shm: device: no")


def test_last_words_are_printable(script, start):
    script(r"import sys; sys.stderr.buffer.write(b'\x1b[2J\x07 \xe2\x80\xae \xff caf\xc3\xa9\r\n')")
    process, lines = start()
    process.wait(30)
    assert lines.get(timeout=30) == "?[2J? ? \N{REPLACEMENT CHARACTER} caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert process.death().last_words.isprintable()


def test_last_words_are_bounded(script, start):
    script("import sys; sys.stderr.write('x' * 100_000 + '\\n'); [print(n, file=sys.stderr) for n in range(1000)]")
    process, _ = start()
    process.wait(30)
    assert process.death().last_words.splitlines() == [str(n) for n in range(1000 - LAST_WORDS_LINES, 1000)]


def test_a_line_without_an_end_is_passed_on_in_pieces(script, start):
    script("import sys; sys.stderr.write('x' * 1_000_000)")
    process, lines = start()
    process.wait(30)
    process.stop()
    pieces = [lines.get_nowait() for _ in range(lines.qsize())]
    assert sum(map(len, pieces)) == 1_000_000
    assert max(map(len, pieces)) <= MAX_LINE_BYTES


def test_stopping_does_not_wait_for_a_grandchild_that_holds_the_pipe(script, start):
    script(
        "import subprocess, sys\nother = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        "print(other.pid, file=sys.stderr, flush=True)"
    )
    process, lines = start()
    grandchild = int(lines.get(timeout=30))
    pidfd = os.pidfd_open(grandchild)
    try:
        assert process.wait(30) == 0
        assert process.stop() == 0
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert ended(pidfd)
        os.close(pidfd)
