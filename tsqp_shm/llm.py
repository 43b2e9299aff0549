"""The Python API. The process that makes an `LLM` is the TEE role; the GPU process is started beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tsqp_shm import _native
from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import (
    ConfigError,
    ModelFileError,
    PeerDied,
    PeerTimeout,
    ProtocolError,
    RequestError,
    TsqpError,
)
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.outputs import CompletionOutput, RequestOutput
from tsqp_shm.roles.process import RoleProcess, peak_resident_bytes
from tsqp_shm.roles.resources import require_resources
from tsqp_shm.shm.session import Session
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.connection import Connection, StartGpu
from tsqp_shm.tee.engine import Chunk, Engine, NormWeights
from tsqp_shm.tee.interrupts import held_interrupts
from tsqp_shm.tee.sampler import SamplingParams
from tsqp_shm.tee.scheduler import Scheduler
from tsqp_shm.tee.statistics import Statistics, TracedStatistics
from tsqp_shm.trace.file import TraceFile
from tsqp_shm.trace.recorder import recording

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

Prompt = str | Sequence[int]
T = TypeVar("T")


class LLM:
    """A model split between this process and a GPU process.

    Args:
        model: a Hugging Face folder.
        start_gpu: False where somebody else starts `tsqp-shm gpu MODEL --session NAME`; or what starts it.
        report: takes lines about what is waited for, what the GPU process says, and its restarts.
        trace: a file for a trace of both processes, written at the end, of the GPU processes the last one; unless
            `start_gpu` is True for a recording of this process alone, of which `tsqp-shm trace` makes one.
        config: fields of `EngineConfig`; `TSQP_SHM_*` environment variables fill what is not given.

    Raises:
        ConfigError: a setting is not allowed, or the trace cannot be written.
        ModelFileError, UnsupportedModel: the model cannot be used.
        DeviceError: the device is not there or too small.
        LimitError: too few file descriptors or threads.
        SessionBusy, ArenaError: the session cannot begin.
        PeerDied, PeerTimeout: the GPU process did not come up.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        start_gpu: bool | StartGpu = True,
        report: Callable[[str], None] = lambda line: None,
        trace: str | Path | None = None,
        **config: Any,
    ) -> None:
        self.config = _engine_config(config)
        threads = self.config.threads().tee
        require_resources(threads)
        self.model = Path(model)
        self.spec = ModelSpec.from_folder(self.model)
        self._limits = self.config.limits(self.spec.max_position_embeddings, self.spec.layer_parameters)
        self.max_model_len = self._limits.max_model_len
        self._tokenizer = Tokenizer.from_folder(self.model) if _has_tokenizer(self.model) else None
        with Checkpoint.open(self.model) as checkpoint:
            self._norms = NormWeights.load(self.spec, checkpoint)
        _native.set_num_threads(threads)
        self._fault: Exception | None = None
        self._report = report
        self._start = start_gpu if callable(start_gpu) else self._start_gpu if start_gpu else None
        with ExitStack() as stack:
            path = None if trace is None else Path(trace)
            # Where somebody else starts the GPU process, the trace of both is theirs to make.
            self._trace = stack.enter_context(TraceFile(path, report)) if path and start_gpu is True else None
            recorded = recording(self._trace.recording("tee") if self._trace else path, "tee")
            self._recorder = stack.enter_context(recorded)
            self.statistics = Statistics() if self._recorder is None else TracedStatistics(self._recorder)
            self._session = stack.enter_context(Session.begin(self.config.session))
            self._open_connection()
            stack.callback(lambda: self._connection.close())
            self._scheduler = Scheduler(self._engine, self._connection.arena.plan, self.statistics)
            self._stack = stack.pop_all()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: Any) -> None:
        self._fault = self._fault or TsqpError("this LLM is closed")
        self._stack.__exit__(*error)

    def close(self) -> None:
        """Stops the GPU process and removes the arena. Closing twice does nothing."""
        self.__exit__(None, None, None)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises:
        ModelFileError: the model folder has none; prompts are token ids then.
        """
        if self._tokenizer is None:
            raise ModelFileError(self.model / "tokenizer.json", "there is no such file; give prompts as token ids")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts together, as one ragged batch.

        Args:
            prompts: a string, a list of token ids, or a list of either.

        Raises:
            RequestError: a prompt is empty, too long or holds a token id outside the vocabulary; nothing was run.
            PeerDied, PeerTimeout, ProtocolError: the session is over; a death only when no `restart_gpu` is left.
        """
        completions = [(prompt, self.start(prompt, params)) for prompt in _as_list(prompts)]
        with self._scheduled([completion for _, completion in completions]):
            while any(completion.finish_reason is None for _, completion in completions):
                self._step()
        return [RequestOutput.of(prompt, completion) for prompt, completion in completions]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[str, None, None]:
        """Completes one prompt, piece by piece; a piece never splits a character.

        Closing the generator cancels the completion.

        Raises:
            As `generate`, RequestError at the call and not at the first piece.
        """
        return self.stream_completion(self.start(prompt, params))

    def start(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """A completion to be run by `stream_completion`.

        Raises:
            RequestError: as `generate`.
        """
        self._require_working()
        params = params or SamplingParams()
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", params.stop, "no stop strings, as the model has no tokenizer")
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        # One place is left for an answer.
        token_ids = self._checked(token_ids, self.max_model_len - 1)
        room = self.max_model_len - len(token_ids)
        max_tokens = min(params.max_tokens, room)
        return Completion(token_ids, params, max_tokens, self.spec.eos_token_ids, self._tokenizer)

    def stream_completion(self, completion: Completion) -> Generator[str, None, None]:
        """Runs a completion of `start`, yielding its new text after each token that makes some."""
        shown = 0
        with self._scheduled([completion]):
            # Steps that other streams take bring this completion on too, so there may be text without a step.
            while (piece := completion.text[shown:]) or completion.finish_reason is None:
                if piece:
                    shown += len(piece)
                    yield piece
                else:
                    self._step()

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The logits after every token of one sequence.

        Shapes: [T, V] f32.

        Raises:
            RequestError: as `generate`.
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        ids = self._checked(list(token_ids), self.max_model_len)
        self._require_working()
        if not self._scheduler.is_idle:
            raise RequestError("logits", "called", "no completion in progress")
        step = self._connection.arena.plan.slot("tokens").num_rows

        def forward() -> list[npt.NDArray[np.float32]]:
            rows = []
            for position in range(0, len(ids), step):
                chunk = ids[position : position + step]
                with held_interrupts():
                    rows.append(self._engine.forward([Chunk(0, position, chunk, num_logits=len(chunk))]))
            return rows

        with self._faults_end_the_session():
            return np.concatenate(self._survive(forward))

    def bring_up(self) -> dict[str, Any]:
        """Mode, processes, arena and doorbell of this session, as plain values."""
        return {**self._connection.describe(), "model": str(self.model)}

    def stats(self) -> dict[str, Any]:
        """What `tsqp-shm launch` prints, as plain values. Units are in the names."""
        statistics = self.statistics
        facts = self.bring_up()
        facts["processes"]["tee"]["peak_rss_bytes"] = peak_resident_bytes()
        with held_interrupts(), self._faults_end_the_session():
            peak = 0 if self._fault else self._survive(lambda: self._connection.gpu_peak_resident_bytes())
        facts["processes"]["gpu"]["peak_rss_bytes"] = peak
        facts["doorbell"].update(
            rung=statistics.doorbells,
            round_trip_p50_us=statistics.round_trip_us(50),
            round_trip_p99_us=statistics.round_trip_us(99),
            waits=dict(self._connection.doorbell.waits),
            waiting_s=statistics.waiting_ns / 1e9,
        )
        facts["bytes"] = {
            "to_gpu": statistics.bytes_to_gpu,
            "to_tee": statistics.bytes_to_tee,
            # Every tensor crosses in its slot; a record is 64 bytes of numbers.
            "serialised": 0,
        }
        facts["operations"] = statistics.operations()
        return facts

    def _step(self) -> None:
        self._require_working()
        with held_interrupts():
            self._survive(self._advance)

    def _advance(self) -> None:
        self._connection.progress.step_begins(*self._scheduler.load)
        self._scheduler.step()
        self._connection.progress.step_ends(*self._scheduler.load)

    def _survive(self, act: Callable[[], T]) -> T:
        """Does it again with another GPU process where one dies, as often as `restart_gpu` allows."""
        while True:
            try:
                return act()
            except PeerDied as death:
                self._restart_gpu(death)

    def _restart_gpu(self, death: PeerDied) -> None:
        """Puts another GPU process in the place of one that died; every completion goes on from the tokens it has.

        Raises:
            PeerDied: no restart is left.
            TsqpError: what kept the other from coming up.
        """
        # Whatever ends this early, Ctrl-C included, leaves nothing to go on with.
        self._fault = death
        died_s = time.monotonic()
        while True:
            if self.statistics.gpu_restarts >= self.config.restart_gpu:
                raise death
            self.statistics.gpu_restarts += 1
            self._report(f"{death}\nrestart {self.statistics.gpu_restarts} of {self.config.restart_gpu}")
            self._connection.abandon()
            waits = self._connection.doorbell.waits
            try:
                self._open_connection()
                break
            except PeerDied as another:
                death = another
        self._connection.doorbell.waits.update(waits)
        self._scheduler.start_over(self._engine)
        self._fault = None
        self._report(f"the gpu process is back after {time.monotonic() - died_s:.1f} s")

    def _open_connection(self) -> None:
        self._connection = Connection.open(
            self._session, self.spec, self.config, self._limits, self.statistics, self._start, self._report,
            self._recorder,
        )  # fmt: skip
        self._engine = Engine(self.spec, self._norms, self._connection.slots, self._connection.queue, self.statistics)

    def _start_gpu(self, session: str) -> RoleProcess:
        arguments = [
            str(self.model),
            "--session",
            session,
            "--device",
            self.config.device,
            "--pinning",
            self.config.pinning,
        ]
        arguments += ["--timeout", str(self.config.timeout_s)]
        if self.config.gpu_threads is not None:
            arguments += ["--gpu-threads", str(self.config.gpu_threads)]
        if self._trace is not None:
            arguments += self._trace.arguments("gpu")
        return RoleProcess.start("gpu", arguments, listen=self._report)

    def _checked(self, token_ids: list[int], most: int) -> list[int]:
        if not token_ids:
            raise RequestError("prompt", "", "at least one token")
        if len(token_ids) > most:
            raise RequestError(
                "prompt",
                f"{len(token_ids)} tokens",
                f"at most {most} (max_model_len is {self.max_model_len})",
            )
        for token_id in token_ids:
            is_number = isinstance(token_id, (int, np.integer)) and not isinstance(token_id, bool)
            if not is_number or not 0 <= token_id < self.spec.vocab_size:
                raise RequestError("token id", token_id, f"0 to {self.spec.vocab_size - 1}")
        return token_ids

    @contextmanager
    def _scheduled(self, completions: list[Completion]) -> Iterator[None]:
        """Lets completions run in the block; those that have not ended when it is left are cancelled."""
        for completion in completions:
            self._scheduler.add(completion)
        try:
            with self._faults_end_the_session():
                yield
        finally:
            for completion in completions:
                self._scheduler.cancel(completion)
            if self._fault is None:
                self._connection.progress.step_ends(*self._scheduler.load)

    @contextmanager
    def _faults_end_the_session(self) -> Iterator[None]:
        try:
            yield
        except (PeerDied, PeerTimeout, ProtocolError) as error:
            self._fault = error
            self._connection.mark_broken()
            raise

    def _require_working(self) -> None:
        if self._fault is not None:
            raise self._fault


def _engine_config(values: dict[str, Any]) -> EngineConfig:
    unknown = sorted(set(values) - set(EngineConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(unknown[0], values[unknown[0]], "one of " + ", ".join(EngineConfig.__dataclass_fields__))
    return EngineConfig.from_environment(values)


def _has_tokenizer(model: Path) -> bool:
    return (model / "tokenizer.json").exists()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and not isinstance(listed[0], (str, list, tuple, np.ndarray)):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]
