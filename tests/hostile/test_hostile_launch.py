"""A launch of mode `verified` whose own GPU process turns against it: the real one, with somebody else's code in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import RandomModel, with_bytes_as_tokens

# In the GPU process: before its product of that number it changes a weight; when it is asked for the next, it dies.
HOSTILE_SITE = """
import os, signal, sys
if "gpu" in sys.orig_argv[:5]:
    import numpy as np
    from tsqp_shm.gpu.field_products import NativeFieldProducts
    cheats, dies, once = CHEATS, DIES, "ONCE"
    done = 0
    linear = NativeFieldProducts.linear
    def hostile_linear(self, record):
        global done
        if record.target == 1:
            done += 1
            if done == 3 and cheats:
                weights = self._linears[1]
                row = weights.quantised(0, 1).astype(np.float32)
                row[0, 0] += 1 if row[0, 0] < 100 else -1
                weights.set_rows(0, row)
        elif done == 3 and dies and not os.path.exists(once):
            open(once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        linear(self, record)
    NativeFieldProducts.linear = hostile_linear
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    fields = {"vocab_size": 256}
    return with_bytes_as_tokens(RandomModel("llama", fields).write(tmp_path_factory.mktemp("launch") / "model"))


def launched(model: Path, folder: Path, mode: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tsqp_shm", "launch", str(model), "--mode", mode, "--prompt", "Who goes there?", "-q",
         "--max-new-tokens", "8", "--ignore-eos", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), *sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("cheats", "dies"), [(True, False), (True, True), (False, True)])
def test_it_ends_by_exit_code_4_where_it_cheats_and_goes_on_where_it_only_dies(model, tmp_path, cheats, dies):
    site = HOSTILE_SITE.replace("CHEATS", str(cheats)).replace("DIES", str(dies))
    (tmp_path / "sitecustomize.py").write_text(site.replace("ONCE", str(tmp_path / "once")))
    alone = launched(model, tmp_path, "tee-only")
    assert (alone.returncode, alone.stderr) == (0, b"")
    done = launched(model, tmp_path, "verified", "--device", "cpu", "--restart-gpu", "1")
    if cheats:
        assert done.returncode == 4
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("tsqp-shm: a result of the gpu process is false: o of layer 0 (see ")
        # The prompt's pass and one more came before.
        assert alone.stdout.startswith(done.stdout.rstrip(b"\n"))
        assert len(done.stdout) < len(alone.stdout)
    else:
        assert (done.returncode, done.stdout) == (0, alone.stdout)
    assert (tmp_path / "once").exists() == dies
