"""Which folder a model's name means: a local one, one of the Hugging Face cache, or the demo model's."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tsqp_shm.errors import ConfigError, ModelFileError
from tsqp_shm.files import open_regular
from tsqp_shm.printable import quoted
from tsqp_shm.scalars import path

_EXPECTED = "a model folder, a Hugging Face id that was fetched before, or nothing for the demo model"
_HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
# Of a commit's name.
_MAX_REF_BYTES = 256
_REVISION = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)*", re.ASCII)


def find_model_folder(
    model: object = None, revision: str | None = None, report: Callable[[str], None] | None = None
) -> Path:
    """The folder of a model. Only the demo model is fetched, where it is not cached; nothing else uses a network.

    Args:
        model: a folder, which wins over an id of the same name; None: the demo model.
        revision: of a Hugging Face id: a branch, tag or commit; None: main.
        report: takes lines about the fetching of the demo model; None: they go to stderr.

    Raises:
        ConfigError: it is no name.
        ModelFileError: there is no such folder, or the demo model cannot be fetched.
    """
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise ConfigError("revision", revision, "a branch, tag or commit", is_mistyped=not isinstance(revision, str))
    if model is None:
        # Imported here because it is needed here only.
        from tsqp_shm.demo.model import demo_model_folder

        folder = demo_model_folder(report or _to_stderr)
    else:
        named = path(model)
        if named is None:
            raise ConfigError("model", model, _EXPECTED, is_mistyped=not isinstance(model, (str, bytes)))
        folder = named if os.path.lexists(named) else _home(named)
        # As it was written: a path may look like an id without its "./".
        written = os.fsdecode(model)  # type: ignore[arg-type]
        if not os.path.lexists(folder) and _HUB_ID.fullmatch(written):
            return _cached_folder(written, revision)
    if revision is not None:
        raise ConfigError("revision", revision, f"none, as {folder} is a local folder")
    return folder


def _home(folder: Path) -> Path:
    try:
        return folder.expanduser()
    except RuntimeError:
        # There is no such user.
        return folder


def _cached_folder(hub_id: str, revision: str | None) -> Path:
    """A snapshot of the Hugging Face cache.

    Source: huggingface_hub, "Understand caching": models--ORG--NAME/refs/REVISION holds a commit, and
    snapshots/COMMIT the files.
    """
    kept = _hub_cache() / f"models--{hub_id.replace('/', '--')}"
    wanted = revision or "main"
    folder = kept / "snapshots" / _commit(kept / "refs" / wanted, wanted)
    # Path.is_dir raises where a folder on the way may not be looked into.
    if os.path.isdir(folder):  # noqa: PTH112
        return folder
    if "/" not in hub_id and not os.path.isdir(kept):  # noqa: PTH112
        raise ModelFileError(hub_id, "there is no such folder")
    fetch = f"huggingface-cli download {hub_id}" + (f" --revision {revision}" if revision else "")
    where = f"nor is revision {wanted} of a model of this name in the Hugging Face cache {_hub_cache()}"
    raise ModelFileError(hub_id, f"there is no such folder, {where}; to fetch it: {fetch}")


def _commit(ref: Path, wanted: str) -> str:
    """What a ref says; a commit has none, and is meant itself.

    Raises:
        ModelFileError: the ref cannot be read, or is none.
    """
    try:
        with os.fdopen(open_regular(ref, follows_links=True), "rb") as file:
            commit = file.read(_MAX_REF_BYTES + 1).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return wanted
    except OSError as error:
        raise ModelFileError(ref, error.strerror or quoted(error)) from error
    if len(commit) > _MAX_REF_BYTES or not _REVISION.fullmatch(commit):
        raise ModelFileError(ref, "holds no name of a commit")
    return commit


def _hub_cache() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return _written(os.environ[variable])
    if os.environ.get("HF_HOME"):
        return _written(os.environ["HF_HOME"]) / "hub"
    return _written(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _written(folder: str) -> Path:
    return _home(Path(os.path.expandvars(folder)))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
