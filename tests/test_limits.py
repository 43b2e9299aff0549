"""What the system refuses is one clear line that says what to change.

Real mounts in namespaces of their own, real limits and another user in child processes.
"""

from __future__ import annotations

import os
import resource
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from arenas import attach_arena, new_arena
from commands import assert_one_line
from models import RandomModel, with_tokenizer

from tsqp_shm.errors import ArenaError, ConfigError, LimitError
from tsqp_shm.roles.resources import num_open_descriptors, require_descriptors, require_threads
from tsqp_shm.shm.plan import Plan
from tsqp_shm.shm.posix.folder import sessions_folder
from tsqp_shm.shm.posix.objects import arena_name

PLAN = Plan.of_slots([("x", "float32", 100, 300)])
NOBODY = 65534
# Without what lets root pass over modes and limits.
PLAIN_ROOT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner,-ipc_lock"]


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")


@pytest.fixture(scope="module")
def model(tmp_path_factory, demo_model) -> Path:
    folder = RandomModel("llama", {"vocab_size": 49152}).write(tmp_path_factory.mktemp("limits") / "model")
    return with_tokenizer(folder, demo_model)


@pytest.fixture
def name() -> str:
    return f"limits-{secrets.token_hex(3)}"


def tee(model: Path, *flags: object) -> list[object]:
    """The role that makes the arena; whatever is refused is refused before it waits for anyone."""
    return [sys.executable, "-m", "tsqp_shm", "tee", model, "-q", "--timeout", "5", *flags]


MISSING_SHM = """
mount -t tmpfs tmpfs /mnt
for name in null zero urandom random; do touch /mnt/$name; mount --bind /dev/$name /mnt/$name; done
ln -s /proc/self/fd /mnt/fd
mount --move /mnt /dev
"""


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (
            "mount -t tmpfs -o size=1m tmpfs /dev/shm",
            ["1,048,576 are free in /dev/shm", "--shm-size", "arena-too-small"],
        ),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", ["Read-only", "remount,rw /dev/shm", "#arena-error"]),
        ("mount -t tmpfs -o nr_inodes=1 tmpfs /dev/shm", ["no more files fit", "nr_inodes"]),
        ("mount -t tmpfs -o mode=700,uid=65534 tmpfs /dev/shm", ["user 0 may not", "mode 1777"]),
        (MISSING_SHM, ["/dev/shm cannot be used", "mount a tmpfs there"]),
    ],
    ids=["too small", "read-only", "no inodes", "not writable", "missing"],
)
def test_shared_memory_that_cannot_be_used_is_one_line(in_namespace, model, setup, said):
    assert_one_line(in_namespace(setup, *PLAIN_ROOT, *tee(model)), 1, *said)


FILL_WHILE_MADE = """
import os, sys
from tsqp_shm.cli import main
back = os.posix_fallocate
def fill_first(fd, offset, size):
    free = os.statvfs("/dev/shm")
    with open("/dev/shm/other", "wb") as other:
        back(other.fileno(), 0, free.f_bavail * free.f_frsize)
    back(fd, offset, size)
os.posix_fallocate = fill_first
sys.exit(main())
"""


def test_shared_memory_that_fills_up_in_the_middle_is_one_line(in_namespace, model):
    """Between the look at the free space and the taking of it."""
    command = tee(model)
    result = in_namespace(
        "mount -t tmpfs -o size=64m tmpfs /dev/shm", sys.executable, "-c", FILL_WHILE_MADE, *command[3:]
    )
    assert_one_line(result, 1, "0 are free in /dev/shm", "--shm-size")


def test_an_arena_of_another_user_under_this_name_is_one_line(in_namespace, model, name):
    squatted = f"""
        mount -t tmpfs -o mode=1777 tmpfs /dev/shm
        setpriv --reuid={NOBODY} --clear-groups touch /dev/shm{arena_name(name)}
    """
    refused = in_namespace(squatted, *tee(model, "--session", name))
    assert_one_line(refused, 1, "exists already", f"belongs to user {NOBODY}", "--session NAME")


@pytest.mark.parametrize(
    ("options", "content", "said"),
    [
        ("size=64k", "head -c 100000 /dev/zero >small/fill 2>/dev/null || true", "No space left on device"),
        ("nr_inodes=4", "true", "No space left on device"),
        ("mode=755", "mkdir -m 700 small/sessions; mount -o remount,ro small", "Read-only file system"),
    ],
    ids=["full", "no inodes", "read-only"],
)
def test_a_session_folder_that_cannot_be_written_is_one_line(in_namespace, model, tmp_path, options, content, said):
    (tmp_path / "small").mkdir()
    setup = f"cd {tmp_path}; mount -t tmpfs -o {options} tmpfs small; {content}; cd /"
    refused = in_namespace(setup, *tee(model), TSQP_SHM_RUNTIME_DIR=str(tmp_path / "small" / "sessions"))
    assert_one_line(refused, 1, "session folder cannot be used", said, "TSQP_SHM_RUNTIME_DIR")


