"""Whatever is wrong with the input: one clear line, the right exit code, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import assert_one_line, run
from models import RandomModel, edit_config, fast_start

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.cli import main
from tsqp_shm.errors import (
    ArenaTooSmall,
    ConfigError,
    DeviceError,
    ModelFileError,
    PeerDied,
    RequestError,
    SessionBusy,
    UnsupportedModel,
)
from tsqp_shm.shm.posix.session import Session


@pytest.fixture
def model(tmp_path: Path, demo_model: Path) -> Path:
    """A sound folder of one's own, to be broken."""
    folder = RandomModel("llama", {"vocab_size": 49152}).write(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(demo_model / name)
    return folder


@pytest.fixture
def here(capfd) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs the command in this process, for what is refused before a role is started."""

    def run_here(*arguments: object) -> subprocess.CompletedProcess:
        words = [str(argument) for argument in arguments]
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield run_here
    for number, handler in before.items():
        signal.signal(number, handler)


def drop(field: str):
    return lambda config: config.pop(field)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def break_weights(folder: Path) -> None:
    truncate(folder / "model.safetensors")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def remove_field(folder: Path) -> None:
    edit_config(folder, drop("intermediate_size"))


def change_width(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(intermediate_size=136))


def change_family(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(model_type="mamba"))


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


BROKEN_FOLDERS = [
    pytest.param(break_weights, ModelFileError, "model.safetensors", id="truncated weights"),
    pytest.param(remove_weights, ModelFileError, "no weights", id="missing weights"),
    pytest.param(remove_config, ModelFileError, "config.json", id="no config"),
    pytest.param(garble_config, ModelFileError, "config.json", id="config is not JSON"),
    pytest.param(remove_field, ModelFileError, "intermediate_size", id="missing field"),
    pytest.param(change_width, ModelFileError, "shape", id="weights of another shape"),
    pytest.param(change_family, UnsupportedModel, "mamba", id="unknown family"),
]


@pytest.mark.parametrize(("breaking", "error", "said"), BROKEN_FOLDERS)
def test_a_broken_model_folder_is_one_line(model, breaking, error, said):
    breaking(model)
    assert_one_line(run("launch", model), 1, said)


@pytest.mark.parametrize(("breaking", "error", "said"), BROKEN_FOLDERS)
def test_a_broken_model_folder_is_an_exception(model, breaking, error, said):
    breaking(model)
    with pytest.raises(error, match=said):
        LLM(model)


def test_a_folder_without_a_tokenizer_cannot_take_text(model):
    remove_tokenizer(model)
    assert_one_line(run("launch", model, "-q"), 1, "tokenizer.json")


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_a_path_that_is_no_model_folder_is_one_line(tmp_path, path):
    (tmp_path / "file").write_text("no model")
    assert_one_line(run("launch", tmp_path / path), 1, path, "folder")
    with pytest.raises(ModelFileError, match=path):
        LLM(tmp_path / path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtype", "float16"], ["dtype", "float16", "bfloat16"]),
        (["--doorbell", "brass"], ["doorbell", "brass", "adaptive"]),
        (["--device", "tpu"], ["device", "tpu", "cuda"]),
        (["--max-model-len", "0"], ["max_model_len", "0"]),
        (["--max-new-tokens", "0"], ["max_tokens", "0"]),
        (["--max-new-tokens", "many"], ["max-new-tokens", "many"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "2"], ["top_p", "2"]),
        (["--stop", ""], ["stop"]),
        (["--session", "../up"], ["session", "../up"]),
        (["--timeout", "0"], ["timeout", "0"]),
        (["--timeout", "nan"], ["timeout", "nan"]),
        (["--endpoint", "http://x"], ["endpoint", "http://x", "ipc://"]),
        (["--tiles-in-flight", "1"], ["tiles_in_flight", "1"]),
        (["--max-batch-tokens", "4", "--max-num-seqs", "5"], ["max_batch_tokens", "4", "5"]),
        (["--prompt", "a", "--prompt-file", "b"], ["prompt-file"]),
        (["--prompt-file", "/nowhere/at/all"], ["prompt-file", "/nowhere/at/all"]),
        (["--interactive", "--json"], ["json", "interactive"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_line_and_a_usage_error(here, shared_model, flags, said):
    assert_one_line(here("launch", shared_model, *flags), 2, *said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-model-len", "513"], ["max_model_len", "513", "512"]),
        (["--endpoint", "ipc:///nowhere/at/all"], ["endpoint", "/nowhere/at/all"]),
    ],
    ids=" ".join,
)
def test_a_flag_that_is_wrong_for_this_model_or_machine_is_one_line_too(shared_model, flags, said):
    assert_one_line(run("launch", shared_model, *flags), 2, *said)


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory, demo_model) -> Path:
    folder = RandomModel("llama", {"vocab_size": 49152}).write(tmp_path_factory.mktemp("sound") / "model")
    (folder / "tokenizer.json").symlink_to(demo_model / "tokenizer.json")
    return folder


@pytest.mark.parametrize("arguments", [[], ["fly"], ["launch", "a", "b"]], ids=" ".join)
def test_a_wrong_verb_is_one_line_and_a_usage_error(here, arguments):
    assert_one_line(here(*arguments), 2)


def test_a_wrong_environment_variable_is_one_line_and_a_flag_wins_over_it(here, shared_model, monkeypatch):
    monkeypatch.setenv("TSQP_SHM_MAX_MODEL_LEN", "long")
    assert_one_line(here("launch", shared_model), 2, "TSQP_SHM_MAX_MODEL_LEN", "long")
    monkeypatch.setenv("TSQP_SHM_MAX_MODEL_LEN", "-1")
    assert_one_line(here("launch", shared_model), 2, "max_model_len", "-1")
    assert_one_line(here("launch", shared_model, "--max-model-len", "64", "--top-p", "2"), 2, "top_p")


@pytest.mark.parametrize("verb", ["launch", "tee", "gpu"])
def test_an_instruction_set_that_is_not_there_is_one_line(shared_model, monkeypatch, verb):
    monkeypatch.setenv("TSQP_SHM_ISA", "abacus")
    assert_one_line(run(verb, shared_model, "--session", "abacus"), 2, "TSQP_SHM_ISA", "abacus", "scalar")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", ""], ["at least one token"]),
        (["--prompt", "word " * 100, "--max-model-len", "50"], ["tokens", "at most 49", "max_model_len"]),
    ],
    ids=["empty", "too long"],
)
def test_a_wrong_prompt_is_one_line(shared_model, flags, said):
    assert_one_line(run("launch", shared_model, "-q", *flags), 1, *said)


@pytest.mark.parametrize("device", ["cuda", pytest.param("cuda:7", marks=pytest.mark.long)])
def test_a_device_that_is_not_there_is_one_line(shared_model, device):
    import torch

    if torch.cuda.device_count() > 7 or (torch.cuda.is_available() and device == "cuda"):
        pytest.skip("the device is there")
    assert_one_line(run("launch", shared_model, "--device", device, "-q"), 1, device)
    with pytest.raises(DeviceError, match=device):
        LLM(shared_model, device=device)


TOO_MUCH = {"max_model_len": 1 << 20, "tiles_in_flight": 16, "tile_rows": 4096}


def test_too_small_a_shared_memory_filesystem_is_one_line_with_the_figures(model):
    edit_config(model, lambda config: config.update(max_position_embeddings=1 << 20))
    flags = [word for name, value in TOO_MUCH.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert_one_line(run("launch", model, *flags), 1, "shared memory", "/dev/shm", "--shm-size", "bytes")
    with pytest.raises(ArenaTooSmall) as caught:
        LLM(model, **TOO_MUCH)
    assert caught.value.needed_bytes > 16 * 4096 * (1 << 20)
    assert 0 < caught.value.free_bytes < caught.value.needed_bytes


def test_a_nearly_full_shared_memory_filesystem_is_an_exception(shared_model, monkeypatch):
    real = os.statvfs

    def nearly_full(path):
        result = list(real(path))
        result[4] = 3  # f_bavail
        return os.statvfs_result(result)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(ArenaTooSmall, match="free in /dev/shm"):
        LLM(shared_model, start_gpu=False)


def test_a_busy_session_name_is_one_line_with_its_owner(shared_model):
    with Session.begin("busy"):
        refused = run("launch", shared_model, "--session", "busy", "-q")
        assert_one_line(refused, 1, "busy", "in use", str(os.getpid()), "--session")
        with pytest.raises(SessionBusy) as caught:
            LLM(shared_model, session="busy")
        assert caught.value.owner_pid == os.getpid()
    # A refused start has not harmed the session, nor kept its name.
    with Session.begin("busy"):
        pass


def test_a_gpu_role_without_a_session_or_a_tee_is_one_line(shared_model):
    assert_one_line(run("gpu", shared_model), 2, "session")
    assert_one_line(
        run("gpu", shared_model, "--session", "lonely", "--timeout", "0.1", "-q"), 1, "lonely", "tsqp-shm tee"
    )


def test_a_tee_role_without_a_gpu_process_is_one_line(shared_model):
    refused = run("tee", shared_model, "--session", "lonely", "--timeout", "0.2", "-q")
    assert_one_line(refused, 3, "timed out", "READY")


@pytest.mark.slow
def test_a_gpu_role_with_another_model_is_told_so(shared_model, tmp_path):
    other = RandomModel("llama", {"vocab_size": 49152, "num_hidden_layers": 3}).write(tmp_path / "other")
    with (
        subprocess.Popen(
            [sys.executable, "-m", "tsqp_shm", "tee", shared_model, "--session", "unlike", "--timeout", "5", "-q"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as tee,
    ):
        refused = run("gpu", other, "--session", "unlike", "-q")
        assert_one_line(refused, 1, "num_layers", "2", "3")
        tee.terminate()
        assert tee.wait() == 128 + 15


def test_a_wrong_setting_names_its_field():
    with pytest.raises(ConfigError) as caught:
        LLM("model", max_model_length=5)
    assert caught.value.field == "max_model_length"
    with pytest.raises(ConfigError, match="dtype"):
        LLM("model", dtype="float16")


def test_an_llm_stays_usable_after_a_wrong_request(shared_model):
    with fast_start() as fast, fast.llm(shared_model, max_model_len=50) as llm:
        expected = llm.generate("Hello", SamplingParams(max_tokens=5, temperature=0))[0].outputs
        for prompt in ("", [49152], "word " * 100, [[1], []]):
            with pytest.raises(RequestError):
                llm.generate(prompt)
            assert llm.generate("Hello", SamplingParams(max_tokens=5, temperature=0))[0].outputs == expected


def test_json_is_printed_for_a_sound_request_only(shared_model):
    refused = run("launch", shared_model, "--json", "--prompt", "")
    assert_one_line(refused, 1, "at least one token")
    accepted = run("launch", shared_model, "--json", "--prompt", "Hello", "--max-new-tokens", "2")
    assert (accepted.returncode, accepted.stderr) == (0, "")
    assert len(json.loads(accepted.stdout)["token_ids"]) == 2


def test_a_gpu_process_that_dies_while_it_loads_is_quoted(model, monkeypatch):
    """The weights are there for the TEE, which needs the norms only, and not for the GPU process."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert_one_line(run("launch", model, "-q"), 1, "down_proj")
    with pytest.raises((ModelFileError, PeerDied), match="down_proj"):
        LLM(model)
