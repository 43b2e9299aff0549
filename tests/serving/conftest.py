"""A server that several tests ask: the demo model in the TEE process alone, which is up at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, demo_server

pytest.importorskip("uvicorn", reason="pip install '.[serve]'")

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def server(runtime_folder: Path, demo_model: Path) -> Iterator[Server]:
    with demo_server(demo_model, "--mode", "tee-only", "--max-num-seqs", 4, "--max-queue", 12) as started:
        yield started


@pytest.fixture(scope="module")
def locked(runtime_folder: Path, demo_model: Path) -> Iterator[Server]:
    """One that asks for keys."""
    flags = [word for key in KEYS for word in ("--api-key", key)]
    with demo_server(demo_model, "--mode", "tee-only", *flags) as started:
        yield started