def test_a_session_without_room_for_its_lock_leaves_no_folder(in_namespace, model, tmp_path):
    (tmp_path / "small").mkdir()
    setup = f"mount -t tmpfs -o nr_inodes=5 tmpfs {tmp_path}/small"
    script = '"$@" 2>/dev/null; ls -A "$TSQP_SHM_RUNTIME_DIR/tsqp-shm"'
    result = in_namespace(
        setup, "sh", "-c", script, "sh", *tee(model), TSQP_SHM_RUNTIME_DIR=str(tmp_path / "small" / "sessions")
    )
    assert (result.returncode, result.stdout) == (0, ".lock\n")


@pytest.mark.parametrize("verb", ["launch", "tee"])
def test_a_session_folder_with_a_wrong_mode_is_one_line_before_any_work(tmp_path, model, verb):
    folder = tmp_path / "sessions" / "tsqp-shm"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    refused = subprocess.run(
        [sys.executable, "-m", "tsqp_shm", verb, model, "-q"],
        env={**os.environ, "TSQP_SHM_RUNTIME_DIR": str(folder.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert_one_line(refused, 2, str(folder), "mode 0755", "chmod 700", "TSQP_SHM_RUNTIME_DIR")


def test_a_session_folder_of_another_user_is_named_with_its_owner(as_root, tmp_path, monkeypatch):
    folder = tmp_path / "sessions"
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    monkeypatch.setenv("TSQP_SHM_RUNTIME_DIR", str(folder))
    with pytest.raises(ConfigError, match=f"is of user {NOBODY} with mode 0700"):
        sessions_folder()


def test_too_small_a_disk_for_the_demo_model_is_one_line_before_it_is_fetched(in_namespace, tmp_path):
    setup = f"mount -t tmpfs -o size=16m tmpfs {tmp_path}"
    command = [sys.executable, "-m", "tsqp_shm", "launch", "-q"]
    refused = in_namespace(setup, *command, XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1")
    assert_one_line(refused, 1, "disk space", "400,000,000", "16,777,216", "XDG_CACHE_HOME", "#limit-error")


@pytest.mark.parametrize("verb", ["launch", "tee", "gpu"])
@pytest.mark.parametrize("limit", [8, 30])
def test_too_few_file_descriptors_are_one_line_before_any_work(verb, limit, model):
    command = [sys.executable, "-m", "tsqp_shm", verb, str(model), "-q", "--session", "few"]
    refused = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert_one_line(refused, 1, "too few file descriptors", f"the limit is {limit}", "ulimit -n")


def test_as_many_descriptors_as_the_message_asks_for_are_enough(forked):
    def run():
        used = num_open_descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 9, used + 9))
        with pytest.raises(LimitError, match=f"ulimit -n {used + 10} "):
            require_descriptors(10)
        require_descriptors(9)

    forked(run).join()


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def test_too_few_threads_are_one_line_with_what_was_granted(as_root, forked):
    """Root is above the limit, so this is for another user."""

    def run():
        resource.setrlimit(resource.RLIMIT_NPROC, (4, 4))
        become_nobody()
        with pytest.raises(
            LimitError, match=r"too few threads: 50 more are needed and the system granted \d+; .*ulimit"
        ):
            require_threads(50)

    forked(run).join()


def test_threads_that_were_tried_are_gone():
    before = threading.active_count()
    require_threads(20)
    assert threading.active_count() == before


@pytest.fixture
def shared_name() -> Iterator[str]:
    yield f"/tsqp-shm-test-{secrets.token_hex(4)}"


def test_a_refused_memory_lock_is_reported_with_the_limit_and_the_arena_works(as_root, forked, shared_name):
    def run():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        become_nobody()
        with new_arena(PLAN, shared_name) as arena:
            assert not arena.residency.locked
            assert "the limit is 64 KiB" in arena.residency.locked_reason
            assert "ulimit -l" in arena.residency.locked_reason
            arena.buffer[PLAN.total_bytes - 1] = 1

    forked(run).join()


def test_the_arena_of_another_user_cannot_be_attached(as_root, forked, shared_name):
    def run():
        become_nobody()
        with pytest.raises(ArenaError, match=f"cannot be opened: user {NOBODY} may not"):
            attach_arena(shared_name, PLAN)

    with new_arena(PLAN, shared_name) as arena:
        arena.publish()
        forked(run).join()


def test_a_limit_on_file_sizes_is_named(forked, shared_name):
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(ArenaError, match="ulimit -f"):
            new_arena(PLAN, shared_name)
        assert not Path(f"/dev/shm{shared_name}").exists()

    forked(run).join()
