"""One conversation of a session, whose cache is kept between its turns."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from tsqp_shm.conversations import as_conversation
from tsqp_shm.errors import RequestError
from tsqp_shm.outputs import RequestOutput
from tsqp_shm.prompts import Prompt
from tsqp_shm.requests import Requests
from tsqp_shm.tee.caches import Keeper
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tsqp_shm.llm import LLM


class Conversation:
    """Its turns are asked for one after the other, each with all messages so far, as `LLM.chat` takes them. What the
    cache holds of them since the last turn is not computed again: as many tokens as both have in common from the first
    one on. Another request that finds no other cache takes that of the conversation that was used longest ago; the next
    turn then computes everything, and only `num_cached_tokens` tells.

    In modes with int8 weights the tokens are to the bit those of a conversation that is computed anew at each turn. In
    `plain` sums are rounded in another order, as they are by whatever else cuts a prompt in other places: in bfloat16
    the likeliest of two tokens that are as likely may be the other one.

    Made by `LLM.conversation()`. Its cache is free again after `close`, at the end of a `with`, and when nobody holds
    it.

    Attributes:
        reuses: whether a cache is kept in this session, by its mode and `prefix_reuse`. Where it is not, everything is
            computed at each turn.

    Example:
        >>> with llm.conversation() as conversation:
        ...     conversation.reuses
        True
    """

    # Of the class, as one whose maker was interrupted is finalised too.
    _llm: LLM | None = None

    def __init__(self, llm: LLM, requests: Requests) -> None:
        self.reuses = llm.config.reuses_prefixes
        self._keeper = Keeper()
        self._requests = requests
        self._llm = llm

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is kept any more; a turn in progress goes on. Closing twice does nothing.

        Example:
            >>> conversation = llm.conversation()
            >>> conversation.close()
        """
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.runtime.close_keeper(self._keeper)

    def start(self, messages: Iterable[Any], sampling_params: SamplingParams | None = None) -> Completion:
        """The next turn's answer, to be run by `LLM.stream_completion`.

        Raises:
            RequestError: as `LLM.start`; also where the conversation is closed. That another turn is in progress is an
                error when this one is run.

        Example:
            >>> with llm.conversation() as conversation:
            ...     messages = [{"role": "user", "content": "What is the capital of France?"}]
            ...     completion = conversation.start(messages, SamplingParams(temperature=0))
            ...     "".join(llm.stream_completion(completion))
            'The capital of France is Paris.'
        """
        return self._start(self._prompt(messages), sampling_params)

    def stream(
        self, messages: Iterable[Any], sampling_params: SamplingParams | None = None
    ) -> Generator[str, None, None]:
        """The next turn's answer, as `LLM.stream` gives one.

        Raises:
            As `start`.

        Example:
            >>> with llm.conversation() as conversation:
            ...     messages = [{"role": "user", "content": "What is the capital of France?"}]
            ...     list(conversation.stream(messages, SamplingParams(temperature=0, max_tokens=3)))
            ['The', ' capital', ' of']
        """
        return self._open.stream_completion(self.start(messages, sampling_params))

    def chat(self, messages: Iterable[Any], sampling_params: SamplingParams | None = None) -> RequestOutput:
        """The next turn's answer, as a whole.

        Raises:
            As `LLM.chat`, and as `start`.

        Example:
            >>> with llm.conversation() as conversation:
            ...     messages = [{"role": "user", "content": "What is the capital of France?"}]
            ...     conversation.chat(messages, SamplingParams(temperature=0)).outputs[0].text
            'The capital of France is Paris.'
        """
        prompt = self._prompt(messages)
        completion = self._start(prompt, sampling_params)
        for _ in self._open.stream_completion(completion):
            pass
        return RequestOutput.of(prompt.text, [completion], self._requests.tokenizer.spelled)

    @property
    def _open(self) -> LLM:
        if self._llm is None:
            raise RequestError("conversation", "one that is closed", "one that is not")
        return self._llm

    def _prompt(self, messages: Iterable[Any]) -> Prompt:
        return self._requests.rendered(
            as_conversation(messages), "messages", add_generation_prompt=True, continue_final_message=False
        )

    def _start(self, prompt: Prompt, sampling_params: SamplingParams | None) -> Completion:
        completion = self._open.start(prompt.token_ids or (), sampling_params)
        completion.keeper = self._keeper
        return completion
