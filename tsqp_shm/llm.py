"""The Python API. The process that makes an `LLM` is the TEE role; the GPU process is started beside it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tsqp_shm.config import EngineConfig
from tsqp_shm.errors import ConfigError, ModelFileError, RequestError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import Tokenizer
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.outputs import CompletionOutput, RequestOutput
from tsqp_shm.roles.process import RoleProcess
from tsqp_shm.roles.resources import require_resources
from tsqp_shm.shm.posix.transport import PosixTransport
from tsqp_shm.shm.transport import Hold, Transport
from tsqp_shm.tee.completion import Completion, checked_token_ids
from tsqp_shm.tee.connection import StartGpu
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.sampler import SamplingParams
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.updates import Told, Update
from tsqp_shm.trace.file import TraceFile
from tsqp_shm.trace.recorder import recording

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

Prompt = str | Sequence[int]


class LLM:
    """A model split between this process and a GPU process.

    Any thread may call any method, several at once: their requests share batches, and each gets what it would get
    alone; one stream is for one thread at a time. Whatever interrupts a caller (Ctrl-C, a signal handler that raises,
    a task that is cancelled) ends what that caller waits for and nothing else, and leaves nothing of an LLM that was
    just coming up. A deadline ends the wait of who has asked, in the middle of a step too. A fault of the session is
    an equal error for each caller, and nothing of the step in which it lies is given out. An LLM that nobody holds is
    closed, at the interpreter's exit too. In a forked child every call is an error, and whatever the child does leaves
    the LLM its parent's; it may make its own. An LLM cannot be copied or pickled.

    Args:
        model: a Hugging Face folder.
        start_gpu: False where somebody else starts `tsqp-shm gpu MODEL --session NAME`; or what starts it, which is
            called with the session's hold, whose `name` it has, by a thread of this LLM.
        report: takes lines about what is waited for, what the GPU process says, and its restarts; called by threads
            of this LLM.
        trace: a file for a trace of both processes, written at the end, of the GPU processes the last one; unless
            `start_gpu` is True for a recording of this process alone, of which `tsqp-shm trace` makes one.
        transport: what joins the two sides; None: POSIX shared memory under the `session` and `endpoint` of the
            settings. Where another is given, `start_gpu` has to be what starts a GPU process over it, or False.
        config: what it is started with; taken as it is.
        settings: fields of `EngineConfig`, over those of `config`; without one `TSQP_SHM_*` environment variables fill
            what is not given.

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
        transport: Transport | None = None,
        config: EngineConfig | None = None,
        **settings: Any,
    ) -> None:
        self.config = _engine_config(config, settings)
        report = _harmless(report)
        require_resources(self.config.threads().tee)
        self.model = Path(model)
        self.spec = ModelSpec.from_folder(self.model)
        limits = self.config.limits(self.spec.max_position_embeddings, Network.of(self.spec).layer_parameters)
        self.max_model_len = limits.max_model_len
        self._tokenizer = Tokenizer.from_folder(self.model) if _has_tokenizer(self.model) else None
        with ExitStack() as stack:
            path = None if trace is None else Path(trace)
            # Where somebody else starts the GPU process, the trace of both is theirs to make.
            both = stack.enter_context(TraceFile(path, report)) if path and start_gpu is True else None
            recorder = stack.enter_context(recording(both.recording("tee") if both else path, "tee"))
            if start_gpu is True:
                traced = both.arguments("gpu") if both else []
                # Nothing of this object's: what the runtime holds must not hold the LLM.
                start_gpu = partial(_start_gpu, self.model, self.config, traced, report)
            with Checkpoint.open(self.model) as checkpoint:
                transport = transport or PosixTransport(self.config.session, self.config.endpoint)
                self._runtime = Runtime(
                    self.spec, checkpoint, self.config, transport, start_gpu or None, report, recorder, before=stack
                )
        weakref.finalize(self, self._runtime.leave).atexit = False
        self._runtime.start()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM is a session of this process and cannot be copied or pickled; make one where it is used"
        )

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._runtime.close(error)

    def close(self) -> None:
        """Stops the GPU process and removes the arena; what other threads wait for ends with an error. Closing twice
        does nothing."""
        self._runtime.close()

    @property
    def runtime(self) -> Runtime:
        """The session beneath, for who needs more than texts: a server, a benchmark, a test."""
        return self._runtime

    @property
    def statistics(self) -> Statistics:
        return self._runtime.statistics

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
        ended: SimpleQueue[Update] = SimpleQueue()

        def told(update: Update) -> None:
            if update.is_last:
                ended.put(update)

        with self._running([completion for _, completion in completions], told):
            for _ in completions:
                error = self._runtime.next_update(ended).error
                if error is not None:
                    try:
                        raise error
                    finally:
                        # Or this frame and the error would keep each other, and this LLM.
                        del error
        return [RequestOutput.of(prompt, completion) for prompt, completion in completions]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[str, None, None]:
        """Completes one prompt, piece by piece; a piece never splits a character.

        The completion begins with the first piece that is asked for, and does not wait for who takes them. Closing the
        generator cancels it.

        Raises:
            As `generate`, RequestError at the call and not at the first piece.
        """
        return self.stream_completion(self.start(prompt, params))

    def chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """Answers a conversation, by the model's chat template.

        Args:
            messages: each with a "role" and its "content".

        Raises:
            As `generate`; also where the model has no chat template.
        """
        return self.generate([self.chat_prompt(messages)], params)[0]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids by which a model is asked to answer a conversation."""
        # A rendered chat template spells out its special tokens itself.
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def start(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """A completion to be run by `stream_completion`.

        Raises:
            RequestError: as `generate`.
        """
        self._runtime.require_working()
        params = params or SamplingParams()
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", params.stop, "no stop strings, as the model has no tokenizer")
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        # One place is left for an answer.
        token_ids = self._checked(token_ids, self.max_model_len - 1)
        room = self.max_model_len - len(token_ids)
        max_tokens = min(params.max_tokens, room)
        return Completion(token_ids, params, max_tokens, self.spec.eos_token_ids, self._tokenizer)

    def stream_completion(self, completion: Completion) -> Generator[str, None, None]:
        """Runs a completion of `start`, yielding its new text after each token that makes some."""
        updates: SimpleQueue[Update] = SimpleQueue()
        with self._running([completion], updates.put):
            while True:
                update = self._runtime.next_update(updates)
                if update.error is not None:
                    error, update = update.error, Update(completion)
                    try:
                        raise error
                    finally:
                        # As in `generate`.
                        del error
                # Of what was cancelled, by a fault above all, nothing more is given out, however much is there already.
                if update.text and completion.finish_reason != "cancelled":
                    yield update.text
                if update.is_last:
                    return

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The logits after every token of one sequence, which takes a place of the batch while it is computed.

        Shapes: [T, V] f32.

        Raises:
            RequestError: as `generate`.
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        ids = self._checked(token_ids, self.max_model_len)
        with self._runtime.sequence() as sequence:
            return self._runtime.forward(sequence, ids)

    def bring_up(self) -> dict[str, Any]:
        """Mode, processes, arena and doorbell of this session, as plain values."""
        return {**self._runtime.describe(), "model": str(self.model)}

    def stats(self) -> dict[str, Any]:
        """What `tsqp-shm launch` prints, as plain values. Units are in the names."""
        return {**self._runtime.facts(), "model": str(self.model)}

    def _checked(self, token_ids: Sequence[int], most: int) -> list[int]:
        return checked_token_ids(token_ids, most, self.max_model_len, self.spec.vocab_size)

    @contextmanager
    def _running(self, completions: list[Completion], told: Told) -> Iterator[None]:
        """Has completions run during the block; those that have not ended when it is left are cancelled."""
        self._runtime.require_can_wait()
        try:
            self._runtime.add(completions, told)
            yield
        finally:
            self._runtime.cancel([completion for completion in completions if completion.finish_reason is None])


def _start_gpu(
    model: Path, config: EngineConfig, traced: list[str], report: Callable[[str], None], session: Hold
) -> RoleProcess:
    arguments = [str(model), *session.gpu_flags, *config.gpu_arguments(), *traced]
    return RoleProcess.start("gpu", arguments, listen=report)


def _engine_config(config: EngineConfig | None, settings: dict[str, Any]) -> EngineConfig:
    unknown = sorted(set(settings) - set(EngineConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(unknown[0], settings[unknown[0]], "one of " + ", ".join(EngineConfig.__dataclass_fields__))
    return EngineConfig.from_environment(settings) if config is None else replace(config, **settings)


def _harmless(report: Callable[[str], None]) -> Callable[[str], None]:
    """What a caller's function raises is the caller's affair: it must not end a thread that it is told things on."""

    def say(line: str) -> None:
        with suppress(Exception):
            report(line)

    return say


def _has_tokenizer(model: Path) -> bool:
    return (model / "tokenizer.json").exists()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and not isinstance(listed[0], (str, list, tuple, np.ndarray)):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]
