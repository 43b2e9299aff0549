"""How far a batch of prompts is: on a terminal, or by a bar of the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tsqp_shm.errors import RequestError
from tsqp_shm.progress import Progress
from tsqp_shm.scalars import flag
from tsqp_shm.tee.updates import Update

Bar = bool | Callable[..., Any]


class PromptProgress:
    """Is told of updates by who waits for them, and is left at the end.

    Args:
        bar: True for a line on stderr, where that is a terminal; what makes a bar is called as vLLM calls tqdm.
        interval_s: of the line; what is done before shows nothing.

    Attributes:
        wants_all: whether it is to be told of more than each completion's end.

    Raises:
        RequestError: the bar is neither a flag nor what makes one.
    """

    def __init__(self, bar: object, count: int, interval_s: float = 1.0) -> None:
        is_shown = flag(bar)
        if is_shown is None and not callable(bar):
            raise RequestError("use_tqdm", bar, "True, False, or what makes a bar as tqdm does", is_mistyped=True)
        self._line = Progress(quiet=not is_shown)
        self.wants_all = self._line.is_shown
        self._count, self._done, self._tokens = count, 0, 0
        self._interval_s = interval_s
        self._started_s = self._shown_s = time.monotonic()
        self._make_bar = bar if callable(bar) else None
        self._bar: Any = None

    def __enter__(self) -> PromptProgress:
        if self._make_bar is not None:
            self._bar = self._make_bar(total=self._count, desc="Processed prompts")
            if not (hasattr(self._bar, "update") and hasattr(self._bar, "close")):
                made, self._bar = self._bar, None
                raise RequestError("use_tqdm", made, "what makes a bar as tqdm does", is_mistyped=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._shown_s != self._started_s:
            self._line.show("")

    def saw(self, update: Update, *, ends_prompt: bool) -> None:
        """Args:
        ends_prompt: whether it is the last of its prompt, of which there may be several completions.
        """
        self._tokens += len(update.token_ids)
        self._done += ends_prompt
        if self._bar is not None and ends_prompt:
            self._bar.update(1)
        now_s = time.monotonic()
        if self.wants_all and now_s - self._shown_s >= self._interval_s:
            self._shown_s = now_s
            waited_s = now_s - self._started_s
            self._line.show(f"{self._done} of {self._count} prompts, {self._tokens:,} tokens, {waited_s:.0f} s")
