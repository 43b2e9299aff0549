"""The benchmark runs every contender, says what it promised, refuses what cannot be, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from arenas import arena_of
from models import RandomModel, model_folder, random_token_ids, relative_distance, transformers_logits
from process_table import children

from tsqp_shm import _native
from tsqp_shm.bench import shapes
from tsqp_shm.bench.arithmetic import prefill_flops
from tsqp_shm.bench.cases import OURS, Job, Turn
from tsqp_shm.bench.child import processor_seconds
from tsqp_shm.bench.contenders import KINDS, SCRIPTS, RunningContender, parse_contenders, require_installed
from tsqp_shm.bench.kernel_cases import kernel_cases, kernel_plan
from tsqp_shm.bench.report import make_rows
from tsqp_shm.errors import ConfigError, ContenderFailed
from tsqp_shm.llm import LLM
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm.posix.session import Session
from tsqp_shm.shm.slots import open_slots
from tsqp_shm.tee.sampling_params import SamplingParams

ROW_KEYS = {
    *("case", "contender", "mode", "sequences", "prompt_tokens", "per", "runs", "median_s", "min_s", "max_s", "spread"),
    *("samples_s", "tokens_per_s", "cpu_s_per_token", "peak_bytes", "bytes_to_gpu", "bytes_to_tee", "doorbells"),
    *("operations", "tee_busy_share", "gpu_busy_share", "ratios", "speedup_over_one_sequence", "growth"),
}
ALONE = "tsqp-shm-tee-only"
ROLES = {OURS: {"tee", "gpu"}, "transformers-sdpa": {"whole"}, "serialized": {"client", "server"}}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tsqp_shm", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def job_of(contender: str, model: str, tokens: int = 8, **fields: object) -> Job:
    defaults = {
        "threads": 1,
        "dtype": "float32",
        "device": "cpu",
        "timeout_s": 30.0,
    }
    return Job(contender, model, (Turn("prefill", 1, tokens),), **{**defaults, **fields})


@pytest.fixture(scope="module")
def tiny_model() -> str:
    return str(model_folder(RandomModel("llama")))


@pytest.fixture(scope="module")
def prefill(tiny_model, tmp_path_factory, runtime_folder):
    pytest.importorskip("msgpack")
    folder = tmp_path_factory.mktemp("bench")
    drawn = importlib.util.find_spec("matplotlib") is not None
    run = bench(
        *("prefill", tiny_model, "--tokens", "8", "--runs", "2", "--threads", "1", "--device", "cpu"),
        *("--vs", "transformers-sdpa,serialized", "--json", str(folder / "bench.json")),
        *(("--plot", str(folder / "bench.png")) if drawn else ()),
    )
    assert run.returncode == 0, run.stderr
    document = json.loads((folder / "bench.json").read_text())
    return {**document, "table": run.stdout, "errors": run.stderr, "plot": folder / "bench.png"}


def row_of(document, contender):
    (row,) = [row for row in document["rows"] if row["contender"] == contender]
    return row


def test_every_contender_has_a_row_with_exactly_the_promised_keys(prefill):
    assert [row["contender"] for row in prefill["rows"]] == list(ROLES)
    assert all(row.keys() == ROW_KEYS for row in prefill["rows"])


def test_a_row_names_its_mode(prefill):
    modes = {row["contender"]: row["mode"] for row in prefill["rows"]}
    assert modes == {OURS: "plain", "transformers-sdpa": None, "serialized": None}


def test_of_a_mode_it_says_nothing_that_the_mode_has_not(tiny_model, tmp_path):
    run = bench(
        *("prefill", tiny_model, "--mode", "tee-only", "--vs", "none", "--tokens", "8", "--runs", "1"),
        *("--threads", "1", "--json", str(tmp_path / "alone.json")),
    )
    assert run.returncode == 0, run.stderr
    (alone,) = json.loads((tmp_path / "alone.json").read_text())["rows"]
    assert (alone["contender"], alone["mode"], set(alone["peak_bytes"])) == (ALONE, "tee-only", {"tee"})
    assert {alone[name] for name in ("doorbells", "bytes_to_gpu", "bytes_to_tee", "gpu_busy_share")} == {None}
    assert alone["tee_busy_share"] > 0
    assert f"{ALONE} computes in w8, cache bf16" in run.stdout


def test_the_warm_up_is_not_counted(prefill):
    assert all(row["runs"] == len(row["samples_s"]) == 2 for row in prefill["rows"])


def test_a_row_has_the_ratio_to_each_other_contender(prefill):
    for row in prefill["rows"]:
        assert row["ratios"].keys() == ROLES.keys() - {row["contender"]}


@pytest.mark.parametrize("contender", ROLES)
def test_every_process_has_a_peak(prefill, contender):
    peaks = row_of(prefill, contender)["peak_bytes"]
    assert peaks.keys() == ROLES[contender]
    assert all(peak > 0 for peak in peaks.values())


@pytest.mark.parametrize("contender", [OURS, "serialized"])
def test_a_split_contender_says_what_crossed_and_which_side_worked(prefill, contender):
    row = row_of(prefill, contender)
    assert min(row["bytes_to_gpu"], row["bytes_to_tee"], row["doorbells"]) > 0
    assert {operation["side"] for operation in row["operations"]} == {"tee", "gpu"}
    assert 0 < row["tee_busy_share"] <= 1
    assert 0 < row["gpu_busy_share"] <= 1


def test_the_serialized_baseline_makes_the_calls_of_the_first_system(prefill):
    layers = ModelSpec.from_folder(model_folder(RandomModel("llama"))).num_layers
    assert row_of(prefill, "serialized")["doorbells"] == 2 + 6 * layers


def test_an_unsplit_contender_has_no_border(prefill):
    row = row_of(prefill, "transformers-sdpa")
    assert row["bytes_to_gpu"] is row["bytes_to_tee"] is row["doorbells"] is row["tee_busy_share"] is None


def test_the_environment_says_what_was_measured_on(prefill):
    expected = {"processor", "cores", "load_1m", "python", "torch", "transformers", "commit"}
    assert expected <= prefill["environment"].keys()
    assert prefill["settings"]["threads"] == 1


def test_there_is_no_progress_in_a_pipe(prefill):
    assert prefill["errors"] == ""
    assert all(name in prefill["table"] for name in ROLES)


def test_the_plot_is_a_png(prefill):
    pytest.importorskip("matplotlib")
    assert prefill["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_batch_measures_eight_sequences_against_one(tiny_model):
    run = bench("batch", tiny_model, "--tokens", "4", "--runs", "1", "--threads", "1", "--vs", "none", "--json", "-")
    assert run.returncode == 0, run.stderr
    one, eight = json.loads(run.stdout)["rows"]
    assert (one["sequences"], eight["sequences"], one["per"]) == (1, 8, "token")
    assert one["speedup_over_one_sequence"] is None
    assert eight["speedup_over_one_sequence"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefil"], "prefil"),
        (["prefill", "--tokens", "0"], "tokens: got 0"),
        (["prefill", "--tokens", "8,x"], "list of whole numbers"),
        (["decode", "--tokens", "8,16"], "tokens: got '8,16', expected one length for decode"),
        (["prefill", "--sweep", "colour=1"], "invalid setting, tile-rows=N,... or"),
        (["prefill", "--sweep", "tile-rows=0"], "tile_rows: got 0"),
        (["kernels", "--shapes", "gpt-5"], "shape: got 'gpt-5'"),
        (["kernels", "--threads", "0"], "threads: got 0"),
        (["latency", "--runs", "0"], "runs: got 0"),
        (["waits", "--spin-us", "-1"], "spin-us: got -1"),
        (["waits", "--plot", "waits.pdf"], "a name that ends in .png"),
        (["launch", "--vs", "serialized"], "prefill only"),
        (["prefill", "--runs", "0"], "runs: got 0"),
        (["prefill", "--vs", "vllm"], "vs: got 'vllm', expected transformers-sdpa, transformers-eager, serialized"),
        (["decode", "--vs", "serialized"], "prefill only"),
        (["prefill", "--shape", "gpt-5"], "shape: got 'gpt-5', expected llama-3.2-1b"),
        (["prefill", "--shape", "llama-3.2-1b", "--layers", "17"], "layers: got 17"),
        (["prefill", "--layers", "2"], "a --shape to take layers of"),
        (["prefill", "somewhere", "--shape", "llama-3.2-1b"], "either MODEL or --shape"),
        (["prefill", "--json", "/nowhere/at/all.json"], "a file in a folder that exists"),
        (["prefill", "--plot", "bench.pdf"], "a name that ends in .png"),
        (["prefill", "--dtype", "int4"], "dtype: got 'int4'"),
        (["modes", "--tokens", "8,8"], "tokens: got '8,8', expected three lengths, for prefill, decode, batch"),
        (["modes", "--tokens", "8,0,8"], "tokens: got 0"),
        (["modes", "--mode", "plain,open"], "mode: got 'open'"),
        (["modes", "--pad-threads", "0"], "pad_threads: got 0"),
        (["modes", "--new-tokens", "0"], "new_tokens: got 0"),
        (["modes", "--assume", "colour=3"], "assume: got 'colour=3', expected NAME=X"),
        (["modes", "--plot", "modes.pdf"], "a name that ends in .png"),
        (["prefill", "--mode", "plain,verified"], "mode: got 'plain,verified'"),
    ],
)
def test_what_cannot_be_is_a_usage_error_in_one_line(arguments, message, capsys):
    from tsqp_shm.cli import main

    try:
        code = main(["bench", *arguments])
    except SystemExit as end:
        code = end.code
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_model):
    run = bench("prefill", tiny_model, "--tokens", "8,512")
    assert run.returncode == 2
    assert "the model knows 512 positions" in run.stderr


@pytest.mark.parametrize(("contender", "package"), [("transformers-eager", "transformers"), ("serialized", "msgpack")])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, contender, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ContenderFailed, match=f"needs {package}: pip install"):
        require_installed(contender)


def test_vs_none_is_no_contender():
    assert parse_contenders("none", 0) == []


def test_a_contender_that_cannot_load_says_why_in_its_own_words(tmp_path):
    contender = RunningContender.start(job_of(OURS, str(tmp_path)))
    try:
        with pytest.raises(ContenderFailed, match=r"config\.json"):
            contender.wait_ready(30)
    finally:
        contender.stop()


def test_a_contender_that_dies_is_named_with_its_last_words(tiny_model, monkeypatch):
    broken = ("-c", "import sys; sys.exit('out of luck')")
    monkeypatch.setitem(KINDS, OURS, type(KINDS[OURS])(broken, ()))
    contender = RunningContender.start(job_of(OURS, tiny_model))
    try:
        with pytest.raises(ContenderFailed, match=r"(?s)tsqp-shm: it ended with exit code 1.*out of luck"):
            contender.wait_ready(30)
    finally:
        contender.stop()


def test_a_contender_that_does_not_answer_is_given_up_after_a_deadline(tiny_model, monkeypatch):
    silent = ("-c", "import signal; signal.pause()")
    monkeypatch.setitem(KINDS, OURS, type(KINDS[OURS])(silent, ()))
    monkeypatch.setattr("tsqp_shm.bench.contenders.POLITE_STOP_S", 0.1)
    monkeypatch.setattr("tsqp_shm.bench.contenders.FIRM_STOP_S", 0.1)
    contender = RunningContender.start(job_of(OURS, tiny_model))
    try:
        with pytest.raises(ContenderFailed, match=r"no answer within 0\.05 s"):
            contender.wait_ready(0.05)
    finally:
        contender.stop()


# A contender that talks on its socket as it likes.
SPEAKS = """
import os, socket, sys, threading, time
connection = socket.socket(fileno=int(sys.argv[-1]))
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("while True: connection.send(b'x'); time.sleep(0.001)", r"no answer within 1 s"),
        ("while True: connection.send(bytes(65536))", "an answer of more than"),
        ("connection.send(b'\\xff{\\n'); connection.recv(1)", "something else than it was asked"),
        ("connection.send(b'[' * 500000 + b'\\n'); connection.recv(1)", "something else than it was asked"),
        ("connection.send(b'{\"ready\": 3}\\n'); connection.recv(1)", "something else than it was asked"),
        ('connection.send(b\'{"failed": "\\\\u001b[2J"}\\n\'); time.sleep(60)', r"\\x1b\[2J"),
        (
            "print(('x' * 999 + chr(10)) * 1300, flush=True); sys.exit('\x1b[2J last')",
            r"(?s)exit code 1.*\\x1b\[2J last",
        ),
        (
            "import subprocess; subprocess.Popen(['sleep', '300']); sys.exit('left one behind')",
            r"(?s)exit code 1.*left one behind",
        ),
    ],
    ids=["drips", "floods", "no JSON", "deep JSON", "no facts", "escapes", "prints much", "a grandchild"],
)
def test_whatever_a_contender_says_is_one_error_in_bounded_time_and_memory(tiny_model, monkeypatch, code, said):
    monkeypatch.setitem(KINDS, OURS, type(KINDS[OURS])(("-c", SPEAKS + code), ()))
    monkeypatch.setattr("tsqp_shm.bench.contenders.POLITE_STOP_S", 0.1)
    monkeypatch.setattr("tsqp_shm.bench.contenders.FIRM_STOP_S", 1.0)
    contender = RunningContender.start(job_of(OURS, tiny_model))
    try:
        with pytest.raises(ContenderFailed, match=said) as caught:
            contender.wait_ready(1 if code.endswith("(0.001)") else 30)
        assert len(str(caught.value)) < 10_000
    finally:
        contender.stop()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(signal_number, tiny_model):
    command = [sys.executable, "-m", "tsqp_shm", "bench", "prefill", tiny_model, "--runs", "1000000", "--tokens", "8"]
    process = subprocess.Popen([*command, "--vs", "none"], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        # The contender has a process of its own once it plays the TEE, and then a GPU process.
        while process.poll() is None and not [pid for child in children(process.pid) for pid in children(child)]:
            os.sched_yield()
        process.send_signal(signal_number)
        assert process.wait(timeout=30) == 128 + signal_number
    finally:
        process.kill()
        process.wait()


def test_processor_time_is_that_of_the_process_itself():
    before_s = processor_seconds(os.getpid())
    while processor_seconds(os.getpid()) == before_s:
        sum(range(10_000))
    assert processor_seconds(os.getpid()) <= sum(os.times()[:2]) + 0.02


def test_a_median_a_spread_and_a_ratio_are_those_of_the_samples():
    def answers(*seconds: float) -> list[dict[str, object]]:
        return [{"seconds": s, "tokens": 8, "cpu_s": 2 * s, "peak_bytes": {"whole": 1}} for s in seconds]

    turn = Turn("prefill", 1, 8)
    ours, other = make_rows({("a", turn): answers(1.0, 3.0, 2.0), ("b", turn): answers(4.0)})
    assert (ours["median_s"], ours["spread"], ours["ratios"], other["ratios"]) == (2.0, 1.0, {"b": 0.5}, {"a": 2.0})
    assert ours["cpu_s_per_token"] == 0.5
    assert ours["tokens_per_s"] == 4.0


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_shape_has_the_size_of_its_name(name):
    network = Network.of(ModelSpec.from_config(shapes.shape_config(name)))
    parameters = sum(int(np.prod(shape)) for _, shape in network.tensors())
    billions = {
        "smollm2-135m": 0.13,
        "llama-3.2-1b": 1.24,
        "llama-3.1-8b": 8.03,
        "llama-3.1-70b": 70.55,
        "qwen2.5-0.5b": 0.49,
    }
    assert round(parameters / 1e9, 2) == billions[name]


@pytest.mark.parametrize(("name", "tied"), [("llama-3.1-8b", False), ("qwen2.5-0.5b", True)])
def test_a_slice_of_a_shape_is_a_model_for_transformers_and_for_us(name, tied, tmp_path):
    small = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    config = {**shapes.shape_config(name, layers=2), **small, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    shapes.write_shape(tmp_path, config)
    logits = transformers_logits(tmp_path, random_token_ids(9, 101), torch.float32)
    assert np.isfinite(logits).all()
    with LLM(tmp_path, device="cpu", dtype="float32", max_model_len=16, gpu_threads=1, tee_threads=1) as llm:
        assert relative_distance(llm.logits(random_token_ids(9, 101)), logits) < 1e-4
        assert llm.generate([[1, 2]], SamplingParams(max_tokens=2, ignore_eos=True, temperature=0))


def test_a_shape_that_does_not_fit_on_the_disk_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 1000}))
    with pytest.raises(Exception, match="1,000 are free"):
        shapes.write_shape(tmp_path, shapes.shape_config("llama-3.2-1b", 1))
    assert not list(tmp_path.iterdir())


