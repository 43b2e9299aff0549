"""Keys of pads: what they are derived from, and where they are and are not."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tsqp_shm import _native

NOBODY = 65534
SEED = bytes(range(100, 132))
SESSION, DIGEST, EPOCH = b"session", b"digest", 3
# Locked, left out of cores, zeros in a forked child (proc(5)).
SECRET = {"lo", "dd", "wf"}


def root_of(seed: bytes) -> bytes:
    extract = HMAC(b"tsqp-shm pads 1", hashes.SHA256())
    extract.update(seed)
    return extract.finalize()


def derived(label: bytes, suffix: bytes, size: int) -> bytes:
    lengths = [len(part).to_bytes(2, "big") + part for part in (SESSION, DIGEST)]
    info = label + b"".join(lengths) + EPOCH.to_bytes(8, "big") + suffix
    return HKDFExpand(hashes.SHA256(), size, info).derive(root_of(SEED))


def key_of(linear: int) -> bytes:
    return derived(b"pad key", linear.to_bytes(4, "big"), 32)


def mappings(pid: int | str) -> Iterator[tuple[range, set[str]]]:
    """Where a process's mappings lie, and their flags."""
    addresses = range(0)
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if begins := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            addresses = range(*(int(address, 16) for address in begins.groups()))
        elif line.startswith("VmFlags:"):
            yield addresses, set(line.split()[1:])


def secret_bytes() -> int:
    """How much memory for secrets this process has; the kernel may show neighbours as one mapping."""
    return sum(len(addresses) for addresses, flags in mappings("self") if flags >= SECRET)


def test_the_key_id_is_derived_as_the_keys_are():
    keys = _native.PadKeys(SESSION, DIGEST, EPOCH, 5, SEED)
    assert keys.key_id == derived(b"key id", b"", 16).hex()
    assert keys.num_linears == 5


def test_keys_of_the_systems_generator_are_others_each_time():
    assert len({_native.PadKeys(SESSION, DIGEST, EPOCH, 1).key_id for _ in range(20)}) == 20


def test_a_new_epoch_of_the_same_seed_has_other_keys():
    assert len({_native.PadKeys(SESSION, DIGEST, epoch, 1, SEED).key_id for epoch in (0, 1, 256, 2**64 - 1)}) == 4


def test_python_sees_neither_keys_nor_pads():
    public = {name for name in dir(_native.PadKeys) if not name.startswith("_")}
    assert public == {"key_id", "num_linears"}


@pytest.mark.parametrize(
    ("session", "num_linears", "seed", "message"),
    [
        (SESSION, 0, None, "num_linears: got 0, expected 1 to"),
        (bytes(65_536), 1, None, "session: got 65536 bytes, expected at most 65535"),
        (SESSION, 1, bytes(31), "seed: got 31 bytes, expected 32"),
    ],
)
def test_what_no_keys_can_be_made_of_is_refused(session, num_linears, seed, message):
    with pytest.raises(ValueError, match=message):
        _native.PadKeys(session, DIGEST, EPOCH, num_linears, seed)


def test_keys_lie_in_memory_for_secrets_that_goes_with_them():
    before = secret_bytes()
    keys = _native.PadKeys(SESSION, DIGEST, EPOCH, 121)
    assert secret_bytes() - before == 32 * 1024
    del keys
    assert secret_bytes() == before


@pytest.mark.parametrize(("limit_kib", "num_linears", "needed_kib"), [(0, 1, 4), (16, 121, 32)])
def test_memory_that_may_not_be_locked_is_an_error_that_says_how_much(forked, limit_kib, num_linears, needed_kib):
    def run():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit_kib * 1024,) * 2)
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        expected = rf"{needed_kib} KiB of memory for keys.*locked.*\(ulimit -l\) is {limit_kib} KiB"
        with pytest.raises(OSError, match=expected):
            _native.PadKeys(SESSION, DIGEST, EPOCH, num_linears)

    forked(run).join()


MAKE_KEYS = f"""
import sys
from tsqp_shm import _native
keys = _native.PadKeys({SESSION!r}, {DIGEST!r}, {EPOCH}, 3, bytes(range(100, 132)))
print("made", flush=True)
sys.stdin.readline()
del keys
print("gone", flush=True)
sys.stdin.readline()
"""


def places(pid: int, secret: bytes) -> list[bool]:
    """For each place where a process has these bytes, whether it is memory for secrets."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for addresses, flags in mappings(pid):
            if "rd" not in flags or "pf" in flags or "io" in flags:
                continue
            memory.seek(addresses.start)
            try:
                content = memory.read(len(addresses))
            except OSError:  # the kernel's own pages
                continue
            found += [flags >= SECRET] * content.count(secret)
    return found


def test_a_process_has_its_keys_in_memory_for_secrets_alone():
    """And nowhere what they are derived with: the root, and that as HMAC begins with it."""
    root = root_of(SEED)
    padded = [bytes(byte ^ pad for byte in root) for pad in (0x36, 0x5C)]
    with subprocess.Popen([sys.executable, "-c", MAKE_KEYS], stdin=-1, stdout=-1, text=True, bufsize=1) as process:
        assert process.stdout.readline() == "made\n"
        for linear in range(3):
            assert places(process.pid, key_of(linear)) == [True]
        for secret in (root, *padded):
            assert places(process.pid, secret) == []
        print(file=process.stdin)
        assert process.stdout.readline() == "gone\n"
        for linear in range(3):
            assert places(process.pid, key_of(linear)) == []
        process.stdin.close()
