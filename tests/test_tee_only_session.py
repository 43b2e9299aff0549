"""A session without a GPU process: what it takes, what it says of itself, and that it needs and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from commands import assert_one_line, run
from models import RandomModel, random_token_ids, token_ids, with_bytes_as_tokens
from pseudo_terminal import OnTerminal
from safetensors.torch import load_file, save_file

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.config import EngineConfig, environment_variable
from tsqp_shm.doctor.examination import examine
from tsqp_shm.errors import ConfigError, LimitError, NumericsError, SessionFolderError, TsqpError, UnsupportedModel
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.modes import MODES
from tsqp_shm.sessions import Survey, clean_sessions, print_sessions
from tsqp_shm.shm.local import LocalTransport
from tsqp_shm.shm.observer import Observer
from tsqp_shm.shm.posix.folder import PAGE_FILE, sessions_folder
from tsqp_shm.shm.posix.register import PosixRegister
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.tee import bring_up
from tsqp_shm.tee.batch import Chunk
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.updates import Update

MODE = MODES["tee-only"]
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
# What is said of two processes and what lies between them.
OF_TWO = {"arena", "doorbell", "device", "transfer", "bytes", "gpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    fields = {"vocab_size": 256, "max_position_embeddings": 8192}
    return with_bytes_as_tokens(RandomModel("llama", fields).write(tmp_path_factory.mktemp("alone") / "model"))


@pytest.fixture
def llm(model) -> Iterator[LLM]:
    with LLM(model, mode="tee-only", max_model_len=256, max_num_seqs=2) as llm:
        yield llm


def launched(model: Path, *flags: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tsqp_shm", "launch", model, "--mode", "tee-only", *flags]
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


# What it takes.


@pytest.mark.parametrize("name", [field.name for field in fields(EngineConfig) if MODE.refusal(field.name)])
def test_a_setting_that_the_mode_does_not_take_is_refused_at_its_default_too(name):
    default = getattr(EngineConfig(), name)
    given = "ipc:///tmp/a" if name == "endpoint" else 1 if default is None else default
    with pytest.raises(ConfigError, match=f"^{name.removesuffix('_s')}: got .*, expected none, as mode tee-only"):
        EngineConfig.chosen(None, {"mode": "tee-only", name: given}, {})
    with pytest.raises(ConfigError, match="expected none, as mode tee-only"):
        EngineConfig.chosen(EngineConfig(mode="tee-only"), {name: given}, {})


def test_a_config_of_two_processes_does_not_become_one_without_them_silently():
    with pytest.raises(ConfigError, match=r"^device: got 'cpu', expected none, as mode tee-only has no GPU process"):
        EngineConfig.chosen(EngineConfig(device="cpu"), {"mode": "tee-only"}, {})


def test_what_it_shares_with_other_modes_it_takes(model):
    taken = {"max_model_len": 64, "max_num_seqs": 3, "max_batch_tokens": 32, "block_rows": 16, "tee_threads": 1}
    with LLM(model, mode="tee-only", session="taken", **taken) as llm:
        assert llm.bring_up()["session"] == "taken"
        assert llm.bring_up()["threads"] == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtype", "float32"], "dtype: got 'float32', expected none, as mode tee-only computes in w8, cache bf16"),
        (["--timeout", "60"], "timeout: got 60.0, expected none, as mode tee-only has no GPU process"),
    ],
)
def test_a_flag_that_the_mode_does_not_take_is_one_line(model, flags, said):
    assert_one_line(launched(model, *flags), 2, said)


def test_an_environment_variable_that_the_mode_does_not_take_is_passed_over(monkeypatch):
    monkeypatch.setenv(environment_variable("mode"), "tee-only")
    monkeypatch.setenv(environment_variable("device"), "nonsense")
    monkeypatch.setenv(environment_variable("tee_threads"), "3")
    config = EngineConfig.from_environment({})
    assert (config.mode, config.device, config.tee_threads) == ("tee-only", "auto", 3)
    # It is set for whatever is started there, and a mode that takes it gets it.
    with pytest.raises(ConfigError, match=r"^device: got 'nonsense'"):
        EngineConfig.from_environment({"mode": "plain"})


@pytest.mark.parametrize("argument", [{"start_gpu": False}, {"start_gpu": print}, {"transport": LocalTransport()}])
def test_what_leads_to_another_process_is_refused(model, argument):
    with pytest.raises(ConfigError, match="expected none, as mode tee-only has no GPU process"):
        LLM(model, mode="tee-only", **argument)


@pytest.mark.parametrize(("mode", "leads_to"), [("plain", PosixRegister()), ("tee-only", LocalTransport())])
def test_a_mode_does_not_run_over_what_is_another_ones(model, mode, leads_to):
    with Checkpoint.open(model) as checkpoint, pytest.raises(ConfigError, match=f"^transport: .* as mode {mode} has"):
        Runtime(ModelSpec.from_folder(model), checkpoint, EngineConfig(mode=mode), leads_to, None)


def test_there_are_no_roles_to_play_apart(model):
    assert_one_line(run("tee", model, "--mode", "tee-only"), 2, "tsqp-shm launch runs this one")


def test_a_gpu_process_is_told_that_a_session_has_none(llm):
    session = llm.bring_up()["session"]
    with pytest.raises(ConfigError, match=f"session: got '{session}', expected one whose mode has a GPU process"):
        PosixTransport(session).join(20.0, print)


def test_all_cores_are_the_tees():
    cores = len(os.sched_getaffinity(0))
    assert EngineConfig(mode="tee-only").threads() == (cores, 0)


# What it says of itself.


def test_nothing_is_said_of_an_arena_a_doorbell_or_a_gpu_process(llm):
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    for facts in (llm.bring_up(), llm.stats()):
        assert not OF_TWO & facts.keys()
        assert (facts["mode"], facts["arithmetic"]) == ("tee-only", "w8, cache bf16")
        assert facts["processes"].keys() == {"tee"}
    assert {row["side"] for row in llm.stats()["operations"]} == {"tee"}


def test_launch_prints_the_modes_line_and_its_json_has_the_mode(model):
    shown = launched(model, "--max-new-tokens", "3", "--ignore-eos")
    assert shown.returncode == 0
    assert MODE.line.removeprefix("mode ") in shown.stderr
    assert not [word for word in ("arena", "doorbell", "gpu ", "serialised") if word in shown.stderr]
    result = launched(model, "--max-new-tokens", "3", "--ignore-eos", "--json")
    facts = json.loads(result.stdout)
    assert (result.returncode, result.stderr, facts["mode"]) == (0, "", "tee-only")
    assert facts["text"] + "\n" == shown.stdout
    assert not OF_TWO & facts.keys()


def test_ps_shows_its_mode_and_no_arena(llm, capsys):
    (session,) = Survey.take().sessions
    assert (session.mode, session.arena_bytes, session.tee_pid, session.pids) == ("tee-only", 0, os.getpid(), [])
    print_sessions(json_output=False)
    words = capsys.readouterr().out.splitlines()[1].split()
    assert words[:3] == [session.name, "alive", "tee-only"]


def test_top_shows_what_it_does_and_has_done(llm):
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    session = llm.bring_up()["session"]
    facts = json.loads(run("top", session, "--once", "--json", "--interval", "0.2").stdout)
    assert (facts["session"], facts["mode"]) == (session, "tee-only")
    assert facts["totals"] == {"steps": 8, "tokens": 10, "generated": 8}
    assert facts["sequences"] == {"running": 0, "waiting": 0, "of": 2}
    assert facts["tee"]["doing"] == "idle: nothing to complete"
    assert not {"gpu", "doorbell", "doorbells_per_s", "slots", "round_trip_p50_us"} & facts.keys()
    table = run("top", "--once", "--interval", "0.2").stdout
    assert "mode tee-only" in table
    assert "heartbeat" not in table


def test_top_ends_with_the_session(llm):
    process = subprocess.Popen(
        [sys.executable, "-m", "tsqp_shm", "top", "--json", "--interval", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert json.loads(process.stdout.readline())["mode"] == "tee-only"
    llm.close()
    _, said = process.communicate()
    assert (process.returncode, said.count("\n"), "has ended" in said) == (0, 1, True)


def test_doctor_examines_nothing_that_the_mode_does_not_need(model):
    findings = {finding.check: finding for finding in examine(model, EngineConfig(mode="tee-only"))}
    assert MODE.protects in findings["mode"].found
    assert "TEE process" in findings["model"].found
    assert not [word for word in ("arena", "GPU") if word in findings["model"].found]
    assert not {"torch", "device", "products", "shared memory", "memory lock", "doorbell"} & findings.keys()


def test_env_says_which_mode_a_start_takes(monkeypatch):
    monkeypatch.setenv(environment_variable("mode"), "tee-only")
    assert MODE.line in run("env").stdout


def test_a_trace_is_of_the_one_process(model, tmp_path):
    result = launched(model, "--max-new-tokens", "3", "-q", "--trace", tmp_path / "trace.json")
    assert (result.returncode, result.stderr) == (0, "")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} and "RMSNORM" in {event["name"] for event in events}


# The page, by which it is seen from outside.


def page_of(llm: LLM) -> Path:
    return sessions_folder() / llm.bring_up()["session"] / PAGE_FILE


def test_a_step_does_not_need_the_page(llm):
    page = page_of(llm)
    expected = token_ids(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False))
    os.truncate(page, 0)
    assert token_ids(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)) == expected
    page.unlink()
    assert token_ids(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)) == expected


def test_a_page_holds_counts_and_the_models_shape_and_no_more(llm):
    """No prompt, no token: as many bytes as the words of an arena's header and control page."""
    llm.generate([[201] * 40], GREEDY, use_tqdm=False)
    page = page_of(llm).read_bytes()
    with closing(Observer("page", PosixTransport(llm.bring_up()["session"]))) as observer:
        progress = observer.look().progress
        known = observer.invitation.pack()
    assert known in page
    assert len(bytes(page.replace(known, b"")).replace(b"\0", b"")) < 8 * (len(progress) + 3)


