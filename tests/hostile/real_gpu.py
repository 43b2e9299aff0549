"""The real GPU process, for a TEE that is hostile: what `tsqp-shm gpu` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import TsqpError
from tsqp_shm.gpu.worker import serve, use_threads
from tsqp_shm.shm.posix.transport import PosixTransport


def main(arguments: Sequence[str]) -> None:
    model, session = arguments
    try:
        config = EngineConfig(device="cpu", timeout_s=10)
        use_threads(1)
        serve(Path(model), PosixTransport(session), config, lambda line: None, lambda: None)
    except TsqpError as error:
        # As the command line does: one line, and the error's own exit code.
        raise SystemExit(error.exit_code) from error
