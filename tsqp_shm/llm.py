"""The Python API. The process that makes an `LLM` is the TEE role; the GPU process is started beside it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tsqp_shm.arguments import refuse_unknown
from tsqp_shm.assembly import Records, assembled
from tsqp_shm.callers import harmless, while_held
from tsqp_shm.config import EngineConfig
from tsqp_shm.conversation import Conversation
from tsqp_shm.conversations import Message, as_conversation, as_conversations
from tsqp_shm.errors import ConfigError, RequestError
from tsqp_shm.metrics import Metric
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import TOKENIZER_FILE, Tokenizer
from tsqp_shm.model_folder import find_model_folder
from tsqp_shm.modes import MODES
from tsqp_shm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from tsqp_shm.prompt_progress import Bar
from tsqp_shm.prompts import Form, as_prompt, as_prompts
from tsqp_shm.requests import Requests
from tsqp_shm.roles.resources import require_resources
from tsqp_shm.shm.transport import Transport
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.gpu_connection import StartGpu
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.sampling_params import SamplingParams
from tsqp_shm.tee.statistics import Statistics
from tsqp_shm.text_tokenizer import TextTokenizer

__all__ = ["LLM", "CompletionOutput", "Conversation", "Logprob", "RequestMetrics", "RequestOutput", "SamplingParams"]

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

    Example:
        Those of the methods go on with this one. Without `mode` it would be split over two processes.

        >>> from tsqp_shm import LLM, SamplingParams
        >>> llm = LLM(mode="tee-only")
        >>> outputs = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=2))
        >>> outputs[0].outputs[0].text
        ' Paris.'
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
        self.config = EngineConfig.chosen(config, settings, _NAMES_OF_PARAMS)
        mode = MODES[self.config.mode]
        records = Records.chosen(mode, trace, evidence, transcript)
        self.evidence = records.evidence
        for argument, value, default in (("start_gpu", start_gpu, True), ("transport", transport, None)):
            if not mode.has_gpu_process and value is not default:
                raise ConfigError(argument, value, f"none, as mode {mode.name} has no GPU process")
        require_resources(self.config.threads().tee)
        self.model = find_model_folder(model, revision, report)
        # What the caller has handed in is held here, and nowhere else.
        self._callers = report, start_gpu
        report = harmless((lambda line: None) if report is None else while_held(report))
        if not isinstance(start_gpu, bool):
            start_gpu = while_held(start_gpu)
        files = ModelFiles(self.model)
        self.spec = ModelSpec.from_folder(files)
        limits = self.config.limits(self.spec.max_positions, Network.of(self.spec).layer_parameters)
        self.max_model_len = limits.max_model_len
        tokenizer = Tokenizer.from_folder(files) if files.has(TOKENIZER_FILE) else None
        self._runtime, witness = assembled(
            self.model, files, self.spec, tokenizer, self.config, records, transport, start_gpu, report
        )
        self._requests = Requests(self._runtime, self.spec, files, tokenizer, self.max_model_len, witness)
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
        for ends with an error. Closing twice does nothing.

        Example:
            >>> llm.close()  # as the end of `with LLM(...) as llm:` does
            >>> llm.generate("Hello")
            Traceback (most recent call last):
            tsqp_shm.errors.TsqpError: this LLM is closed
        """
        self._runtime.close()

    @property
    def runtime(self) -> Runtime:
        """The session beneath, for who needs more than texts: a server, a benchmark, a test.

        Example:
            >>> llm.runtime.load().running
            0
        """
        return self._runtime

    @property
    def statistics(self) -> Statistics:
        """What the session has computed so far; `stats` gives it as plain values.

        Example:
            >>> llm.statistics.generated >= 0
            True
        """
        return self._runtime.statistics

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer as the session uses it; `get_tokenizer` has transformers' habits.

        Raises:
            ModelFileError: the model folder has none; prompts are token ids then.

        Example:
            >>> llm.tokenizer.encode("Hello, world!")
            [19556, 28, 905, 17]
        """
        return self._requests.tokenizer

    def get_tokenizer(self) -> TextTokenizer:
        """The model's tokenizer with transformers' methods and meanings, as vLLM gives one; without transformers.

        Raises:
            ModelFileError: the model folder has none; prompts are token ids then.

        Example:
            >>> tokenizer = llm.get_tokenizer()
            >>> tokenizer("Hello, world!").input_ids
            [19556, 28, 905, 17]
            >>> tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)[-30:]
            '<|im_start|>user\\nHi<|im_end|>\\n'
        """
        return TextTokenizer(self.tokenizer, str(self.model))

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without params is sampled by: the sampling fields of the model's generation_config.json, as
        transformers takes them; where there are none, the likeliest token. 64 tokens at most.

        Raises:
            ModelFileError, UnsupportedModel: a field is malformed, or asks for what is not done here.

        Example:
            >>> params = llm.get_default_sampling_params()
            >>> params.temperature, params.max_tokens
            (0.0, 64)
        """
        return self._requests.default_params()

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

        Example:
            >>> prompts = ["The capital of France is", "The capital of Italy is"]
            >>> for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1)):
            ...     print(output.prompt + output.outputs[0].text)
            The capital of France is Paris
            The capital of Italy is Rome
        """
        refuse_unknown(others, ("prompts", "sampling_params", "use_tqdm"), _NAMES_OF_ARGUMENTS, RequestError)
        if prompt_token_ids is not None:
            if prompts is not None:
                raise RequestError("prompt_token_ids", prompt_token_ids, "either prompts or prompt_token_ids")
            prompts = prompt_token_ids
        return self._requests.outputs(as_prompts(prompts), sampling_params, use_tqdm)

    def stream(self, prompt: Form, sampling_params: SamplingParams | None = None) -> Generator[str, None, None]:
        """Completes one prompt, piece by piece; a piece never splits a character.

        The completion begins with the first piece that is asked for, and does not wait for who takes them. Closing the
        generator cancels it.

        Raises:
            As `generate`, RequestError at the call and not at the first piece.

        Example:
            >>> list(llm.stream("1, 2, 3,", SamplingParams(temperature=0, max_tokens=5)))
            [' ', '4', ',', ' ', '5']
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

        Example:
            >>> question = [{"role": "user", "content": "What is the capital of France?"}]
            >>> llm.chat(question, SamplingParams(temperature=0))[0].outputs[0].text
            'The capital of France is Paris.'
        """
        refuse_unknown(
            others,
            ("messages", "sampling_params", "use_tqdm", "add_generation_prompt", "continue_final_message"),
            _NAMES_OF_ARGUMENTS,
            RequestError,
        )
        conversations = as_conversations(messages)
        prompts = [
            self._requests.rendered(
                conversation,
                "messages" if len(conversations) == 1 else f"messages[{index}]",
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            for index, conversation in enumerate(conversations)
        ]
        return self._requests.outputs(prompts, sampling_params, use_tqdm)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids by which a model is asked to answer a conversation.

        Example:
            >>> ids = llm.chat_prompt([{"role": "user", "content": "Hi"}])
            >>> llm.tokenizer.decode(ids, skip_special_tokens=False)[-22:]
            '<|im_start|>assistant\\n'
        """
        prompt = self._requests.rendered(
            as_conversation(messages), "messages", add_generation_prompt=True, continue_final_message=False
        )
        return list(prompt.token_ids or ())

    def conversation(self) -> Conversation:
        """A conversation whose turns follow on each other: its cache is kept between them where `prefix_reuse` says so,
        which in mode `blinded` it has to be asked to.

        Example:
            >>> params = SamplingParams(temperature=0, max_tokens=8)
            >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
            >>> with llm.conversation() as conversation:
            ...     answer = conversation.chat(messages, params).outputs[0].text
            ...     messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And of Italy?"}]
            ...     second = conversation.chat(messages, params)
            >>> second.num_cached_tokens > len(second.prompt_token_ids) / 2
            True
        """
        return Conversation(self, self._requests)

    def start(self, prompt: Form, sampling_params: SamplingParams | None = None) -> Completion:
        """A completion to be run by `stream_completion`.

        Args:
            prompt: one, in a form of `generate`.

        Raises:
            RequestError: as `generate`.

        Example:
            >>> completion = llm.start("1, 2, 3,", SamplingParams(temperature=0, max_tokens=5))
            >>> for piece in llm.stream_completion(completion):
            ...     print(piece, end="|")
             |4|,| |5|
            >>> completion.text, completion.finish_reason
            (' 4, 5', 'length')
        """
        (params,) = self._requests.params(sampling_params, 1)
        if params.n != 1:
            raise RequestError("n", params.n, "1, as one completion is started; `generate` gives several")
        (completion,) = self._requests.made(as_prompt(prompt), params)
        return completion

    def stream_completion(self, completion: Completion) -> Generator[str, None, None]:
        """Runs a completion of `start`, yielding its new text after each token that makes some.

        Example:
            >>> completion = llm.start("A, B, C,", SamplingParams(temperature=0, max_tokens=3))
            >>> "".join(llm.stream_completion(completion)), len(completion.token_ids)
            (' D, E', 3)
        """
        # Not handed on as it is: whoever has the pieces holds the LLM.
        yield from self._requests.pieces(completion)

    def logits(self, token_ids: Form) -> npt.NDArray[np.float32]:
        """The logits after every token of one sequence, which takes a place of the batch while it is computed.

        Shapes: [T, V] f32.

        Args:
            token_ids: or a prompt in another form of `generate`.

        Raises:
            RequestError: as `generate`.
            PeerDied, PeerTimeout, ProtocolError: the session is over.

        Example:
            >>> logits = llm.logits("The capital of France is")
            >>> logits.shape, llm.tokenizer.decode([int(logits[-1].argmax())])
            ((5, 49152), ' Paris')
        """
        ids = self._requests.token_ids(as_prompt(token_ids), self.max_model_len)
        with self._runtime.sequence() as sequence:
            return self._runtime.forward(sequence, ids)

    def bring_up(self) -> dict[str, Any]:
        """Mode and processes of this session, and what lies between them, as plain values.

        Example:
            >>> facts = llm.bring_up()
            >>> facts["mode"], facts["weights"]["is_pinned"]
            ('tee-only', False)
        """
        return {**self._runtime.describe(), "model": str(self.model)}

    def get_metrics(self) -> list[Metric]:
        """What the session's requests have come to so far, as vLLM's metrics under the prefix "tsqp:".

        It waits for nothing, and says what it says when the LLM is closed, too. The names are in
        docs/architecture.md.

        Example:
            >>> from tsqp_shm.metrics import Histogram
            >>> outputs = llm.generate("Hello", SamplingParams(max_tokens=3))
            >>> for metric in llm.get_metrics():
            ...     if isinstance(metric, Histogram) and metric.name == "tsqp:time_to_first_token_seconds":
            ...         print(metric.count > 0, metric.sum > 0)
            True True
        """
        return self._runtime.metrics()

    def stats(self) -> dict[str, Any]:
        """What `tsqp-shm launch` prints, as plain values. Units are in the names.

        Example:
            >>> sorted(llm.stats()["processes"]["tee"])
            ['peak_rss_bytes', 'pid']
        """
        return {**self._runtime.facts(), "model": str(self.model)}
