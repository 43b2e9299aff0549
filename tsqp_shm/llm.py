"""The Python API. The process that makes an `LLM` is the TEE role; the GPU process is started beside it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tsqp_shm.arguments import refuse_unknown, require_writable
from tsqp_shm.config import EngineConfig
from tsqp_shm.conversation import Conversation
from tsqp_shm.conversations import Message, as_conversations, asked, render
from tsqp_shm.errors import ConfigError, ModelFileError, RequestError
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.generation_config import GENERATION_CONFIG_FILE, sampling_fields
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import HOW_TO_MAKE_ONE, TOKENIZER_FILE, Tokenizer
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.model_folder import find_model_folder
from tsqp_shm.modes import MODES
from tsqp_shm.outputs import CompletionOutput, Logprob, RequestOutput
from tsqp_shm.prompt_progress import Bar, PromptProgress
from tsqp_shm.prompts import Form, Prompt, as_prompt, as_prompts, params_of_each
from tsqp_shm.roles.process import RoleProcess
from tsqp_shm.roles.resources import require_resources
from tsqp_shm.scalars import path
from tsqp_shm.shm.transport import Hold, Register, Transport
from tsqp_shm.tee.completion import Completion, checked_token_ids
from tsqp_shm.tee.evidence import Evidence
from tsqp_shm.tee.gpu_connection import StartGpu
from tsqp_shm.tee.receipts import nonces_path
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.sampler import drawn_seed
from tsqp_shm.tee.sampling_params import UNASKED, SamplingParams
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.tee.transcript import Transcript
from tsqp_shm.tee.updates import Told, Update
from tsqp_shm.tee.witness import Witness
from tsqp_shm.trace.file import TraceFile
from tsqp_shm.trace.recorder import recording

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]

_NAMES_OF_PARAMS = {name: f"SamplingParams({name}=...)" for name in SamplingParams.__dataclass_fields__}
_NAMES_OF_ARGUMENTS = {**_NAMES_OF_PARAMS, "params": "sampling_params", "progress": "use_tqdm"}


class LLM:
    """A model split between this process and a GPU process; with `mode="tee-only"`, a model in this process alone.

    Any thread may call any method, several at once: their requests share batches, and each gets what it would get
    alone; one stream is for one thread at a time. Whatever interrupts a caller (Ctrl-C, a signal handler that raises,
    a task that is cancelled) ends what that caller waits for and nothing else, and leaves nothing of an LLM that was
    just coming up. A deadline ends the wait of who has asked, in the middle of a step too. A fault of the session is
    an equal error for each caller, and nothing of the step in which it lies is given out. An LLM that nobody holds is
    closed, at the interpreter's exit too. In a forked child every call is an error, and whatever the child does leaves
    the LLM its parent's; it may make its own. An LLM cannot be copied or pickled.

    Args:
        model: a Hugging Face folder, or the id of a model in the local Hugging Face cache; None: the demo model, which
            is fetched where it is not cached.
        revision: of a Hugging Face id: a branch, tag or commit; None: main.
        start_gpu: False where somebody else starts `tsqp-shm gpu MODEL --session NAME`; or what starts it, which is
            called with the session's hold, whose `name` it has, by a thread of this LLM.
        report: takes lines about what is waited for, what the GPU process says, and its restarts; called by threads
            of this LLM. None: only the fetching of the demo model is told, on stderr.
        trace: a file for a trace of both processes, written at the end, of the GPU processes the last one; unless
            `start_gpu` is True for a recording of this process alone, of which `tsqp-shm trace` makes one. In a mode
            without a GPU process, a trace of this one.
        evidence: a file for a record of each request, in canonical JSON: how it was computed and checked, and not what
            it said (docs/evidence.md). Written anew as requests end.
        transcript: a file for every word that was sent to be multiplied and that came back. It holds activations.
        transport: what joins the two sides; None: POSIX shared memory under the `session` and `endpoint` of the
            settings. Where another is given, `start_gpu` has to be what starts a GPU process over it, or False.
        config: what it is started with; taken as it is.
        settings: fields of `EngineConfig`, over those of `config`; without one `TSQP_SHM_*` environment variables fill
            what is not given.

    Raises:
        ConfigError: a setting is not allowed, not there or not for this mode, or the trace cannot be written.
        ModelFileError, UnsupportedModel: the model cannot be used, or is not the one that `model_digest` names.
        DeviceError: the device is not there or too small.
        LimitError: too few file descriptors or threads.
        SessionBusy, ArenaError: the session cannot begin.
        PeerDied, PeerTimeout: the GPU process did not come up.
    """

    def __init__(
        self,
        model: str | bytes | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        start_gpu: bool | StartGpu = True,
        report: Callable[[str], None] | None = None,
        trace: str | Path | None = None,
        evidence: str | Path | None = None,
        transcript: str | Path | None = None,
        transport: Transport | None = None,
        config: EngineConfig | None = None,
        **settings: Any,
    ) -> None:
        if report is not None and not callable(report):
            raise ConfigError("report", report, "what takes a line, or None", is_mistyped=True)
        if not isinstance(start_gpu, bool) and not callable(start_gpu):
            raise ConfigError("start_gpu", start_gpu, "True, False, or what starts it", is_mistyped=True)
        if transport is not None and not hasattr(transport, "begin"):
            raise ConfigError("transport", transport, "a Transport, or None", is_mistyped=True)
        trace_file = _file("trace", trace)
        self.evidence, transcript_file = _file("evidence", evidence), _file("transcript", transcript)
        self.config = EngineConfig.chosen(config, settings, _NAMES_OF_PARAMS)
        mode = MODES[self.config.mode]
        has_gpu = mode.has_gpu_process
        for argument, file, reason in (
            ("evidence", self.evidence, "nothing holds its answers" if mode.arithmetic is None else None),
            ("transcript", transcript_file, "no product of it is checked" if not mode.num_vectors else None),
        ):
            if file is not None and reason is not None:
                raise ConfigError(argument, str(file), f"none, as mode {mode.name} is one where {reason}")
            require_writable(argument, None if file is None else str(file))
        if self.evidence is not None and transcript_file is not None:
            _require_apart(self.evidence, transcript_file)
        for argument, value, default in (("start_gpu", start_gpu, True), ("transport", transport, None)):
            if not has_gpu and value is not default:
                raise ConfigError(argument, value, f"none, as mode {mode.name} has no GPU process")
        require_resources(self.config.threads().tee)
        self.model = find_model_folder(model, revision, report)
        # What the caller has handed in is held here, and nowhere else.
        self._callers = report, start_gpu
        report = _harmless((lambda line: None) if report is None else _while_held(report))
        if not isinstance(start_gpu, bool):
            start_gpu = _while_held(start_gpu)
        self._files = files = ModelFiles(self.model)
        self.spec = ModelSpec.from_folder(files)
        limits = self.config.limits(self.spec.max_positions, Network.of(self.spec).layer_parameters)
        self.max_model_len = limits.max_model_len
        self._default_params: SamplingParams | None = None
        self._tokenizer = Tokenizer.from_folder(files) if files.has(TOKENIZER_FILE) else None
        with ExitStack() as stack:
            if self._tokenizer is not None:
                # Its process ends with the session, or with what keeps that from coming up.
                stack.callback(self._tokenizer.close)
            # Where somebody else starts the GPU process, the trace of both is theirs to make.
            roles = ("tee", "gpu") if has_gpu else ("tee",)
            starts_all = start_gpu is True
            whole = stack.enter_context(TraceFile(trace_file, roles, report)) if trace_file and starts_all else None
            recorder = stack.enter_context(recording(whole.recording("tee") if whole else trace_file, "tee"))
            if not has_gpu:
                start_gpu = False
            self._witness = Witness(
                None if self.evidence is None else Evidence(self.evidence),
                None if transcript_file is None else Transcript(transcript_file),
            )
            stack.callback(self._witness.close)
            if start_gpu is True:
                traced = (whole.arguments("gpu"), [whole.descriptor("gpu")]) if whole else ([], [])
                # Nothing of this object's: what the runtime holds must not hold the LLM.
                start_gpu = partial(_start_gpu, self.model, self.config, *traced, report)
            with Checkpoint.open(self.model) as checkpoint:
                self._runtime = Runtime(
                    self.spec, checkpoint, self.config, transport or _posix(self.config), start_gpu or None, report,
                    recorder, before=stack, files=files, witness=self._witness,
                )  # fmt: skip
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
        """Ends the session: stops the GPU process and removes the arena, where there are any; what other threads wait
        for ends with an error. Closing twice does nothing."""
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
            reason = f"there is no such file; give prompts as token ids, or {HOW_TO_MAKE_ONE}"
            raise ModelFileError(self.model / TOKENIZER_FILE, reason)
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without params is sampled by: the sampling fields of the model's generation_config.json, as
        transformers takes them; where there are none, the likeliest token. 64 tokens at most.

        Raises:
            ModelFileError, UnsupportedModel: a field is malformed, or asks for what is not done here.
        """
        if self._default_params is None:
            try:
                self._default_params = replace(UNASKED, **sampling_fields(self._files))
            except ConfigError as error:
                raise ModelFileError(self.model / GENERATION_CONFIG_FILE, str(error)) from error
        return self._default_params

    def generate(
        self,
        prompts: Form | None = None,
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        prompt_token_ids: Iterable[Any] | None = None,
        **others: object,
    ) -> list[RequestOutput]:
        """Completes prompts together, as one ragged batch.

        Args:
            prompts: a string; token ids in any sequence, numpy's and torch's included; a dict with "prompt" or
                "prompt_token_ids" or both, as in vLLM; or a sequence of these. A flat sequence of numbers is one
                prompt.
            sampling_params: of all prompts, or one for each; None: `get_default_sampling_params()`.
            use_tqdm: whether a line on stderr says how far it is, where that is a terminal and it takes long; or what
                makes a bar, called as vLLM calls tqdm.
            prompt_token_ids: in the place of `prompts`, as older programs write it.

        Raises:
            RequestError: a prompt is empty, too long, of another type or holds a token id outside the vocabulary, or
                an argument is wrong; nothing was run.
            PeerDied, PeerTimeout, ProtocolError: the session is over; a death only when no `restart_gpu` is left.
        """
        refuse_unknown(others, ("prompts", "sampling_params", "use_tqdm"), _NAMES_OF_ARGUMENTS, RequestError)
        if prompt_token_ids is not None:
            if prompts is not None:
                raise RequestError("prompt_token_ids", prompt_token_ids, "either prompts or prompt_token_ids")
            prompts = prompt_token_ids
        return self._generated(as_prompts(prompts), sampling_params, use_tqdm)

    def stream(self, prompt: Form, sampling_params: SamplingParams | None = None) -> Generator[str, None, None]:
        """Completes one prompt, piece by piece; a piece never splits a character.

        The completion begins with the first piece that is asked for, and does not wait for who takes them. Closing the
        generator cancels it.

        Raises:
            As `generate`, RequestError at the call and not at the first piece.
        """
        return self.stream_completion(self.start(prompt, sampling_params))

    def chat(
        self,
        messages: Iterable[Any],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **others: object,
    ) -> list[RequestOutput]:
        """Answers conversations, by the model's chat template.

        Args:
            messages: a conversation or a list of them: a list of dicts, each with a "role" and its "content", a string
                or OpenAI's list of text parts.
            add_generation_prompt: ask for an answer.
            continue_final_message: have the last message continued in the place of one; then not
                `add_generation_prompt`.

        Raises:
            As `generate`; also where the model has no chat template.
        """
        refuse_unknown(
            others,
            ("messages", "sampling_params", "use_tqdm", "add_generation_prompt", "continue_final_message"),
            _NAMES_OF_ARGUMENTS,
            RequestError,
        )
        prompts = []
        conversations = as_conversations(messages)
        for index, conversation in enumerate(conversations):
            text = render(
                self.tokenizer,
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            name = "messages" if len(conversations) == 1 else f"messages[{index}]"
            prompts.append(Prompt(name, text, self._encoded(text)))
        return self._generated(prompts, sampling_params, use_tqdm)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids by which a model is asked to answer a conversation."""
        return asked(self.tokenizer, messages, self.max_model_len)[1]

    def conversation(self) -> Conversation:
        """A conversation whose turns follow on each other: its cache is kept between them where `prefix_reuse` says so,
        which in mode `blinded` it has to be asked to.

            with llm.conversation() as conversation:
                messages = [{"role": "user", "content": "Name a river."}]
                answer = conversation.chat(messages)
                messages += [{"role": "assistant", "content": answer.outputs[0].text}, ...]
        """
        return Conversation(self)

    def start(self, prompt: Form, sampling_params: SamplingParams | None = None) -> Completion:
        """A completion to be run by `stream_completion`.

        Args:
            prompt: one, in a form of `generate`.

        Raises:
            RequestError: as `generate`.
        """
        (params,) = self._params(sampling_params, 1)
        if params.n != 1:
            raise RequestError("n", params.n, "1, as one completion is started; `generate` gives several")
        (completion,) = self._started(as_prompt(prompt), params)
        return completion

    def stream_completion(self, completion: Completion) -> Generator[str, None, None]:
        """Runs a completion of `start`, yielding its new text after each token that makes some."""
        updates: SimpleQueue[Update] = SimpleQueue()
        with self._running([completion], updates.put):
            while True:
                update = self._runtime.next_update(updates)
                # Of what was cancelled, by a fault above all, nothing more is given out, however much is there already.
                if update.text and completion.finish_reason != "cancelled":
                    yield update.text
                if update.is_last:
                    return

    def logits(self, token_ids: Form) -> npt.NDArray[np.float32]:
        """The logits after every token of one sequence, which takes a place of the batch while it is computed.

        Shapes: [T, V] f32.

        Args:
            token_ids: or a prompt in another form of `generate`.

        Raises:
            RequestError: as `generate`.
            PeerDied, PeerTimeout, ProtocolError: the session is over.
        """
        ids = self._token_ids(as_prompt(token_ids), self.max_model_len)
        with self._runtime.sequence() as sequence:
            return self._runtime.forward(sequence, ids)

    def bring_up(self) -> dict[str, Any]:
        """Mode and processes of this session, and what lies between them, as plain values."""
        return {**self._runtime.describe(), "model": str(self.model)}

    def stats(self) -> dict[str, Any]:
        """What `tsqp-shm launch` prints, as plain values. Units are in the names."""
        return {**self._runtime.facts(), "model": str(self.model)}

    def _generated(self, prompts: Sequence[Prompt], sampling_params: object, use_tqdm: object) -> list[RequestOutput]:
        self._runtime.require_working()
        params = self._params(sampling_params, len(prompts))
        progress = PromptProgress(use_tqdm, len(prompts))
        requests = [self._started(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        completions = [completion for request in requests for completion in request]
        request_of = {completion: index for index, request in enumerate(requests) for completion in request}
        going = [len(request) for request in requests]
        updates: SimpleQueue[Update] = SimpleQueue()
        wants_all = progress.wants_all

        def told(update: Update) -> None:
            if update.is_last or wants_all:
                updates.put(update)

        with progress, self._running(completions, told):
            while any(going):
                update = self._runtime.next_update(updates)
                index = request_of[update.completion]
                going[index] -= update.is_last
                progress.saw(update, ends_prompt=not going[index])
        decode = None if self._tokenizer is None else self._tokenizer.spelled
        return [RequestOutput.of(prompt.text, each, decode) for prompt, each in zip(prompts, requests, strict=True)]

    def _params(self, sampling_params: object, count: int) -> list[SamplingParams]:
        if sampling_params is None:
            return [self.get_default_sampling_params()] * count
        return params_of_each(sampling_params, count)

    def _started(self, prompt: Prompt, params: SamplingParams) -> list[Completion]:
        self._runtime.require_working()
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", params.stop, "no stop strings, as the model has no tokenizer")
        # One place is left for an answer.
        token_ids = self._token_ids(prompt, self.max_model_len - 1)
        room = self.max_model_len - len(token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        seed, receipt = drawn_seed(params), self._witness.receipt()
        return [
            Completion(
                token_ids,
                params,
                max_tokens,
                self.spec.eos_token_ids,
                self._tokenizer,
                vocab_size=self.spec.vocab_size,
                index=index,
                seed=seed,
                receipt=receipt,
            )
            for index in range(params.n)
        ]

    def _token_ids(self, prompt: Prompt, most: int) -> list[int]:
        ids = prompt.token_ids
        if ids is None:
            ids = self.tokenizer.encode(prompt.text or "", most_tokens=most)
        return checked_token_ids(ids, most, self.max_model_len, self.spec.vocab_size, prompt.name)

    def _encoded(self, rendered: str) -> list[int]:
        # A rendered chat template spells out its special tokens itself.
        return self.tokenizer.encode(rendered, add_special_tokens=False, most_tokens=self.max_model_len - 1)

    @contextmanager
    def _running(self, completions: list[Completion], told: Told) -> Iterator[None]:
        """Has completions run during the block; those that have not ended when it is left are cancelled."""
        self._runtime.require_can_wait()
        try:
            self._runtime.add(completions, told)
            yield
        finally:
            self._runtime.cancel([completion for completion in completions if completion.finish_reason is None])


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


def _harmless(report: Callable[[str], None]) -> Callable[[str], None]:
    """What a caller's function raises is the caller's affair: it must not end a thread that it is told things on."""

    def say(line: str) -> None:
        with suppress(Exception):
            report(line)

    return say


def _while_held(function: Callable[..., Any]) -> Callable[..., Any]:
    """A caller's function as this LLM's threads may have it: it may be a method of who holds the LLM, and a thread that
    held it would hold the LLM too, for ever. When nobody holds it any more, it does nothing."""
    try:
        reference = weakref.ref(function)
    except TypeError:
        # Of a type that allows no such references.
        return function

    def call(*arguments: object) -> Any:
        held = reference()
        return None if held is None else held(*arguments)

    return call
