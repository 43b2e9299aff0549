"""A parent's hold on its child and the child's on its parent: neither outlives the other, and the end is explained."""

import contextlib
import json
import os
import select
import signal
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

import pytest
from models import RandomModel, model_folder

from tsqp_shm.descriptors import memory_file
from tsqp_shm.errors import ConfigError, ModelFileError, PeerDied
from tsqp_shm.roles import relay
from tsqp_shm.roles.lifeline import Lifeline
from tsqp_shm.roles.private_arguments import handed_over
from tsqp_shm.roles.process import RoleProcess
from tsqp_shm.roles.relay import LAST_WORDS_LINES, MAX_LINE_BYTES

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
def waiting_gpu(start):
    """The real GPU process, which waits for a TEE process that does not come."""
    process, lines = start("gpu", [str(model_folder(RandomModel("llama"))), "--session", "nobody", "--device", "cpu"])
    while "waiting" not in lines.get(timeout=50):
        pass
    return process


def ended(pidfd: int) -> bool:
    """Waits until a process has ended, which need not be a child."""
    return bool(select.select([pidfd], [], [], 50)[0])


def test_a_role_gets_its_arguments(script, start):
    script("import sys; print(sys.argv[1:], file=sys.stderr)")
    process, lines = start("tee", ["MODEL", "--flag"])
    assert lines.get(timeout=30) == "tee: ['-m', 'tsqp_shm', 'tee', 'MODEL', '--flag']"
    assert process.wait(30) == 0


def test_private_arguments_stand_neither_on_the_command_line_nor_in_the_environment(script, start):
    secret = "\0 secret \udcff\n" + "x" * (1 << 18)
    script(
        "import pathlib\nfrom tsqp_shm.roles.private_arguments import handed_over\nwords = handed_over()\n"
        "print(len(words[1]), ascii(words[1][:11]), *(b'secret' in pathlib.Path('/proc/self', name).read_bytes()"
        " for name in ('cmdline', 'environ')), handed_over())"
    )
    process, lines = start("tee", ["MODEL"], private_arguments=["--stop=a", secret])
    assert lines.get(timeout=30) == rf"tee: {len(secret)} '\x00 secret \udcff\n' False False []"
    assert process.wait(30) == 0


def test_a_role_is_ready_when_it_says_so(script, start):
    script(LIVES)
    process, lines = start()
    assert lines.get(timeout=30) == "gpu: up"
    assert process.is_ready
    assert process.exit_code is None
    assert process.death() is None


def test_a_role_that_has_not_said_so_is_not_ready(script, start):
    script(LIVES.replace("lifeline.ready()", ""))
    process, lines = start()
    assert lines.get(timeout=30) == "gpu: up"
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


def assert_ends_with_its_parent(forked, before_start=lambda: None):
    """Of the role that the script plays, and a parent that is killed."""
    told, tell = os.pipe()

    def parent():
        before_start()
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


def test_a_role_ends_by_itself_when_its_parent_is_killed(script, forked):
    script(LIVES)
    assert_ends_with_its_parent(forked)