def test_what_no_session_has_made_under_its_name_is_left_alone(model):
    root = sessions_folder()
    (root / "laid").mkdir()
    (root / "laid" / "page").write_text("mine")
    with pytest.raises(SessionFolderError, match="no session has made"):
        LLM(model, mode="tee-only", session="laid")
    assert (root / "laid" / "page").read_text() == "mine"
    (root / "laid" / "page").unlink()
    (root / "laid").rmdir()


def test_a_forked_child_neither_answers_nor_writes_nor_ends_it(llm, forked):
    before = page_of(llm).read_bytes()

    def run_in_child():
        with pytest.raises(TsqpError, match="belongs to process"):
            llm.generate([[1]])
        llm.close()

    forked(run_in_child).join()
    assert page_of(llm).read_bytes() == before
    assert len(token_ids(llm.generate([[1]], GREEDY, use_tqdm=False))[0]) == 8


# That it needs nothing.

MISSING_SHM = """
mount -t tmpfs tmpfs /mnt
for name in null zero urandom random; do touch /mnt/$name; mount --bind /dev/$name /mnt/$name; done
ln -s /proc/self/fd /mnt/fd
mount --move /mnt /dev
ulimit -l 0
"""
# Stands before the program as a site would: what is imported of these is an error that shows.
WITHOUT_PACKAGES = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "zmq", "rich", "safetensors", "gguf"}:
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
from tsqp_shm.cli import main
sys.exit(main())
"""


def test_it_runs_without_shared_memory_and_without_a_lock_on_any(in_namespace, model):
    command = [sys.executable, "-m", "tsqp_shm", "launch", model, "--mode", "tee-only", "--max-new-tokens", "3", "-q"]
    result = in_namespace(MISSING_SHM, "setpriv", "--bounding-set=-ipc_lock", *command)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()


def test_it_imports_neither_torch_nor_transformers_nor_zmq(model):
    command = [sys.executable, "-c", WITHOUT_PACKAGES, "launch", model, "--mode", "tee-only", "--max-new-tokens", "3"]
    result = subprocess.run([*map(str, command), "-q"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()


@pytest.mark.long
def test_it_runs_where_only_the_base_package_is_installed(model, tmp_path):
    """In an environment of its own, with what `pip install tsqp-shm` brings and nothing else."""
    from importlib import metadata

    root = Path(__file__).parent.parent
    python = tmp_path / "bare" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "bare"], check=True)
    base = [line for line in metadata.requires("tsqp-shm") or () if "extra ==" not in line]
    assert not [line for line in base if line.startswith("torch")]
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "-c",
        root / "scripts/constraints.txt",
    ]
    subprocess.run([*install, *base], check=True)
    installed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    assert not {"torch", "transformers"} & {package["name"] for package in json.loads(installed)}
    result = subprocess.run(
        [python, "-m", "tsqp_shm", "launch", model, "--mode", "tee-only", "--max-new-tokens", "5", "--ignore-eos"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert MODE.line.removeprefix("mode ") in result.stderr


# That it leaves nothing.


def leavings(session: str) -> list[Path]:
    folder = sessions_folder() / session
    return [path for path in (folder, *folder.glob("*")) if path.exists()]


@contextlib.contextmanager
def running(model: Path, session: str) -> Iterator[subprocess.Popen]:
    """A launch that goes on until somebody ends it."""
    flags = ["--session", session, "--max-new-tokens", "8000", "--ignore-eos", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tsqp_shm", "launch", str(model), "--mode", "tee-only", *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout.read(1)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(model, number):
    with running(model, "ended") as process:
        process.send_signal(number)
        _, errors = process.communicate()
        assert (process.returncode, errors, leavings("ended")) == (128 + number, b"", [])


def test_what_a_killed_one_leaves_is_shown_as_dead_and_removed(model, capsys):
    with running(model, "killed") as process:
        process.kill()
        process.wait()
        (session,) = Survey.take().sessions
        assert (session.name, session.is_alive, session.mode) == ("killed", False, "tee-only")
        assert "is dead" in run("top", "killed").stderr
        assert clean_sessions(dry_run=False) == 0
        assert capsys.readouterr().out == "removed killed\n"
        assert leavings("killed") == []


def test_ctrl_z_stops_it_and_it_goes_on(model):
    shell = ("bash", "--norc", "-mc", '"$@"; read resumed; fg; exit $?', "bash")
    flags = ["--mode", "tee-only", "-q", "--max-new-tokens", "8000", "--ignore-eos"]
    with OnTerminal("launch", model, *flags, under=shell) as terminal:
        terminal.read_until(lambda: terminal.seen)
        terminal.type(b"\x1a")
        terminal.read_until(lambda: b"Stopped" in terminal.seen)
        terminal.type(b"\n")
        seen = len(terminal.seen)
        terminal.read_until(lambda: len(terminal.seen) > seen + 300)
        terminal.type(b"\x03")
        assert terminal.wait() == 130


# In the middle of a step.


class EndlessEngine:
    """Its steps last until something ends them: between two operations they only look."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self.begun = 0

    def lack_pads(self, chunks: Sequence[Chunk]) -> dict[int, TsqpError]:
        return {}

    def forward(self, chunks: Sequence[Chunk], take: Callable[[int, np.ndarray], None]) -> None:
        self.begun += 1
        while True:
            self._look()
            time.sleep(0.001)


