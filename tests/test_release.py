"""scripts/release: what it lets stand in the way, and, where there is time, the archives that it makes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tsqp_shm import __version__

ROOT = Path(__file__).parent.parent
# What --dry-run reads.
FILES = ("pyproject.toml", "scripts/release", "scripts/script_flags.py", "tsqp_shm/_version.py")
DESCRIBED = f"# Changelog\n\n## [Unreleased]\n\n## [{__version__}] - 2026-01-31\n\n- The first.\n"


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path):
    """A repository that nothing keeps from a release."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(DESCRIBED)
    git(tmp_path, "init", "--initial-branch", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "The first")
    return tmp_path


def dry_run(folder: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, folder / "scripts" / "release", "--dry-run", "--python", sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_clean_main_whose_version_is_described_can_be_released(clone):
    code, said = dry_run(clone)
    assert code == 0
    assert f"release: tsqp-shm {__version__}\n" in said
    assert f"a wheel for Python 3.{sys.version_info.minor}, by {sys.executable}\n" in said
    assert "in the way" not in said
    assert not (clone / "dist").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda clone: git(clone, "switch", "--create", "other"), "the branch is other, not main"),
        (lambda clone: git(clone, "switch", "--detach"), "the branch is none, not main"),
        (lambda clone: (clone / "left.txt").touch(), "1 files are not committed: left.txt"),
        (lambda clone: git(clone, "tag", f"v{__version__}"), f"v{__version__} is tagged already"),
        (lambda clone: describe(clone, "## [Unreleased]\n"), "CHANGELOG.md begins with no version at all"),
        (lambda clone: describe(clone, DESCRIBED.replace("] - ", "] ")), "begins with ## ["),
        (lambda clone: describe(clone, DESCRIBED.replace(__version__, "9.9")), "begins with ## [9.9]"),
        (lambda clone: describe(clone, DESCRIBED.replace("ed]\n", "ed]\n\n- More.\n")), "lines under [Unreleased]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_in_the_way_is_named(clone, change, said):
    change(clone)
    code, found = dry_run(clone)
    assert code == 1
    assert said in "".join(line for line in found.splitlines() if line.startswith("release: in the way: "))


def describe(clone: Path, changelog: str) -> None:
    (clone / "CHANGELOG.md").write_text(changelog)
    git(clone, "commit", "--all", "--message", "Describe")


def test_a_python_that_the_package_does_not_name_is_one_line(clone, tmp_path):
    python = tmp_path / "python2"
    python.write_text("#!/bin/sh\necho 2.7\n")
    python.chmod(0o700)
    code, said = dry_run(clone, "--python", str(python))
    assert (code, said) == (1, f"release: error: {python} is Python 2.7, which pyproject.toml does not name\n")


def test_a_wheel_has_the_modules_and_stubs_that_are_there_and_nothing_that_was(tmp_path):
    built = tmp_path / "lib"
    (built / "tsqp_shm").mkdir(parents=True)
    (built / "tsqp_shm" / "removed_since.py").touch()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", built]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    found = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    package = {path.relative_to(ROOT) for path in (ROOT / "tsqp_shm").rglob("*") if path.suffix in (".py", ".pyi")}
    page = {path.relative_to(ROOT) for path in (ROOT / "tsqp_shm" / "serve" / "static").iterdir()}
    assert found == package | page | {Path("tsqp_shm", "py.typed")}


@pytest.mark.long
def test_a_rehearsal_makes_archives_that_hold_the_package_and_work_elsewhere(tmp_path):
    # Minutes: everything is compiled, and twice what it takes comes from the index.
    command = [ROOT / "scripts" / "release", "--rehearse", "--python", sys.executable, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same completion by scalar" in done.stdout
    made = sorted(path.name for path in tmp_path.iterdir())
    tag = f"cp3{sys.version_info.minor}"
    assert re.fullmatch(rf"tsqp_shm-{__version__}-{tag}-{tag}-[\w.]*{os.uname().machine}\.whl", made[0])
    assert made[1:] == [f"tsqp_shm-{__version__}.tar.gz"]
    with tarfile.open(tmp_path / made[1]) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    compiled = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "native").rglob("*")
        if path.suffix in (".cpp", ".h", ".mk") and path.parent.name not in ("tests", "fuzz", "build")
    }
    assert {name for name in packed if name.startswith("native/") and "." in name} == compiled
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml"} <= packed
    assert not [name for name in packed if name.startswith(("tests", "docs", "scripts", ".ci"))]
