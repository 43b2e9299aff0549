"""A file that is written is this process's alone, whoever has laid something under its name before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tsqp_shm.errors import EvidenceError
from tsqp_shm.files import replace_file
from tsqp_shm.tee.transcript import Transcript


def write_whole(path: Path) -> None:
    replace_file(path, b"secret")


def write_transcript(path: Path) -> None:
    transcript = Transcript(path)
    transcript.end_pass()
    transcript.close()


def part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@pytest.mark.parametrize(("write", "laid"), [(write_whole, part_of), (write_transcript, Path)])
def test_who_has_laid_a_file_under_the_name_has_nothing_of_what_is_written(
    tmp_path, write: Callable, laid: Callable[[Path], Path]
):
    path = tmp_path / "file"
    laid(path).write_bytes(b"his")
    laid(path).chmod(0o666)
    with laid(path).open("rb") as his:
        write(path)
        assert his.read() == b"his"
        assert os.fstat(his.fileno()).st_ino != path.stat().st_ino
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("write", "laid"), [(write_whole, part_of), (write_transcript, Path)])
def test_a_link_under_the_name_is_not_followed(tmp_path, write: Callable, laid: Callable[[Path], Path]):
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_bytes(b"mine")
    laid(path).symlink_to(other)
    write(path)
    assert other.read_bytes() == b"mine"
    assert not path.is_symlink()


@pytest.mark.parametrize(("write", "laid"), [(write_whole, part_of), (write_transcript, Path)])
def test_what_is_no_file_under_the_name_is_refused_and_stays(tmp_path, write: Callable, laid: Callable[[Path], Path]):
    path = tmp_path / "file"
    os.mkfifo(laid(path))
    with pytest.raises((OSError, EvidenceError), match="is no regular file"):
        write(path)
    assert laid(path).is_fifo()


def test_what_was_there_stays_when_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"before")
    with pytest.raises(TypeError):
        replace_file(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