def test_the_serialized_baseline_computes_the_model():
    pytest.importorskip("msgpack")
    # With biases, and weights for the head of their own.
    folder = model_folder(RandomModel("qwen2"))
    spec = importlib.util.spec_from_file_location("serialized_baseline", SCRIPTS / "serialized_baseline.py")
    baseline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(baseline)
    token_ids = random_token_ids(8)
    with contextlib.ExitStack() as stack:
        job = job_of("serialized", str(folder), threads=torch.get_num_threads())
        client = baseline.Serialized(job, stack)
        logits = client.forward(torch.tensor(token_ids)).numpy()
    assert relative_distance(logits, transformers_logits(folder, token_ids)[-1]) < 1e-4


def test_random_weights_are_gone_after_the_run(tmp_path, monkeypatch):
    from tsqp_shm.bench.run import BenchOptions, run_bench

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tsqp_shm.bench.chosen_model.write_shape", lambda folder, config: None)
    with pytest.raises(Exception, match=r"config\.json"):
        run_bench(BenchOptions("prefill", shape="llama-3.2-1b", vs="none"), demo_model=Path)
    assert not list(tmp_path.iterdir())


def test_a_wrong_threads_number_is_refused():
    from tsqp_shm.bench.run import BenchOptions, run_bench

    with pytest.raises(ConfigError, match="threads"):
        run_bench(BenchOptions("decode", threads=0), demo_model=Path)


