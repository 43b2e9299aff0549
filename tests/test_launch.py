"""The command: both roles as fresh processes, and nothing left of them however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import process_table
import pytest
from models import RandomModel, with_tokenizer
from process_table import is_alive
from pseudo_terminal import OnTerminal

from tsqp_shm.errors import ArenaNotReady
from tsqp_shm.shm.observer import Observer
from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.posix.transport import PosixTransport

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMAND = [sys.executable, "-m", "tsqp_shm"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, demo_model) -> Path:
    """Random words, fast."""
    folder = RandomModel("llama", {"vocab_size": 49152, "max_position_embeddings": 8192})
    return with_tokenizer(folder.write(tmp_path_factory.mktemp("launch") / "model"), demo_model)


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True)


def completion(*arguments: object, stdin: str = "") -> str:
    """What a command prints that must go well and say nothing else."""
    result = run(*arguments, "-q", stdin=stdin)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def children(pid: int) -> dict[str, int]:
    """The roles that a launch process has started; one that is being started, or a look in between, may miss some."""
    roles = {}
    for child in process_table.children(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"tsqp_shm" in words:
                roles[words[words.index(b"tsqp_shm") + 1].decode()] = child
    return roles


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def is_published(session: str) -> bool:
    try:
        Observer(session, PosixTransport(session)).close()
    except ArenaNotReady:
        return False
    return True


class Running:
    """A launch that goes on until somebody ends it."""

    def __init__(self, model: Path, session: str, *flags: str, stdin: int = subprocess.DEVNULL) -> None:
        arguments = ["launch", str(model), "--session", session, "--max-new-tokens", "8000", "--ignore-eos", *flags]
        self.session = session
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A group of its own, to be sent what a terminal sends.
            start_new_session=True,
        )
        self.roles: dict[str, int] = {}
        wait_until(self._has_both_roles, "both roles")

    def _has_both_roles(self) -> bool:
        self.roles.update(children(self.process.pid))
        # Between fork and exec a child still shows its parent's command.
        self.roles.pop("launch", None)
        return self.roles.keys() == {"tee", "gpu"}

    def wait_for_output(self) -> bytes:
        """The beginning of the completion: everything is up and a step is in progress."""
        assert self.process.stdout is not None
        beginning = os.read(self.process.stdout.fileno(), 1)
        assert beginning
        return beginning

    def end(self) -> tuple[int, str]:
        """Waits for the end. Returns the exit code and what was said on stderr."""
        _, errors = self.process.communicate()
        return self.process.returncode, errors.decode()

    def leavings(self) -> list[str]:
        shared = [str(path) for path in Path("/dev/shm").glob(f"tsqp-shm-*-{self.session}")]
        folder = sessions_folder() / self.session
        alive = [f"{role} {pid}" for role, pid in self.roles.items() if is_alive(pid)]
        return shared + [str(path) for path in (folder, *folder.glob("*")) if path.exists()] + alive


@pytest.fixture
def start(model) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start_one(session: str, *flags: str, **options: int) -> Running:
        started.append(Running(model, session, *flags, **options))
        return started[-1]

    yield start_one
    for running in started:
        for pid in (running.process.pid, *running.roles.values()):
            # By id, and only what this test has started.
            if running.process.returncode is None or is_alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        running.process.communicate()


@pytest.fixture
def next_launch_works(model) -> Callable[[str], None]:
    def launch_again(session: str) -> None:
        assert completion("launch", model, "--session", session, "--max-new-tokens", "2", "--max-model-len", "64")

    return launch_again


@pytest.mark.slow
def test_both_roles_are_fresh_processes_and_only_the_gpu_role_has_torch(start):
    running = start("fresh")
    running.wait_for_output()
    maps = {role: Path(f"/proc/{pid}/maps").read_text() for role, pid in running.roles.items()}
    assert running.roles.keys() == {"tee", "gpu"}
    assert "libtorch" in maps["gpu"]
    assert "libtorch" not in maps["tee"]
    assert "_native" in maps["tee"]
    # The same shared-memory object in both.
    arena = {
        role: {line.split()[4] for line in text.splitlines() if "/dev/shm/" in line} for role, text in maps.items()
    }
    assert arena["tee"] == arena["gpu"] != set()
    running.process.terminate()
    running.end()


ENDINGS = {
    "ctrl-c of launch": (lambda running: running.process.send_signal(signal.SIGINT), 130),
    "ctrl-c in the terminal": (lambda running: os.killpg(running.process.pid, signal.SIGINT), 130),
    "termination of launch": (lambda running: running.process.terminate(), 143),
    "quit in the terminal": (lambda running: os.killpg(running.process.pid, signal.SIGQUIT), 131),
    "hang-up of the terminal": (lambda running: os.killpg(running.process.pid, signal.SIGHUP), 129),
    "death of launch": (lambda running: running.process.kill(), -signal.SIGKILL),
    "death of the gpu role": (lambda running: os.kill(running.roles["gpu"], signal.SIGKILL), 3),
    "death of the tee role": (lambda running: os.kill(running.roles["tee"], signal.SIGKILL), 3),
}


# Signals that a terminal sends, and its end, are one to launch.
_ALIKE = ("quit in the terminal", "hang-up of the terminal")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending", [pytest.param(ending, marks=pytest.mark.long if ending in _ALIKE else ()) for ending in ENDINGS]
)
def test_nothing_is_left_after(start, next_launch_works, ending):
    act, code = ENDINGS[ending]
    running = start("ending", "-q")
    running.wait_for_output()
    assert running.leavings()
    act(running)
    ended, errors = running.end()
    assert ended == code
    assert "Traceback" not in errors
    if "role" in ending:
        assert "SIGKILL" in errors
        assert ending.split()[-2] in errors
        assert len(errors.splitlines()) == 1
    else:
        assert errors == ""
    if ended < 0:
        # There was nobody to wait for the roles: they end by themselves.
        wait_until(lambda: not running.leavings(), "the end of both roles")
    assert running.leavings() == []
    next_launch_works("ending")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["ctrl-c in the terminal", "death of launch", "death of the gpu role"])
def test_nothing_is_left_after_an_early(start, ending):
    """While the roles still import and load."""
    act, code = ENDINGS[ending]
    running = start("early", "-q")
    act(running)
    ended, errors = running.end()
    assert ended == code
    assert "Traceback" not in errors
    if ended < 0:
        wait_until(lambda: not running.leavings(), "the end of both roles")
    assert running.leavings() == []
    if "role" in ending:
        assert "SIGKILL" in errors


def states(*pids: int) -> set[str]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


# A shell with job control: it goes on when its job stops, and has it go on in turn.
SHELL = ("bash", "--norc", "-mc", '"$@"; read resumed; fg; exit $?', "bash")


@pytest.mark.slow
def test_ctrl_z_stops_the_whole_session_and_it_goes_on_and_ctrl_c_ends_it(model):
    flags = ["-q", "--session", "typed", "--max-new-tokens", "8000", "--ignore-eos", "--prompt", "the third oak"]
    with OnTerminal("launch", model, *flags, under=SHELL) as shell:
        shell.read_until(lambda: "launch" in children(shell.pid))
        launch = children(shell.pid)["launch"]
        shell.read_until(lambda: children(launch).keys() == {"tee", "gpu"} and shell.seen)
        roles = children(launch)
        for pid in (launch, *roles.values()):
            assert b"third oak" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        shell.type(b"\x1a")
        shell.read_until(lambda: states(launch, *roles.values()) == {"T"})
        seen = len(shell.seen)
        shell.type(b"\n")
        shell.read_until(lambda: len(shell.seen) > seen + 300)
        assert children(launch) == roles
        shell.type(b"\x03")
        assert shell.wait() == 130
    assert not any(is_alive(pid) for pid in roles.values())


@pytest.mark.slow
def test_closing_the_terminal_ends_both_roles(model):
    flags = ["-q", "--session", "closed", "--max-new-tokens", "8000", "--ignore-eos"]
    with OnTerminal("launch", model, *flags) as launch:
        launch.read_until(lambda: children(launch.pid).keys() == {"tee", "gpu"} and launch.seen)
        roles = children(launch.pid)
        launch.hang_up()
        assert launch.wait() == 129
    assert not any(is_alive(pid) for pid in roles.values())


@pytest.mark.slow
def test_json_is_one_object_on_stdout_and_nothing_else_is_printed(model):
    result = run("launch", model, "--json", "--prompt", "Hello there", "--max-new-tokens", "5", "--max-model-len", "64")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    facts = json.loads(result.stdout)
    assert facts["mode"] == "plain"
    assert isinstance(facts["text"], str)
    assert len(facts["token_ids"]) == 5
    assert facts["finish_reason"] == "length"
    assert facts["prefill_s"] > 0
    assert facts["decode_tokens_per_s"] > 0
    assert facts["time_to_first_token_s"] == facts["prefill_s"]
    assert facts["processes"].keys() == {"tee", "gpu"}
    for process in facts["processes"].values():
        assert process["pid"] > 0
        assert process["peak_rss_bytes"] > 0
    assert facts["arena"]["bytes"] > 0
    assert facts["doorbell"]["mode"] == "adaptive"
    assert facts["bytes"]["serialised"] == 0
    assert {row["operation"] for row in facts["operations"]} >= {"EMBED", "LM_HEAD", "SOFTMAX", "SAMPLE"}
    assert completion("launch", model, "--prompt", "Hello there", "--max-new-tokens", "5") == facts["text"] + "\n"


@pytest.mark.slow
def test_the_plain_output_has_the_completion_on_stdout_and_the_rest_on_stderr(model):
    result = run("launch", model, "-v", "--max-new-tokens", "3", "--max-model-len", "64", "--seed", "0")
    assert result.returncode == 0
    assert result.stdout == completion("launch", model, "--max-new-tokens", "3", "--max-model-len", "64")
    for said in (
        "mode  plain",
        "protects nothing",
        "--mode tee-only: ",
        "arena",
        "doorbell",
        "SOFTMAX",
        "peak memory",
        "serialised 0",
        "gpu: loaded in",
        "cut at 3 tokens; --max-new-tokens N allows more",
    ):
        assert said in result.stderr


@pytest.mark.slow
def test_the_demo_model_knows_the_capital_of_italy(demo_model):
    assert "Rome" in completion("launch", "--max-new-tokens", "6")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["gpu", "tee"])
def test_the_roles_meet_in_either_order_in_two_terminals(model, first):
    common = ["--session", f"meet-{first}", "-q"]
    flags = ["--prompt", "One two", "--max-new-tokens", "4", "--max-model-len", "64", "--dtype", "float32"]
    commands = {
        "gpu": [*COMMAND, "gpu", str(model), *common],
        "tee": [*COMMAND, "tee", str(model), *common, *flags],
    }
    started = {}
    for role in (first, *(role for role in commands if role != first)):
        started[role] = subprocess.Popen(commands[role], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if role == first == "tee":
            wait_until(lambda: is_published("meet-tee"), "the invitation")
        elif role == first:
            wait_until(lambda: "libtorch" in Path(f"/proc/{started['gpu'].pid}/maps").read_text(), "torch")
    said = {role: (*process.communicate(), process.returncode) for role, process in started.items()}
    assert said["gpu"] == ("", "", 0)
    assert said["tee"][1:] == ("", 0)
    assert said["tee"][0] == completion("launch", model, *flags)


@pytest.mark.slow
def test_prompts_come_from_a_file_or_from_standard_input(model, tmp_path):
    flags = ["--max-new-tokens", "4", "--max-model-len", "64"]
    (tmp_path / "prompt.txt").write_text("Grüße 🙂")
    expected = completion("launch", model, "--prompt", "Grüße 🙂", *flags)
    assert completion("launch", model, "--prompt-file", tmp_path / "prompt.txt", *flags) == expected
    assert completion("launch", model, "--prompt-file", "-", *flags, stdin="Grüße 🙂") == expected


@pytest.mark.slow
def test_chat_applies_the_template_and_zero_is_a_seed(model):
    flags = ["--max-new-tokens", "6", "--max-model-len", "128", "--temperature", "1", "--seed", "0"]
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    result = json.loads(run("launch", model, "--chat", "--prompt", "Hello", "--json", *flags).stdout)
    plain = json.loads(run("launch", model, "--prompt", "Hello", "--json", *flags).stdout)
    assert "im_start" in template
    assert result["prompt_tokens"] > plain["prompt_tokens"]
    assert result["seed"] == 0
    # The same seed, and so the same text, though it is 0.
    assert completion("launch", model, "--chat", "--prompt", "Hello", *flags) == result["text"] + "\n"


@pytest.mark.slow
def test_a_seed_that_was_drawn_is_told_and_repeats_the_completion(model):
    flags = [
        "--max-new-tokens",
        "12",
        "--max-model-len",
        "64",
        "--temperature",
        "1",
        "--min-p",
        "0.001",
        "--ignore-eos",
    ]
    flags += ["--presence-penalty", "0.5", "--frequency-penalty", "0.1", "--json"]
    drawn = json.loads(run("launch", model, *flags).stdout)
    # Nothing ends an answer of this model, so nothing is kept from being drawn first; a stop token would be.
    again = json.loads(run("launch", model, *flags, "--seed", str(drawn["seed"]), "--min-new-tokens", "2").stdout)
    assert again["token_ids"] == drawn["token_ids"]
    stop = drawn["token_ids"][5]
    stopped = json.loads(
        run("launch", model, *flags, "--seed", str(drawn["seed"]), "--stop-token-ids", str(stop)).stdout
    )
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    assert stopped["token_ids"] == drawn["token_ids"][: drawn["token_ids"].index(stop) + 1]


@pytest.mark.slow
def test_a_stop_string_ends_the_completion(model):
    flags = ["--max-new-tokens", "12", "--max-model-len", "64", "--prompt", "Hello"]
    whole = completion("launch", model, *flags).removesuffix("\n")
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    result = json.loads(run("launch", model, "--json", "--stop", "not there", "--stop", stop, *flags).stdout)
    assert (result["text"], result["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@pytest.mark.slow
def test_an_interactive_conversation_remembers_its_turns(demo_model):
    turns = "What is the capital of France?\n\nAnd which river flows through it?\n"
    # In bfloat16 the first word is nearly a tie.
    flags = ("--interactive", "--dtype", "float32", "--max-new-tokens", "24")
    answers = completion("launch", demo_model, *flags, stdin=turns)
    first, second = answers.split("\n")[0], answers[answers.index("\n") + 1 :]
    assert "Paris" in first
    # Only the first turn says what "it" is.
    assert "France" in second


@pytest.mark.slow
def test_a_gpu_process_that_dies_is_replaced_and_the_output_is_the_same(start, model):
    flags = ["--max-new-tokens", "1000", "--dtype", "float32"]
    expected = completion("launch", model, *flags, "--ignore-eos")
    running = start("again", *flags, "--restart-gpu", "1", "-v")
    first = running.wait_for_output()
    os.kill(running.roles["gpu"], signal.SIGKILL)
    rest, errors = running.process.communicate()
    assert running.process.returncode == 0
    assert (first + rest).decode() == expected
    assert "the gpu process died (signal SIGKILL)" in errors.decode()
    assert "restart 1 of 1" in errors.decode()
    assert "GPU process restarted 1 time" in errors.decode()
    assert running.leavings() == []


@pytest.mark.slow
def test_ctrl_c_in_a_conversation_cancels_the_answer_and_asks_again(start, next_launch_works):
    flags = ["--interactive", "--max-new-tokens", "1500", "--max-model-len", "4096"]
    running = start("turns", *flags, stdin=subprocess.PIPE)
    asked = running.process.stdin
    asked.write(b"One\n")
    asked.flush()
    running.wait_for_output()
    os.killpg(running.process.pid, signal.SIGINT)
    asked.write(b"Two\n")
    code, errors = running.end()
    assert code == 0
    ends = [line.split()[1:3] for line in errors.splitlines() if line.startswith("cut ")]
    assert ends == [["by", "Ctrl-C"], ["at", "1,500"]]
    assert running.leavings() == []
    next_launch_works("turns")


@pytest.mark.slow
def test_zero_in_a_flag_reaches_the_role(model):
    result = run("launch", model, "--json", "--spin-us", "0", "--yield-us", "0", "--max-new-tokens", "4")
    waits = json.loads(result.stdout)["doorbell"]["waits"]
    # Never spun nor yielded: what was not ready at once was slept for.
    assert waits.keys() <= {"ready", "parked"}
