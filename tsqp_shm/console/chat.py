"""A conversation, turn by turn, with whoever types it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tsqp_shm.console.answer import show
from tsqp_shm.console.interrupts import Interrupts
from tsqp_shm.console.notices import Notices
from tsqp_shm.console.typed import Typed
from tsqp_shm.conversation import Conversation
from tsqp_shm.errors import RequestError, TsqpError
from tsqp_shm.llm import LLM
from tsqp_shm.modes import MODES
from tsqp_shm.printable import is_text
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampling_params import SamplingParams

LEAVING = "/exit"
CLEARING = "/clear"
# A word that nobody asks a model.
_COMMAND = re.compile(r"/[a-z]+")
HOW_TO_LEAVE = f"Ctrl-D or {LEAVING} ends the chat"
# Of the model's length, what an answer needs to be asked for at all, and what is kept of a conversation that left less.
_ROOM = 1 / 8
_KEPT = 1 / 2
# More tokens than a template puts around a message.
_AROUND_MESSAGE = 64
_LOOK_S = 0.005

Message = dict[str, str]


@dataclass
class Chat:
    """A conversation and where it is shown.

    Args:
        llm: answers it.
        params: of each answer.
        typed: where the turns come from.
        notices: takes what is said about it.
        begin: told of each completion before it is run.
        system: what the conversation begins with; None: nothing, or what the model's template has.
    """

    llm: LLM
    params: SamplingParams
    typed: Typed
    notices: Notices
    begin: Callable[[Completion], None]
    system: str | None = None
    _messages: list[Message] = field(default_factory=list)
    _num_used: int = 0

    def run(self, tell: Callable[[Completion], None]) -> None:
        """Until the end of input. On a terminal Ctrl-C cuts an answer short or clears a line, and ends nothing.

        Args:
            tell: takes each completion that has ended.

        Raises:
            RequestError: the model's template takes no conversation, or none that begins like this.
            KeyboardInterrupt: where nobody types.
        """
        # Before anything is typed in vain.
        self.llm.chat_prompt([*self._beginning, {"role": "user", "content": "?"}])
        self.typed.remember()
        with self.llm.conversation() as conversation, Interrupts() as interrupts:
            self._introduce(conversation)
            is_first = True
            while (line := self._ask(interrupts)) is not None:
                content = line.removeprefix("\ufeff") if is_first else line
                is_first = False
                if not self._is_question(content):
                    continue
                if self.typed.is_terminal and content.strip() == LEAVING:
                    return
                completion = self._answered(conversation, content, interrupts)
                if completion is not None:
                    tell(completion)

    @property
    def _beginning(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _introduce(self, conversation: Conversation) -> None:
        if self.typed.is_terminal:
            self.notices.say(
                f"Ctrl-C cuts an answer short; {HOW_TO_LEAVE}, {CLEARING} begins another. {self.typed.whereabouts}"
            )
        if not conversation.reuses:
            mode = self.llm.config.mode
            why = f"--prefix-reuse keeps it, and in mode {mode} shows in the lengths that cross"
            self.notices.say(
                "each turn computes the whole conversation again"
                + (f" ({why})" if MODES[mode].has_pads else " (--prefix-reuse keeps it)")
            )

    def _ask(self, interrupts: Interrupts) -> str | None:
        while True:
            try:
                with self.notices.held(), interrupts.welcome():
                    return self.typed.ask()
            except KeyboardInterrupt:
                if not self.typed.is_terminal:
                    raise
                unfinished = self.typed.unfinished
                interrupts.forget()
                print(flush=True)
                if not unfinished:
                    self.notices.insist(HOW_TO_LEAVE)

    def _is_question(self, content: str) -> bool:
        if not content.strip():
            return False
        if not is_text(content):
            self.notices.insist("this line is no UTF-8 text, and was not asked")
            return False
        if self.typed.is_terminal and content.strip() == CLEARING:
            self._messages.clear()
            self._num_used = 0
            self.notices.insist("another conversation begins")
            return False
        command = content.strip()
        if self.typed.is_terminal and command != LEAVING and _COMMAND.fullmatch(command):
            unknown = "" if command == "/help" else f"there is no {command}; "
            self.notices.insist(f"{unknown}{CLEARING} begins another conversation, {HOW_TO_LEAVE}")
            return False
        return True

    def _answered(self, conversation: Conversation, content: str, interrupts: Interrupts) -> Completion | None:
        """Runs one turn. Returns its completion; None where there was none, and the conversation is as it was."""
        try:
            asked = self._fitting([*self._messages, {"role": "user", "content": content}])
            completion = conversation.start([*self._beginning, *asked], self.params)
        except RequestError as error:
            self.notices.insist(f"not asked, and not part of the conversation: {error}")
            return None
        if left_out := len(self._messages) + 1 - len(asked):
            turns = "its oldest turn is" if left_out == 2 else f"its {left_out // 2} oldest turns are"
            most = self.llm.max_model_len
            self.notices.insist(f"the conversation has outgrown the {most:,} tokens of a sequence: {turns} left out")
        self.begin(completion)
        try:
            with self.notices.held(), self.typed.unechoed(), interrupts.welcome():
                show(self.llm, completion)
        except KeyboardInterrupt:
            self._await_end(completion)
            interrupts.forget()
        except TsqpError as error:
            if completion.error is None:
                raise
            # Of this request alone; the session goes on.
            self.notices.insist(str(error))
            return None
        self._messages = [*asked, {"role": "assistant", "content": completion.text}]
        self._num_used = len(completion.prompt_token_ids) + len(completion.token_ids)
        return completion

    def _await_end(self, completion: Completion) -> None:
        """A cancelled answer ends with the step that it is in; the next turn is not asked before."""
        end_s = time.monotonic() + self.llm.config.timeout_s
        while completion.finish_reason is None and time.monotonic() < end_s:
            time.sleep(_LOOK_S)

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """The conversation, without its oldest turns if it leaves too little room for an answer."""
        most = self.llm.max_model_len
        limit = most * (1 - _ROOM)
        # No tokenizer makes more tokens than there are bytes, and asking it takes a while.
        new = len(messages[-1]["content"].encode()) + _AROUND_MESSAGE
        if self._num_used + new <= limit:
            return messages
        while len(messages) > 1 and not self._fits(messages, limit):
            # A question and its answer.
            messages, limit = messages[2:], most * _KEPT
        return messages

    def _fits(self, messages: list[Message], limit: float) -> bool:
        try:
            return len(self.llm.chat_prompt([*self._beginning, *messages])) <= limit
        except RequestError:
            return False