@pytest.fixture
def endless(model, monkeypatch) -> Iterator[LLM]:
    monkeypatch.setitem(
        bring_up.ALONE_ENGINES,
        "tee-only",
        lambda *loaded: lambda slots, look, stats: EndlessEngine(look),
    )
    with LLM(model, mode="tee-only", max_model_len=64) as llm:
        yield llm


def test_a_deadline_ends_the_wait_of_who_has_asked_in_the_middle_of_a_step(endless):
    (late,) = endless.generate([[1]], SamplingParams(deadline_s=0.1, temperature=0), use_tqdm=False)
    assert late.outputs[0].finish_reason == "deadline"


def test_closing_ends_a_step(endless):
    stream = endless.stream([1], GREEDY)
    endless.runtime.add([endless.start([2], GREEDY)], print)
    while not endless.runtime.connection.engine.begun:
        time.sleep(0.01)
    endless.close()
    with pytest.raises(TsqpError, match="this LLM is closed"):
        next(stream)


def test_a_fault_in_a_step_is_an_equal_error_for_each_caller(model, monkeypatch):
    def fail(slots, look, statistics):
        class Failing:
            def lack_pads(self, chunks):
                return {}

            def forward(self, chunks, take):
                raise MemoryError("no room")

        return Failing()

    monkeypatch.setitem(bring_up.ALONE_ENGINES, "tee-only", lambda *loaded: fail)
    with LLM(model, mode="tee-only", max_model_len=64) as llm:
        for _ in range(2):
            with pytest.raises(TsqpError, match=r"^a step failed: MemoryError: no room"):
                llm.generate([[1]], GREEDY, use_tqdm=False)
        assert llm.stats()["mode"] == "tee-only"


