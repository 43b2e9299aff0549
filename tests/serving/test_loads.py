"""What the trusted process loads when it answers HTTP, held against the list in docs/threat-model.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "threat-model.md"
LOADED = """
import json, os, sys
import tsqp_shm.cli, tsqp_shm.llm, tsqp_shm.shm.posix.transport
before = set(sys.modules)
import tsqp_shm.serve.run
files = {}
for name in set(sys.modules) - before:
    path = getattr(sys.modules[name], "__file__", None)
    if path and "site-packages" in path:
        files.setdefault(name.partition(".")[0], {})[path] = os.path.getsize(path)
print(json.dumps({name: sum(sizes.values()) for name, sizes in files.items()}))
heavy = ("torch", "transformers", "pydantic", "fastapi", "openai")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_the_server_loads_the_packages_that_the_threat_model_lists_and_no_other():
    printed = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True).stdout
    sizes, heavy = map(json.loads, printed.splitlines())
    assert heavy == []
    section = DOCUMENT.read_text().split("## What a server's callers can reach")[1].split("\n## ")[0]
    listed = {name: int(kib) for name, kib in re.findall(r"^\| `(\w+)` \| \d+ \| (\d+) \|", section, re.MULTILINE)}
    assert set(sizes) == set(listed)
    for name, kib in listed.items():
        # Of other versions, for an older Python, it may be somewhat more or less.
        assert sizes[name] / 1024 <= 1.5 * kib + 4, name
