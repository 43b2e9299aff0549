"""One conversation of a session, whose cache is kept between its turns."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from tsqp_shm.conversations import asked
from tsqp_shm.errors import RequestError
from tsqp_shm.outputs import RequestOutput
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
    """

    # Of the class, as one whose maker was interrupted is finalised too.
    _llm: LLM | None = None

    def __init__(self, llm: LLM) -> None:
        self.reuses = llm.config.reuses_prefixes
        self._keeper = Keeper()
        self._is_closed = False
        self._llm = llm

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is kept any more; a turn in progress goes on. Closing twice does nothing."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.runtime.close_keeper(self._keeper)

    def start(self, messages: Iterable[Any], sampling_params: SamplingParams | None = None) -> Completion:
        """The next turn's answer, to be run by `LLM.stream_completion`.

        Raises:
            RequestError: as `LLM.start`; also where the conversation is closed. That another turn is in progress is an
                error when this one is run.
        """
        _, completion = self._start(messages, sampling_params)
        return completion

    def stream(
        self, messages: Iterable[Any], sampling_params: SamplingParams | None = None
    ) -> Generator[str, None, None]:
        """The next turn's answer, as `LLM.stream` gives one.

        Raises:
            As `start`.
        """
        completion = self.start(messages, sampling_params)
        return self._open.stream_completion(completion)

    def chat(self, messages: Iterable[Any], sampling_params: SamplingParams | None = None) -> RequestOutput:
        """The next turn's answer, as a whole.

        Raises:
            As `LLM.chat`, and as `start`.
        """
        llm = self._open
        text, completion = self._start(messages, sampling_params)
        for _ in llm.stream_completion(completion):
            pass
        return RequestOutput.of(text, [completion], llm.tokenizer.spelled)

    @property
    def _open(self) -> LLM:
        if self._llm is None:
            raise RequestError("conversation", "one that is closed", "one that is not")
        return self._llm

    def _start(self, messages: Iterable[Any], sampling_params: SamplingParams | None) -> tuple[str, Completion]:
        llm = self._open
        text, token_ids = asked(llm.tokenizer, messages, llm.max_model_len)
        completion = llm.start(token_ids, sampling_params)
        completion.keeper = self._keeper
        return text, completion