def test_settings_are_swept_and_lengths_held_against_their_arithmetic(tiny_model):
    run = bench(
        *(
            "prefill",
            tiny_model,
            "--tokens",
            "8,32",
            "--runs",
            "1",
            "--threads",
            "1",
            "--device",
            "cpu",
            "--vs",
            "none",
        ),
        *("--sweep", "tile-rows=4,16", "--sweep", "tiles-in-flight=3", "--json", "-"),
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)["rows"]
    names = [f"tsqp-shm tile-rows={n} tiles-in-flight=3" for n in (4, 16)]
    assert [(row["contender"], row["prompt_tokens"]) for row in rows] == [(n, t) for t in (8, 32) for n in names]
    # More tiles, more doorbells: the settings have reached the engine.
    assert rows[2]["doorbells"] > rows[3]["doorbells"]
    assert rows[0]["growth"] is None
    assert rows[2]["growth"]["from_tokens"] == 8
    assert 4 < rows[2]["growth"]["arithmetic"] < 16


def test_the_arithmetic_of_a_prefill_is_that_of_its_products():
    config = {**shapes.shape_config("llama-3.2-1b", 1), "hidden_size": 4, "head_dim": 4, "num_attention_heads": 2}
    config.update(num_key_value_heads=1, intermediate_size=8, vocab_size=5)
    # q, k, v, o: 4 x (8 + 4 + 4 + 8); gate, up, down: 3 x 4 x 8; logits 5 x 4; 3 rows see 1 + 2 + 3 keys.
    linears, logits, attention = 3 * (96 + 96), 20, 2 * (1 + 2 + 3) * 8
    assert prefill_flops(Network.of(ModelSpec.from_config(config)), 3) == 2 * (linears + logits + attention)


