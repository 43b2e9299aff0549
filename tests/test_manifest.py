"""The manifest for Gramine: as far as it can be held against this package without an enclave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import Environment, StrictUndefined

from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.posix.objects import arena_name

TEMPLATE = Path(__file__).parent.parent / "docs" / "gramine" / "tsqp-shm.manifest.template"


class Gramine:
    libos = "/usr/lib/gramine/libsysdb.so"

    @staticmethod
    def runtimedir() -> str:
        return "/usr/lib/gramine/runtime/glibc"


@pytest.fixture
def manifest():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader for TOML")
    values = {name: f"/of/{name}" for name in ("python", "prefix", "site", "root", "model", "runtime")}
    template = Environment(undefined=StrictUndefined).from_string(TEMPLATE.read_text())
    return tomllib.loads(template.render(**values, session="demo", uid=os.geteuid(), gramine=Gramine))


def test_the_one_object_allowed_in_dev_shm_is_the_sessions_arena(manifest):
    allowed = [uri for uri in manifest["sgx"]["allowed_files"] if uri.startswith("dev:")]
    assert allowed == [f"dev:/dev/shm{arena_name('demo')}"]


def test_the_folder_that_it_shares_with_the_host_is_the_one_that_holds_sessions(manifest, monkeypatch, tmp_path):
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(tmp_path))
    within = sessions_folder().relative_to(tmp_path)
    assert manifest["loader"]["env"]["TSQP_SHM_RUNTIME_DIR"] == "/of/runtime"
    assert f"file:/of/runtime/{within}/" in manifest["sgx"]["allowed_files"]
    assert f"/of/runtime/{within}" in [mount["path"] for mount in manifest["fs"]["mounts"]]


def test_its_command_is_one_that_the_command_line_takes(manifest):
    done = subprocess.run([sys.executable, *manifest["loader"]["argv"][1:]], capture_output=True, text=True)
    assert done.returncode == 1
    assert "/of/model" in done.stderr
