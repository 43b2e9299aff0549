"""A version stands in one place, and whatever repeats it agrees: Pythons, packages, compilers, this package's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tsqp_shm import __version__
from tsqp_shm.config import EngineConfig
from tsqp_shm.doctor import versions

ROOT = Path(__file__).parent.parent
MANIFEST = (ROOT / "pyproject.toml").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
PYTHONS = [Version(found) for found in re.findall(r'"Programming Language :: Python :: (3\.\d+)"', MANIFEST)]
REQUIREMENTS = [Requirement(found) for found in re.findall(r'"([a-z][a-z0-9-]*(?:>=|==)[^"]*)"', MANIFEST)]
PINS = [
    Requirement(line)
    for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


def test_the_pythons_are_in_a_row_from_the_one_that_is_required():
    assert all(older.minor + 1 == newer.minor for older, newer in pairwise(PYTHONS))
    assert f'requires-python = ">={PYTHONS[0]}"\n' in MANIFEST


def test_the_documents_name_the_pythons_that_the_manifest_names():
    named = [
        (path.name, *found)
        for path in DOCUMENTS
        for found in re.findall(r"Python (3\.\d+) to (3\.\d+)", path.read_text())
    ]
    assert named
    assert {(oldest, newest) for _, oldest, newest in named} == {(str(PYTHONS[0]), str(PYTHONS[-1]))}


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (f"3.{PYTHONS[0].minor - 1}.9", f"Python {PYTHONS[0]} to {PYTHONS[-1]} is needed"),
        (f"3.{PYTHONS[-1].minor + 1}.0", f"Python {PYTHONS[0]} to {PYTHONS[-1]} is needed"),
        (f"{PYTHONS[0]}.0", "lacks the venv module"),
        (f"{PYTHONS[-1]}.12", "lacks the venv module"),
    ],
)
def test_set_up_takes_the_pythons_that_the_manifest_names(tmp_path, version, said):
    for name in ("pyproject.toml", "scripts/setup-environment"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / "python"
    # Says its version, and has neither venv nor ensurepip.
    python.write_text(f"#!/bin/sh\ncase $2 in *ensurepip*) exit 1 ;; esac\necho {version}\n")
    python.chmod(0o700)
    command = ["bash", "scripts/setup-environment"]
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert said in done.stderr


def test_doctor_warns_of_a_python_that_the_package_does_not_name(monkeypatch):
    def found(minors: list[int]) -> versions.Finding:
        monkeypatch.setattr(versions, "tested_minors", lambda: minors)
        return next(iter(versions.examine_versions(EngineConfig(mode="tee-only"))))

    here = sys.version_info.minor
    assert found([here, here + 1]).verdict == found([]).verdict == versions.GOOD
    assert (found([8, 9]).verdict, found([8, 9]).why) == (versions.WARNING, "tested with 3.8 to 3.9")


def test_doctor_reads_the_pythons_from_what_is_installed():
    assert versions.tested_minors()[0] == PYTHONS[0].minor
    assert sys.version_info.minor in versions.tested_minors()


def test_a_package_that_is_required_twice_is_required_alike():
    specifiers = defaultdict(set)
    for requirement in REQUIREMENTS:
        specifiers[requirement.name].add(str(requirement.specifier))
    assert {"numpy", "pybind11", "torch"} <= specifiers.keys()
    assert {name: found for name, found in specifiers.items() if len(found) > 1} == {}


@pytest.mark.parametrize("python", PYTHONS, ids=str)
def test_every_requirement_has_one_pin_that_satisfies_it_on_each_python(python):
    environment = {"python_version": str(python), "python_full_version": f"{python}.0"}
    pins = defaultdict(list)
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            pins[pin.name.lower()].append(str(pin.specifier).removeprefix("=="))
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
    unmet = [str(wanted) for wanted in REQUIREMENTS if not wanted.specifier.contains(pins[wanted.name.lower()][0])]
    assert unmet == []


def test_the_compiler_that_is_needed_is_one_and_the_same():
    texts = [path.read_text() for path in (*DOCUMENTS, ROOT / "scripts" / "setup-environment")]
    needed = [found for text in texts for found in re.findall(r"(?:g\+\+|GCC) (\d+) or newer", text)]
    assert len(needed) >= 2
    assert len(set(needed)) == 1


def test_the_changelog_describes_no_version_after_this_one():
    described = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert all(found in SpecifierSet(f"<={__version__}") for found in described)
    assert sorted(described, key=Version, reverse=True) == described
