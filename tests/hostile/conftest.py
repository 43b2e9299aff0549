"""What the tests of hostile peers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import ForkServer


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Forks GPU roles that break one rule."""
    server = ForkServer("hostile_gpu")
    yield server
    server.close()


@pytest.fixture(scope="module")
def field_server() -> Iterator[ForkServer]:
    """The same of mode `verified`."""
    server = ForkServer("hostile_field")
    yield server
    server.close()
