"""A folder of random weights does not outlive its owner for long, however that ends."""

import os
import signal
import tempfile

import pytest

from tsqp_shm.bench.scratch import LOCK_FILE, PREFIX, scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


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
        assert folder.parent.parent == temporary
    assert not folder.parent.exists()


def test_one_whose_owner_was_killed_is_removed_by_the_next(owner):
    process, folder = owner
    process.kill()
    with scratch_folder():
        assert not folder.exists()


def test_one_whose_owner_lives_stays(owner):
    _, folder = owner
    with scratch_folder():
        assert (folder / "model" / "weights").exists()


def test_what_has_such_a_name_and_is_none_stays(temporary):
    """A folder of the user's own, with and without a file that is called a lock; a file; a link; a pipe as a lock."""
    empty, own, file, link, pipe = (temporary / f"{PREFIX}{kind}" for kind in ("empty", "own", "file", "link", "pipe"))
    for folder in (empty, own, pipe):
        folder.mkdir()
    (own / LOCK_FILE).write_text("mine")
    (own / "results").write_text("mine")
    os.mkfifo(pipe / LOCK_FILE)
    file.write_text("mine")
    link.symlink_to(own)
    before = sorted(temporary.rglob("*"))
    with scratch_folder():
        pass
    assert sorted(temporary.rglob("*")) == before
