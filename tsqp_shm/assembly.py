"""What the session of an `LLM` is put together of: the files that it writes, its GPU process, its runtime."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tsqp_shm.arguments import require_writable
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import ConfigError
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.modes import MODES, Mode
from tsqp_shm.roles.process import RoleProcess
from tsqp_shm.scalars import path
from tsqp_shm.shm.transport import Hold, Register, Transport
from tsqp_shm.tee.evidence import Evidence
from tsqp_shm.tee.gpu_connection import StartGpu
from tsqp_shm.tee.receipts import nonces_path
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.witness import Witness
from tsqp_shm.trace.file import TraceFile
from tsqp_shm.trace.recorder import recording


class Records(NamedTuple):
    """The files that a session writes; None where it is not asked to."""

    trace: Path | None
    evidence: Path | None
    transcript: Path | None

    @classmethod
    def chosen(cls, mode: Mode, trace: object, evidence: object, transcript: object) -> Records:
        """Raises:
        ConfigError: one is no file, cannot be written, is the other one's, or is not for this mode.
        """
        records = cls(_file("trace", trace), _file("evidence", evidence), _file("transcript", transcript))
        for argument, file, reason in (
            ("evidence", records.evidence, "nothing holds its answers" if mode.arithmetic is None else None),
            ("transcript", records.transcript, "no product of it is checked" if not mode.num_vectors else None),
        ):
            if file is not None and reason is not None:
                raise ConfigError(argument, str(file), f"none, as mode {mode.name} is one where {reason}")
            require_writable(argument, None if file is None else str(file))
        if records.evidence is not None and records.transcript is not None:
            _require_apart(records.evidence, records.transcript)
        return records


def assembled(
    model: Path,
    files: ModelFiles,
    spec: ModelSpec,
    tokenizer: Tokenizer | None,
    config: EngineConfig,
    records: Records,
    transport: Transport | None,
    start_gpu: bool | StartGpu,
    report: Callable[[str], None],
) -> tuple[Runtime, Witness]:
    """A runtime that is to be started, and who writes down what comes of its requests.

    Args:
        files: of the model's folder.
        tokenizer: whose process ends with the session, or with what keeps that from coming up.
        transport: and what follows, as of `LLM`; nothing of them may hold the LLM.
    """
    has_gpu = MODES[config.mode].has_gpu_process
    with ExitStack() as stack:
        if tokenizer is not None:
            stack.callback(tokenizer.close)
        # Where somebody else starts the GPU process, the trace of both is theirs to make.
        roles = ("tee", "gpu") if has_gpu else ("tee",)
        starts_all = start_gpu is True
        whole = stack.enter_context(TraceFile(records.trace, roles, report)) if records.trace and starts_all else None
        recorder = stack.enter_context(recording(whole.recording("tee") if whole else records.trace, "tee"))
        if not has_gpu:
            start_gpu = False
        witness = Witness(
            None if records.evidence is None else Evidence(records.evidence),
            None if records.transcript is None else Transcript(records.transcript),
        )
        stack.callback(witness.close)
        if start_gpu is True:
            traced = (whole.arguments("gpu"), [whole.descriptor("gpu")]) if whole else ([], [])
            start_gpu = partial(_start_gpu, model, config, *traced, report)
        with Checkpoint.open(model) as checkpoint:
            runtime = Runtime(
                spec, checkpoint, config, transport or _posix(config), start_gpu or None, report, recorder,
                before=stack, files=files, witness=witness,
            )  # fmt: skip
    return runtime, witness


def _file(argument: str, value: object) -> Path | None:
    found = None if value is None else path(value)
    if value is not None and found is None:
        raise ConfigError(argument, value, "a file", is_mistyped=True)
    return found


def _require_apart(evidence: Path, transcript: Path) -> None:
    """Raises:
    ConfigError: one would be written over the other, or over what opens its records.
    """
    for other, what in ((evidence, "the evidence"), (nonces_path(evidence), "the evidence's nonces")):
        if transcript.resolve() == other.resolve():
            raise ConfigError("transcript", str(transcript), f"a file of its own, as this one is of {what}")


def _posix(config: EngineConfig) -> Transport | Register:
    if not MODES[config.mode].has_gpu_process:
        from tsqp_shm.shm.posix.register import PosixRegister

        return PosixRegister(config.session)
    # Not at the top: it loads ZeroMQ, which is for waking another process.
    from tsqp_shm.shm.posix.transport import PosixTransport

    return PosixTransport(config.session, config.endpoint)


def _start_gpu(
    model: Path,
    config: EngineConfig,
    traced: list[str],
    descriptors: list[int],
    report: Callable[[str], None],
    session: Hold,
) -> RoleProcess:
    arguments = [str(model), *session.gpu_flags, *config.gpu_arguments(), *traced]
    return RoleProcess.start("gpu", arguments, descriptors=descriptors, listen=report)
