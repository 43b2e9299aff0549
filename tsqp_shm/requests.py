"""What callers ask of a session: prompts become completions, which are run and become outputs."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from queue import SimpleQueue

from tsqp_shm.conversations import Message, render
from tsqp_shm.errors import ConfigError, ModelFileError, RequestError
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.generation_config import GENERATION_CONFIG_FILE, sampling_fields
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.tokenizer import HOW_TO_MAKE_ONE, TOKENIZER_FILE, Tokenizer
from tsqp_shm.outputs import RequestOutput
from tsqp_shm.prompt_progress import PromptProgress
from tsqp_shm.prompts import Prompt, params_of_each
from tsqp_shm.tee.completion import Completion, checked_token_ids
from tsqp_shm.tee.runtime import Runtime
from tsqp_shm.tee.sampler import drawn_seed
from tsqp_shm.tee.sampling_params import UNASKED, SamplingParams
from tsqp_shm.tee.updates import Told, Update
from tsqp_shm.tee.witness import Witness


class Requests:
    """Any thread may ask.

    Args:
        files: of the model's folder.
        tokenizer: the model's; None: it has none.
        max_model_len: most tokens of a sequence.
        witness: gives each request its receipt.
    """

    def __init__(
        self,
        runtime: Runtime,
        spec: ModelSpec,
        files: ModelFiles,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        witness: Witness,
    ) -> None:
        self._runtime, self._spec, self._files, self._witness = runtime, spec, files, witness
        self._tokenizer, self._max_model_len = tokenizer, max_model_len
        self._default_params: SamplingParams | None = None
        self._numbers = count()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises:
        ModelFileError: the model folder has none; prompts are token ids then.
        """
        if self._tokenizer is None:
            reason = f"there is no such file; give prompts as token ids, or {HOW_TO_MAKE_ONE}"
            raise ModelFileError(self._files.path(TOKENIZER_FILE), reason)
        return self._tokenizer

    def default_params(self) -> SamplingParams:
        """Raises:
        ModelFileError, UnsupportedModel: a field of generation_config.json is malformed, or asks for what is not done.
        """
        if self._default_params is None:
            try:
                self._default_params = replace(UNASKED, **sampling_fields(self._files))
            except ConfigError as error:
                raise ModelFileError(self._files.path(GENERATION_CONFIG_FILE), str(error)) from error
        return self._default_params

    def params(self, sampling_params: object, count: int) -> list[SamplingParams]:
        """Those of each of so many prompts.

        Raises:
            RequestError: they are none, or not as many.
        """
        if sampling_params is None:
            return [self.default_params()] * count
        return params_of_each(sampling_params, count)

    def rendered(
        self,
        conversation: list[Message],
        name: str,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, object] | None = None,
    ) -> Prompt:
        """The prompt by which a model is asked to answer a conversation, or to go on with its last message.

        Args:
            variables: more of them for the template.
        """
        text = render(
            self.tokenizer,
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        # A rendered chat template spells out its special tokens itself.
        ids = self.tokenizer.encode(text, add_special_tokens=False, most_tokens=self._max_model_len - 1)
        return Prompt(name, text, ids)

    def token_ids(self, prompt: Prompt, most: int) -> list[int]:
        """Raises:
        RequestError: there are more, or none, or one outside the vocabulary.
        """
        ids = prompt.token_ids
        if ids is None:
            ids = self.tokenizer.encode(prompt.text or "", most_tokens=most)
        return checked_token_ids(ids, most, self._max_model_len, self._spec.vocab_size, prompt.name)

    def made(self, prompt: Prompt, params: SamplingParams) -> list[Completion]:
        """The completions of one prompt, to be run.

        Raises:
            RequestError: the prompt or the params do not fit the model.
        """
        self._runtime.require_working()
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", params.stop, "no stop strings, as the model has no tokenizer")
        # One place is left for an answer.
        token_ids = self.token_ids(prompt, self._max_model_len - 1)
        room = self._max_model_len - len(token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        seed, receipt, request_id = drawn_seed(params), self._witness.receipt(), str(next(self._numbers))
        return [
            Completion(
                token_ids,
                params,
                max_tokens,
                self._spec.eos_token_ids,
                self._tokenizer,
                vocab_size=self._spec.vocab_size,
                index=index,
                seed=seed,
                receipt=receipt,
                request_id=request_id,
            )
            for index in range(params.n)
        ]

    def outputs(self, prompts: Sequence[Prompt], sampling_params: object, use_tqdm: object) -> list[RequestOutput]:
        """Completes prompts together, and waits for them."""
        self._runtime.require_working()
        params = self.params(sampling_params, len(prompts))
        progress = PromptProgress(use_tqdm)
        requests = [self.made(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        progress.begin(requests)
        num_going = sum(map(len, requests))
        updates: SimpleQueue[Update] = SimpleQueue()
        wants_all = progress.wants_all

        def told(update: Update) -> None:
            if update.is_last or wants_all:
                updates.put(update)

        with progress, self._running([completion for request in requests for completion in request], told):
            while num_going:
                update = self._runtime.next_update(updates)
                num_going -= update.is_last
                progress.saw(update)
        decode = None if self._tokenizer is None else self._tokenizer.spelled
        return [RequestOutput.of(prompt.text, each, decode) for prompt, each in zip(prompts, requests, strict=True)]

    def pieces(self, completion: Completion) -> Generator[str, None, None]:
        """Runs one completion, yielding its new text after each token that makes some."""
        updates: SimpleQueue[Update] = SimpleQueue()
        with self._running([completion], updates.put):
            while True:
                update = self._runtime.next_update(updates)
                # Of what was cancelled, by a fault above all, nothing more is given out, however much is there already.
                if update.text and completion.finish_reason != "cancelled":
                    yield update.text
                if update.is_last:
                    return

    @contextmanager
    def _running(self, completions: list[Completion], told: Told) -> Iterator[None]:
        """Has completions run during the block; those that have not ended when it is left are cancelled."""
        self._runtime.require_can_wait()
        try:
            self._runtime.add(completions, told)
            yield
        finally:
            self._runtime.cancel([completion for completion in completions if completion.finish_reason is None])