def test_an_engine_that_cannot_be_made_leaves_nothing(model, monkeypatch):
    def fail(slots, look, statistics):
        raise MemoryError("no room")

    monkeypatch.setitem(bring_up.ALONE_ENGINES, "tee-only", lambda *loaded: fail)
    with pytest.raises(LimitError, match="too little memory"):
        LLM(model, mode="tee-only", session="unmade")
    assert leavings("unmade") == []


def test_several_ask_at_once_and_share_batches(llm):
    prompts = [list(random_token_ids(5 + index, vocab_size=256, seed=index)) for index in range(6)]
    alone = [token_ids(llm.generate([prompt], GREEDY, use_tqdm=False))[0] for prompt in prompts]
    assert token_ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == alone
    assert llm.logits(prompts[0]).argmax(1)[-1] == alone[0][0]


# What goes wrong in it.


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Path:
    """A model to which one token is no number."""
    folder = RandomModel("llama").write(tmp_path_factory.mktemp("overflowing") / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_no_numbers_are_refused_by_name(overflowing):
    with pytest.raises(UnsupportedModel, match=r"model\.embed_tokens\.weight = .*NaN"):
        LLM(overflowing, mode="tee-only")


@pytest.mark.parametrize("scores", [{}, {"logprobs": 2}, {"logprobs": 0, "prompt_logprobs": 0}], ids=str)
def test_a_request_whose_numbers_are_none_ends_alone(overflowing, monkeypatch, scores):
    monkeypatch.setattr("tsqp_shm.tee.tee_only.require_finite", lambda tensor: tensor)
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0, **scores)
    good, bad = [3, 4, 5], [3, 7, 5, 6]
    with LLM(overflowing, mode="tee-only", max_model_len=64) as llm:
        expected = token_ids(llm.generate([good], params))
        completions = [llm.start(prompt, params) for prompt in (good, bad, good)]
        updates: SimpleQueue[Update] = SimpleQueue()
        llm.runtime.add(completions, updates.put)
        for completion in completions:
            while completion.finish_reason is None:
                with contextlib.suppress(NumericsError):
                    llm.runtime.next_update(updates)
        assert [completion.finish_reason for completion in completions] == ["length", "error", "length"]
        assert completions[1].token_ids == []
        assert [completions[0].token_ids] == [completions[2].token_ids] == expected
        with pytest.raises(NumericsError, match="logits of this request are NaN or infinity"):
            llm.generate([bad], params)
        assert token_ids(llm.generate([good], params)) == expected


def test_too_little_memory_is_one_line(model):
    script = 'ulimit -v 3000000; exec "$@"'
    launch = [sys.executable, "-m", "tsqp_shm", "launch", model, "--mode", "tee-only", "-q", "--max-num-seqs", 1000]
    command = ["bash", "-c", script, "bash", *map(str, [*launch, "--max-model-len", 8192])]
    refused = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert_one_line(refused, 1, "too little memory", "--max-num-seqs", "tsqp-shm inspect")


def test_what_can_be_refused_at_once_is_so_before_the_model_is_read(tmp_path):
    refused = launched(tmp_path / "no model", "--prompt-file", "/nope", "-q")
    assert_one_line(refused, 2, "prompt-file", "/nope")