def test_a_signal_in_the_middle_of_a_finaliser_is_not_lost(script, start):
    script(
        "import signal\nfrom tsqp_shm import cli\ncli._end_by_signals(has_parent=True)\n"
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
    assert str(death).startswith(f"the {role} process says: /nonexistent/model: not a folder")


FAILS = """
import sys
MORE = ""
from tsqp_shm.errors import ConfigError
from tsqp_shm.roles.lifeline import Lifeline
lifeline = Lifeline.from_environment()
lifeline.ready()
lifeline.failed(ConfigError("device", "x", "cpu" + MORE))
print("tsqp-shm: all is well\\na library says goodbye", file=sys.stderr)
sys.exit(2)
"""


def test_an_error_before_the_session_has_come_up_is_relayed_in_the_name_of_the_role(script, start):
    script(FAILS)
    process, _ = start()
    process.wait(30)
    death = process.death()
    assert isinstance(death, ConfigError)
    assert str(death) == "the gpu process says: device: got 'x', expected cpu"
    assert str(process.death()) == str(death)


def test_an_error_after_the_session_has_come_up_is_a_death_whatever_it_is_called(script, start):
    script(FAILS)
    process, _ = start()
    process.came_up()
    process.wait(30)
    death = process.death()
    assert isinstance(death, PeerDied)
    assert (death.exit, death.last_words) == ("exit code 2", "tsqp-shm: all is well\na library says goodbye")
    # Each of its lines is seen to be its own.
    assert str(death).splitlines()[1:] == ["gpu: tsqp-shm: all is well", "gpu: a library says goodbye"]


def test_a_relayed_error_is_one_printable_line_of_bounded_length(script, start):
    more = "\x1b[2J\ntsqp-shm: forged " + "x" * 5000
    script(FAILS.replace('MORE = ""', f"MORE = {more!r}"))
    process, _ = start()
    process.wait(30)
    said = str(process.death())
    assert said.startswith(r"the gpu process says: device: got 'x', expected cpu\x1b[2J\ntsqp-shm: forged xxx")
    assert len(said) < 1100


# By a peer that is none of ours: on the descriptor itself.
SAYS = """
import os, sys
os.write(int(os.environ["TSQP_SHM_LIFELINE"]), {said!r})
sys.exit(4)
"""


@pytest.mark.parametrize(
    "said",
    [
        b"failed PeerDied tee\n", b"failed RequestError x\n", b"failed\n", b"failed ConfigError", b"\n" * 60000,
        b"failed ConfigError no\nready\n", b"dead gpu process 0\n", b"another gpu process\n" * 3000, b"\xff" * 60000,
    ],
    ids=lambda said: repr(said[:24]),
)  # fmt: skip
def test_whatever_else_a_peer_says_on_the_lifeline_means_nothing(script, start, said):
    script(SAYS.format(said=said))
    process, _ = start()
    process.wait(30)
    assert isinstance(process.death(), PeerDied)
    assert process.gpus_wanted == 0


def test_what_a_peer_quotes_is_cleaned_here_too(script, start):
    script(SAYS.format(said=b"failed DeviceError \x1b[2J\xff\xe2\x80\xae" + b"x" * 3000 + b"\n"))
    process, _ = start()
    process.wait(30)
    said = str(process.death())
    assert said.startswith("the gpu process says: \\x1b[2J\N{REPLACEMENT CHARACTER}\\u202exxx")
    assert len(said) < 1100


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
    line = "\\x1b[2J\\x07 \\u202e \N{REPLACEMENT CHARACTER} caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert lines.get(timeout=30) == f"gpu: {line}"
    assert process.death().last_words == line


def test_last_words_are_bounded(script, start):
    script("import sys; sys.stderr.write('x' * 20_000 + '\\n'); [print(n, file=sys.stderr) for n in range(300)]")
    process, _ = start()
    process.wait(30)
    assert process.death().last_words.splitlines() == [str(n) for n in range(300 - LAST_WORDS_LINES, 300)]


def heard(lines: SimpleQueue) -> tuple[list[str], int]:
    """What was handed on, and how many bytes were not."""
    said = [lines.get_nowait() for _ in range(lines.qsize())]
    dropped = [line for line in said if line.startswith("dropped ")]
    return [line.removeprefix("gpu: ") for line in said if line not in dropped], sum(
        int(line.split()[1].replace(",", "")) for line in dropped
    )


def test_a_line_without_an_end_is_handed_on_in_pieces(script, start):
    script("import sys; sys.stderr.write('x' * 50_000)")
    process, lines = start()
    process.wait(30)
    process.stop()
    pieces, dropped = heard(lines)
    assert (sum(map(len, pieces)), dropped) == (50_000, 0)
    assert max(map(len, pieces)) <= MAX_LINE_BYTES


@pytest.mark.parametrize("text", ["x" * 997, r"\x1b\n" * 499, "line\\n" * 200], ids=["no line", "empty lines", "lines"])
def test_of_a_flood_the_beginning_is_heard_and_the_rest_counted_but_for_the_last_words(script, start, text):
    script(
        f"import sys\nfor _ in range(300): sys.stdout.write({text!r}.encode().decode('unicode_escape'))\n"
        "print('\\nthe last words')"
    )
    process, lines = start()
    assert process.wait(50) == 0
    assert process.death().last_words.splitlines()[-1] == "the last words"
    said, dropped = heard(lines)
    size = len(text.encode().decode("unicode_escape"))
    # Half of the lines of two bytes are an escape, which is shown as four.
    assert dropped > 300 * size - relay.BURST_BYTES - relay.MAX_LINE_BYTES
    assert len(said) < relay.BURST_BYTES / relay.LINE_COST_BYTES + relay.MAX_LINE_BYTES + relay.KEPT_BYTES
    assert said[-1] == "the last words"


def test_a_flood_takes_no_time_of_whoever_hears_it(script, start, monkeypatch):
    """The thread that hears it is asked for the processor time that it has taken, after so much of the flood."""
    monkeypatch.setattr(relay, "BYTES_PER_S", 1 << 16)
    script("import os, sys\nsys.stderr.write('up\\n')\nwhile True: os.write(1, b'\\x1b\\n' * 32768)")
    process, lines = start()
    while not lines.get(timeout=30).startswith("dropped "):
        pass
    thread = next(thread for thread in threading.enumerate() if thread.name == "gpu relay")
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    used_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    # A burst and some 64 KiB a tick cost a few ms; hearing it all would have taken all the time.
    assert used_s < 0.5
    # One that cannot be heard any more can still be ended.
    assert process.kill() == -signal.SIGKILL


def test_a_warning_of_a_library_arrives_whole(script, start):
    warning = [f"line {number} of a warning: " + "y" * 300 for number in range(150)]
    script(f"print(*{warning!r}, sep='\\n')")
    process, lines = start()
    process.wait(30)
    process.stop()
    assert heard(lines) == (warning, 0)


# What a child has that it could have of its parent.
REPORTS = """
import json, os, resource
def target(descriptor):
    try: return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError: return None
def tty():
    try: return os.open("/dev/tty", os.O_RDWR)
    except OSError as error: return error.strerror
umask = os.umask(0)
print(json.dumps({
    "descriptors": {descriptor: target(descriptor) for descriptor in os.listdir("/proc/self/fd") if target(descriptor)},
    "lifeline": os.environ["TSQP_SHM_LIFELINE"], "tty": tty(), "umask": umask, "environment": dict(os.environ),
    "core": resource.getrlimit(resource.RLIMIT_CORE), "leads": [os.getsid(0), os.getpgid(0)] == [os.getpid()] * 2,
}))
"""
SECRETS = {
    "HF_TOKEN": "hf_x", "HUGGING_FACE_HUB_TOKEN": "hf_y", "AWS_SECRET_ACCESS_KEY": "z", "SSH_AUTH_SOCK": "/tmp/agent",
    "https_proxy": "http://user:password@proxy", "GITHUB_TOKEN": "t", "DISPLAY": ":0", "DBUS_SESSION_BUS_ADDRESS": "x",
    "PYTHONSTARTUP": "/tmp/x", "PYTHONINSPECT": "", "OPENAI_API_KEY": "k", "XDG_SESSION_ID": "3", "MAIL": "/var/mail/x",
    "NVIDIA_API_KEY": "k", "NVIDIA_X": "k", "TORCH_TOKEN": "t", "TORCH_Password": "p", "CUDA_AUTH": "x",
    "LC_SECRET": "s", "LC_X": "s", "TSQP_SHM_PROMPT": "private words", "OMP_CREDENTIALS": "c", "TORCHX": "x",
}  # fmt: skip
NEEDED = {
    "LC_CTYPE": "C.UTF-8", "TMPDIR": "/tmp", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCH_HOME": "/tmp",
    "TSQP_SHM_ISA": "scalar", "LD_LIBRARY_PATH": "/opt/x", "XDG_CACHE_HOME": "/tmp", "MKL_NUM_THREADS": "1",
    "LC_ALL": "C.UTF-8", "TSQP_SHM_MAX_BATCH_TOKENS": "512", "NVIDIA_VISIBLE_DEVICES": "all",
    "PYTORCH_CUDA_ALLOC_CONF": "x:1",
}  # fmt: skip


@pytest.fixture
def inherited(script, start, monkeypatch) -> dict:
    """What a child that is kept apart has, of a parent that has everything open."""
    for name, value in (SECRETS | NEEDED).items():
        monkeypatch.setenv(name, value)
    before = os.umask(0)
    opened = [os.open("/dev/null", os.O_RDWR) for _ in range(3)]
    for descriptor in opened:
        os.set_inheritable(descriptor, True)
    try:
        script(REPORTS)
        process, lines = start()
        process.wait(30)
        return json.loads(lines.get(timeout=30).removeprefix("gpu: "))
    finally:
        os.umask(before)
        for descriptor in opened:
            os.close(descriptor)


def test_an_untrusted_child_inherits_nothing_but_what_is_named(inherited):
    descriptors = inherited["descriptors"]
    assert descriptors.pop("0") == "/dev/null"
    printed = {descriptors.pop("1"), descriptors.pop("2")}
    assert len(printed) == 1
    assert printed.pop().startswith("pipe:")
    assert descriptors.pop(inherited["lifeline"]).startswith("socket:")
    # The folder that is being listed is gone when it is looked at.
    assert descriptors == {}
    assert inherited["tty"] == os.strerror(6)
    assert inherited["leads"]
    assert inherited["umask"] == 0o077
    assert inherited["core"] == [0, 0]
    environment = inherited["environment"]
    assert not environment.keys() & SECRETS.keys()
    assert environment.items() >= NEEDED.items()
    assert "PATH" in environment
    assert set(environment) <= {*NEEDED, *os.environ, "TSQP_SHM_LIFELINE", "PYTHONSAFEPATH"}


def test_the_lifeline_is_no_standard_stream_though_the_parent_s_are_closed(script, forked):
    script(REPORTS)

    def parent():
        for descriptor in range(3):
            os.close(descriptor)
        lines = SimpleQueue()
        process = RoleProcess.start("gpu", [], listen=lines.put)
        process.wait(30)
        process.stop()
        report = json.loads(lines.get(timeout=30).removeprefix("gpu: "))
        assert int(report["lifeline"]) > 2
        assert report["descriptors"]["0"] == "/dev/null"

    forked(parent).join()


def test_a_role_ends_with_its_parent_though_that_has_sigterm_ignored(script, forked):
    """A signal that is ignored stays so in a child."""
    obeys = "from tsqp_shm import cli\ncli._end_by_signals(has_parent=True)\n"
    script(LIVES.replace("lifeline.on_parent", f"{obeys}lifeline.on_parent"))
    assert_ends_with_its_parent(forked, lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))


