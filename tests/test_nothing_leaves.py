"""What a session without a GPU process could be read by, or give to others, while it computes."""

from __future__ import annotations

import json
import subprocess
import sys

from models import RandomModel, with_bytes_as_tokens

CANARY = "the treasure lies under the third oak"
# Looks at itself between two tokens of an answer: its mappings, its descriptors, its children.
LOOKS_AT_ITSELF = """
import json, os, socket, stat, sys
from pathlib import Path
from tsqp_shm import LLM, SamplingParams

def descriptors():
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            mode, flags = os.fstat(fd).st_mode, int(Path(f"/proc/self/fdinfo/{fd}").read_text().split()[3], 8)
        except OSError:
            continue  # the listing's own
        yield fd, mode, flags & os.O_ACCMODE

def peer(fd):
    with socket.socket(fileno=os.dup(fd)) as found:
        return found.family == socket.AF_UNIX and not found.getsockname() and not found.getpeername()

with LLM(sys.argv[1], mode="tee-only", max_model_len=256) as llm:
    answer = llm.stream(sys.argv[2], SamplingParams(max_tokens=60, temperature=1.0, seed=5, ignore_eos=True))
    next(answer)
    found = [(fd, mode, access) for fd, mode, access in descriptors() if fd > 2]
    written = [fd for fd, mode, access in found if stat.S_ISREG(mode) and access != os.O_RDONLY]
    report = {
        "shared": [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[1][1::2] == "ws"],
        "children": sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children")),
        "unnamed_sockets": [peer(fd) for fd, mode, _ in found if stat.S_ISSOCK(mode)],
        "pipes": sum(stat.S_ISFIFO(mode) for _, mode, _ in found),
        "written": {os.readlink(f"/proc/self/fd/{fd}"): os.pread(fd, 1 << 20, 0).hex() for fd in written},
    }
print(json.dumps(report))
"""


def test_a_process_that_computes_alone_shares_no_memory_and_is_connected_to_nobody(tmp_path, runtime_folder):
    folder = with_bytes_as_tokens(RandomModel("llama", {"vocab_size": 256}).write(tmp_path / "model"))
    command = [sys.executable, "-c", LOOKS_AT_ITSELF, str(folder), CANARY]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    report = json.loads(done.stdout)
    # No mapping that this process may write and another may read.
    assert report["shared"] == []
    # The confined process, over sockets that were made together and have no name by which others could connect.
    assert report["children"] == 1
    assert report["unnamed_sockets"]
    assert all(report["unnamed_sockets"])
    assert report["pipes"] == 0
    # What it writes lies in the session's folder, and holds neither the text nor its tokens, which are its bytes here.
    assert report["written"]
    for path, content in report["written"].items():
        assert path.startswith(str(runtime_folder))
        for width in (1, 2, 4, 8):
            canary = b"".join(letter.to_bytes(width, "little") for letter in CANARY[:6].encode())
            assert canary not in bytes.fromhex(content)
