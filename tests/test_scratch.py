"""A folder of random weights does not outlive its owner for long, however that ends."""

import os
import signal
import tempfile

import pytest

from tsqp_shm.bench.scratch import PREFIX, YOUNG_S, scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def grow_old(folder):
    os.utime(folder, (0, folder.stat().st_mtime - 2 * YOUNG_S))


@pytest.fixture
def owner(forked, temporary):
    """A process that has such a folder until it is killed."""
    told, tell = os.pipe()

    def own():
        with scratch_folder() as folder:
            (folder / "weights").write_bytes(b"x")
            os.write(tell, b"x")
            signal.pause()

    process = forked(own)
    os.read(told, 1)
    os.close(told)
    os.close(tell)
    (folder,) = temporary.glob(f"{PREFIX}*")
    return process, folder


def test_it_is_gone_after_the_block(temporary):
    with scratch_folder() as folder:
        (folder / "weights").write_bytes(b"x")
        assert folder.parent == temporary
    assert not folder.exists()


def test_one_whose_owner_was_killed_is_removed_by_the_next(owner):
    process, folder = owner
    process.kill()
    grow_old(folder)
    with scratch_folder():
        assert not folder.exists()


def test_one_whose_owner_lives_stays(owner):
    _, folder = owner
    grow_old(folder)
    with scratch_folder():
        assert (folder / "weights").exists()


def test_one_that_was_just_made_stays_and_what_is_not_a_folder_too(temporary):
    young, file, link = temporary / f"{PREFIX}young", temporary / f"{PREFIX}file", temporary / f"{PREFIX}link"
    young.mkdir()
    file.write_text("mine")
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    grow_old(elsewhere)
    with scratch_folder():
        assert young.exists()
        assert file.exists()
        assert elsewhere.exists()