@pytest.mark.parametrize("end", ["exits", "is killed", "is stopped"])
def test_what_an_untrusted_role_has_started_ends_with_it(script, start, monkeypatch, end):
    monkeypatch.setattr("tsqp_shm.roles.process.POLITE_STOP_S", 0.01)
    script(
        "import signal, subprocess, sys\nother = subprocess.Popen(['sleep', '300'])\n"
        f"print(other.pid, file=sys.stderr, flush=True)\n{end == 'exits'} or signal.pause()"
    )
    process, lines = start()
    pidfd = os.pidfd_open(int(lines.get(timeout=30).removeprefix("gpu: ")))
    if end == "is stopped":
        process.stop()
    elif end == "is killed":
        process.kill()
    else:
        assert process.wait(30) == 0
    assert ended(pidfd)
    os.close(pidfd)


@pytest.mark.parametrize("text", ["still here\\n", "x" * 65536], ids=["now and then", "a flood"])
def test_a_grandchild_in_a_session_of_its_own_is_heard_no_more_when_the_role_has_ended(script, start, text):
    talks = f"import sys, time\nwhile True:\n  sys.stdout.write('{text}'); sys.stdout.flush(); time.sleep(0.001)"
    script(
        f"import subprocess, sys\nother = subprocess.Popen([{sys.executable!r}, '-c', {talks!r}], "
        "start_new_session=True)\nprint(other.pid, file=sys.stderr, flush=True)"
    )
    process, lines = start()
    pidfd = os.pidfd_open(int(lines.get(timeout=30).removeprefix("gpu: ")))
    assert process.wait(30) == 0
    assert process.stop() == 0
    heard_until_then = lines.qsize()
    # It writes to nobody.
    assert ended(pidfd)
    os.close(pidfd)
    assert lines.qsize() == heard_until_then
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu relay"]


@pytest.mark.parametrize("variable", ["TSQP_SHM_LIFELINE", "TSQP_SHM_ARGUMENTS"])
@pytest.mark.parametrize("value", ["9" * 30, "9" * 5000, "x", "", "-1", "12345", "/", "{list}"])
def test_a_variable_that_only_a_parent_sets_is_one_error_whatever_it_holds(monkeypatch, variable, value):
    no_list = memory_file("no-list", b"3")
    monkeypatch.setenv(variable, value.format(list=no_list) if value == "{list}" else value)
    with pytest.raises(ConfigError, match="as a parent of this package sets it"):
        Lifeline.from_environment() if variable.endswith("LIFELINE") else handed_over()
    with contextlib.suppress(OSError):
        os.close(no_list)


def test_stopping_does_not_wait_for_a_grandchild_that_holds_the_pipe(script, start):
    script(
        "import subprocess, sys\nother = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        "print(other.pid, file=sys.stderr, flush=True)"
    )
    process, lines = start()
    grandchild = int(lines.get(timeout=30).removeprefix("gpu: "))
    pidfd = os.pidfd_open(grandchild)
    try:
        assert process.wait(30) == 0
        assert process.stop() == 0
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert ended(pidfd)
        os.close(pidfd)
