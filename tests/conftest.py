"""Fixtures that cannot leak or hang: every test has a deadline, and fails if it leaves anything behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from instruction_sets import instruction_set
from process_table import children

from tsqp_shm import _native
from tsqp_shm.demo.model import demo_model_folder
from tsqp_shm.shm.posix.folder import sessions_folder, sweep_dead_sessions
from tsqp_shm.shm.posix.objects import arena_name, unlink_dead

if TYPE_CHECKING:
    from models import FastStart

DEADLINE_S = 60
SLOW_DEADLINE_S = 300
LONG_DEADLINE_S = 1200


def pytest_configure() -> None:
    # A shell has its background jobs ignore these, and whatever they start would ignore them too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def runtime_folder() -> Iterator[Path]:
    """Sessions of the tests in a folder of their own. Its path is short: a socket's path has 107 bytes."""
    # Tests that were killed have left arenas of the same names, and their folder of sessions is not this one.
    for arena in Path("/dev/shm").glob(arena_name("*").lstrip("/")):
        unlink_dead(f"/{arena.name}")
    folder = tempfile.mkdtemp(prefix="tsqp", dir="/tmp")
    os.environ["TSQP_SHM_RUNTIME_DIR"] = folder
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends a test that hangs."""
    marks = {mark.name for mark in request.node.iter_markers()}
    with _alarm(LONG_DEADLINE_S if "long" in marks else SLOW_DEADLINE_S if "slow" in marks else DEADLINE_S):
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(runtime_folder: Path) -> Iterator[None]:
    """Fails a test after which there is a shared-memory object, a session or a child that was not there before."""
    before = _leavings()
    yield
    # A child that was just told to end may need a moment to be gone.
    end = time.monotonic() + 2
    while (left := _leavings() - before) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left, f"left behind: {sorted(left)}"


@pytest.fixture(params=_native.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine, in use."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of the native pool, in use."""
    before = _native.get_num_threads()
    _native.set_num_threads(request.param)
    yield request.param
    _native.set_num_threads(before)


@pytest.fixture
def forked() -> Iterator[Callable[..., Forked]]:
    """Runs functions in forked children; the ones that are still alive at the end are killed."""
    children: list[Forked] = []

    def fork(function: Callable[..., object], *arguments: object) -> Forked:
        children.append(Forked(function, *arguments))
        return children[-1]

    yield fork
    for child in children:
        child.kill()


@pytest.fixture(scope="module")
def fast() -> Iterator[FastStart]:
    """Starts LLMs whose GPU processes are forked from one that has imported everything."""
    # Not before it is used: it imports what a GPU process does.
    from models import fast_start

    with fast_start() as starter:
        yield starter


@pytest.fixture(scope="session")
def demo_tokenizers() -> Iterator[None]:
    """The demo model's tokenizers of `demo_tokenizers`, loaded before a test that would be held to leave a process."""
    from demo_tokenizers import ours

    ours()
    yield
    ours().close()


@pytest.fixture
def held_elsewhere(forked: Callable[..., Forked]) -> Iterator[Callable[[Callable[[], object]], Forked]]:
    """Begins sessions in children that hold them until they are killed."""

    def hold(begin: Callable[[], object]) -> Forked:
        begun, tell = os.pipe()

        def begin_and_wait() -> None:
            held = begin()
            os.write(tell, b"x")
            signal.pause()
            del held

        child = forked(begin_and_wait)
        os.close(tell)
        has_begun = os.read(begun, 1)
        os.close(begun)
        if not has_begun:
            child.join()
        children.append(child)
        return child

    children: list[Forked] = []
    yield hold
    for child in children:
        child.kill()
    sweep_dead_sessions()


@pytest.fixture(scope="session")
def in_namespace() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a command in a mount namespace of its own, after a shell script that mounts what it is to meet."""

    def run(setup: str, *command: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["unshare", "--mount", "sh", "-ec", f'{setup}\nexec "$@"', "sh", *map(str, command)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    try:
        tried = run("mount -t tmpfs tmpfs /mnt", "setpriv", "--version")
    except FileNotFoundError as error:
        pytest.skip(f"no mount namespaces: {error}")
    if tried.returncode:
        pytest.skip(f"no mount namespaces: {tried.stderr.strip()}")
    return run


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's Hugging Face folder, fetched and converted when it is not cached."""
    if os.environ.get("TSQP_SHM_TEST_WITHOUT_DEMO_MODEL") == "1":
        pytest.skip("TSQP_SHM_TEST_WITHOUT_DEMO_MODEL=1")
    return demo_model_folder(lambda line: print(line, file=sys.stderr))


class Forked:
    """A forked child that runs one function, with a deadline of its own, and always ends in os._exit."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._errors, errors = os.pipe()
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self._errors)
                with _alarm(DEADLINE_S):
                    function(*arguments)
                code = 0
            except BaseException:
                os.write(errors, traceback.format_exc().encode())
            finally:
                os._exit(code)
        os.close(errors)

    def join(self) -> None:
        """Waits for the child; what it raised is this test's failure."""
        with os.fdopen(os.dup(self._errors), "rb") as pipe:
            error = pipe.read().decode()
        assert self.wait() == 0, error

    def wait(self) -> int:
        """The exit code; negative is a signal's number."""
        if self._code is None:
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
            os.close(self._errors)
        return self._code

    def kill(self) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def expire(number: int, frame: object) -> None:
        raise TimeoutError(f"the test took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _leavings() -> set[str]:
    own = sessions_folder()
    sessions = {str(path) for path in own.iterdir() if path.is_dir()}
    # What runs beside these tests, another run of them above all, has its sessions in another folder: those arenas are
    # not this run's.
    folders = [path for pattern in ("*/tsqp-shm", "tsqp-shm-*") for path in Path("/tmp").glob(pattern) if path != own]
    others = {path.name for folder in folders for path in folder.glob("*")}
    prefix = arena_name("").removeprefix("/")
    arenas = {path.name.removeprefix(prefix) for path in Path("/dev/shm").glob(f"{prefix}*")}
    shared = {f"arena of session {name}" for name in arenas - others}
    return shared | sessions | {f"child {pid}" for pid in children()}
