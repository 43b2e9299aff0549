"""A process that is not dumpable: what others of its user are refused, and what goes on to work around it."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tsqp_shm.errors import TsqpError
from tsqp_shm.hardening import examine, harden
from tsqp_shm.roles.resources import num_open_descriptors

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root becomes another user")
NOBODY = 65534


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def make_dumpable() -> None:
    """As a process is that was started by its user: one that has changed its user is not."""
    assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0


def test_a_hardened_process_is_not_dumpable_and_leaves_no_core(forked):
    def run():
        make_dumpable()
        assert examine()["dumpable"]
        assert harden() == {"dumpable": False, "core": False}
        assert harden() == examine() == {"dumpable": False, "core": False}
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)

    forked(run).join()


def test_children_stay_so_and_a_program_begins_anew(forked):
    def run():
        harden()
        child = os.fork()
        if child == 0:
            os._exit(examine()["dumpable"])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        code = "from tsqp_shm.hardening import examine; print(examine())"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said == "{'dumpable': True, 'core': False}\n"

    forked(run).join()


def test_a_system_that_refuses_is_one_line(forked, monkeypatch):
    def refuse(limit, values):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "setrlimit", refuse)

    def run():
        with pytest.raises(TsqpError, match=r"makes no keys: .*Operation not permitted"):
            harden()

    forked(run).join()


def looked_at(pid: int) -> dict[str, bool]:
    """Which files of a process another one of its user can read."""
    found = {}
    for name in ("stat", "status", "cmdline", "comm", "maps", "environ", "mem", "fd", "exe"):
        path = Path(f"/proc/{pid}/{name}")
        try:
            if name == "fd":
                list(path.iterdir())
            elif name == "exe":
                path.readlink()
            elif name == "mem":
                path.open("rb").close()
            else:
                path.read_bytes()
            found[name] = True
        except PermissionError:
            found[name] = False
    return found


@needs_root
def test_another_process_of_the_user_sees_times_and_counts_and_no_memory(forked):
    """Nothing of what the package reads of a TEE process from outside is among what is refused, `ps` apart."""

    def run():
        become_nobody()
        make_dumpable()
        hardened, told = os.pipe()
        child = os.fork()
        if child == 0:
            harden()
            # Its own files it can read all the same, for what a role needs.
            assert num_open_descriptors() > 0
            assert Path("/proc/self/status").read_text()
            os.write(told, b"x")
            signal.pause()
        try:
            os.read(hardened, 1)
            assert {name for name, is_read in looked_at(child).items() if is_read} == {
                "stat", "status", "cmdline", "comm",
            }  # fmt: skip
            assert all(looked_at(os.getpid()).values())
            # Signals and limits ask for the user alone.
            resource.prlimit(child, resource.RLIMIT_CORE)
        finally:
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    forked(run).join()
