"""What is told of a completion while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tsqp_shm.errors import TsqpError
from tsqp_shm.tee.completion import Completion


@dataclass(frozen=True)
class Update:
    """What a step has added to a completion.

    Attributes:
        token_ids, text: what is new of them.
        finish_reason: None while it goes on; see `Completion`.
        error: why it will not go on.
    """

    completion: Completion
    token_ids: Sequence[int] = ()
    text: str = ""
    finish_reason: str | None = None
    error: TsqpError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


# Called between two steps by whoever runs them: puts the update where a caller waits for it, and nothing else. A
# queue's `put`, or for an event loop `partial(loop.call_soon_threadsafe, queue.put_nowait)`.
Told = Callable[[Update], None]


class Outlet:
    """Where a completion's updates go, and how much of it has been told."""

    def __init__(self, completion: Completion, told: Told) -> None:
        self._completion = completion
        self._told = told
        self._num_tokens = 0
        self._num_characters = 0

    def tell(self) -> bool:
        """Tells what is new, if anything is. Returns False where nobody can be told any more."""
        completion = self._completion
        token_ids, text = completion.token_ids[self._num_tokens :], completion.text[self._num_characters :]
        if token_ids or completion.finish_reason is not None:
            self._num_tokens += len(token_ids)
            self._num_characters += len(text)
            # One of the caller's own: whoever raises it gives it a traceback.
            error = None if completion.error is None else completion.error.again()
            return self._tell(Update(completion, token_ids, text, completion.finish_reason, error))
        return True

    def fail(self, error: TsqpError) -> None:
        self._tell(Update(self._completion, error=error))

    def _tell(self, update: Update) -> bool:
        try:
            self._told(update)
        except BaseException:
            # An event loop that was closed, say: its owner's affair, and no fault of the session or of other callers.
            return False
        return True