def test_a_window_bounds_the_arithmetic():
    config = {**shapes.shape_config("qwen2.5-0.5b", 2), "use_sliding_window": True, "sliding_window": 4}
    config["max_window_layers"] = 0
    network = Network.of(ModelSpec.from_config(config))
    assert network.windows == (4, 4)
    without = prefill_flops(Network.of(ModelSpec.from_config(shapes.shape_config("qwen2.5-0.5b", 2))), 10)
    # 55 pairs without it; with it 1 + 2 + 3 + 4 and six times 4.
    assert without - prefill_flops(network, 10) == 2 * 4 * network.num_heads * network.head_dim * (55 - 34)


# Every case's kernel, and the slot that it writes.
KERNEL_RESULTS = {"softmax": "scores", "add_rms_norm": "x", "rope": "qk", "silu_mul": "act"}


def test_kernels_are_measured_on_every_instruction_set_beside_a_copy_and_torch():
    run = bench("kernels", "--shapes", "smollm2-135m", "--tokens", "32", "--runs", "1", "--threads", "1", "--json", "-")
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)["rows"]
    contenders = ["copy", "torch", *_native.instruction_sets()]
    assert [(row["kernel"], row["contender"]) for row in rows] == [(k, c) for k in KERNEL_RESULTS for c in contenders]
    assert all(row["us"] > 0 and row["gb_per_s"] > 0 for row in rows)
    assert {row["share_of_copy"] for row in rows if row["contender"] == "copy"} == {1.0}
    assert {row["over_torch"] for row in rows if row["contender"] == "torch"} == {1.0}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_kernel_and_torch_give_the_same_to_the_eye(shape):
    config = {**shapes.shape_config(shape, 1), "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    spec = ModelSpec.from_config({**config, "num_attention_heads": 4, "num_key_value_heads": 2})
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(Session.begin("bench-same"))
        arena = stack.enter_context(arena_of(session, kernel_plan(spec, 24)))
        slots = stack.enter_context(open_slots(arena))
        for name, slot in KERNEL_RESULTS.items():
            found = []
            for which in ("ours", "theirs"):
                cases = {case.name: case for case in kernel_cases(spec, 24, arena, slots)}
                getattr(cases[name], which)()
                found.append(slots.view(arena.plan.slot(slot)).astype(np.uint32) << 16)
                del cases
            ours, theirs = (bits.view(np.float32) for bits in found)
            np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.long
def test_the_start_is_timed_to_the_first_text(demo_model):
    run = bench(
        "launch", str(demo_model), "--mode", "verified", "--runs", "1", "--vs", "none", "--device", "cpu", "--json", "-"
    )
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(run.stdout)["rows"]
    assert (row["mode"], row["runs"], row["ours_over_it"]) == ("verified", 1, 1.0)
    assert row["median_s"] > 0


def test_a_start_without_text_says_why_in_the_last_words(tmp_path, capsys):
    from tsqp_shm.cli import main

    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["bench", "launch", str(tmp_path), "--runs", "1", "--vs", "none"]) == 1
    assert "config.json" in capsys.readouterr().err


def test_an_idle_session_is_measured_on_both_sides(tiny_model):
    run = bench("idle", tiny_model, "--seconds", "0.3", "--device", "cpu", "--json", "-")
    assert run.returncode == 0, run.stderr
    shares = json.loads(run.stdout)["core_share"]["plain"]
    assert set(shares) == {"tee", "gpu"}
    assert all(0 <= share < 100 for share in shares.values())


def test_an_idle_time_that_is_none_is_refused(tiny_model):
    run = bench("idle", tiny_model, "--seconds", "0")
    assert run.returncode == 2
    assert "seconds" in run.stderr
