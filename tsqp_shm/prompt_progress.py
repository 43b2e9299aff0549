"""How far a batch of prompts is: on a terminal, or by a bar of the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tsqp_shm.errors import RequestError
from tsqp_shm.progress import Progress
from tsqp_shm.scalars import flag
from tsqp_shm.tee.completion import Completion
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

    def __init__(self, bar: object, interval_s: float = 1.0) -> None:
        is_shown = flag(bar)
        if is_shown is None and not callable(bar):
            raise RequestError("use_tqdm", bar, "True, False, or what makes a bar as tqdm does", is_mistyped=True)
        self._line = Progress(quiet=not is_shown)
        self.wants_all = self._line.is_shown
        self._make_bar = bar if callable(bar) else None
        self._bar: Any = None
        self._interval_s = interval_s
        self._started_s = self._shown_s = time.monotonic()
        # Of each prompt, how many of its completions have not ended; and those that are being answered.
        self._going: dict[str, int] = {}
        self._answering: set[Completion] = set()
        self._num_completions = self._num_ended = 0
        # Tokens of those that have ended.
        self._read = self._drawn = 0

    def begin(self, requests: Sequence[Sequence[Completion]]) -> None:
        """The completions of each prompt are about to be run."""
        self._going = {request[0].request_id: len(request) for request in requests}
        self._num_completions = sum(self._going.values())
        self._started_s = self._shown_s = time.monotonic()

    def __enter__(self) -> PromptProgress:
        if self._make_bar is not None:
            self._bar = self._make_bar(
                total=len(self._going), desc="Processed prompts", dynamic_ncols=True, postfix=_speeds(0, 0)
            )
            if not (hasattr(self._bar, "update") and hasattr(self._bar, "close")):
                made, self._bar = self._bar, None
                raise RequestError("use_tqdm", made, "what makes a bar as tqdm does", is_mistyped=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._shown_s != self._started_s:
            self._line.show("")

    def saw(self, update: Update) -> None:
        completion = update.completion
        waited_s = max(time.monotonic() - self._started_s, 1e-9)
        if update.is_last:
            self._answering.discard(completion)
            self._num_ended += 1
            # Each completion of a prompt has read it.
            self._read += len(completion.prompt_token_ids) if completion.token_ids else 0
            self._drawn += len(completion.token_ids)
            self._going[completion.request_id] -= 1
            if self._bar is not None and not self._going[completion.request_id]:
                if hasattr(self._bar, "postfix"):
                    self._bar.postfix = _speeds(self._read / waited_s, self._drawn / waited_s)
                self._bar.update(1)
        else:
            self._answering.add(completion)
        if self.wants_all and time.monotonic() - self._shown_s >= self._interval_s:
            self._shown_s = time.monotonic()
            self._line.show(self._words(waited_s))

    def _words(self, waited_s: float) -> str:
        lengths = {completion: len(completion.token_ids) for completion in self._answering}
        num_done = sum(not num_going for num_going in self._going.values())
        read = self._read + sum(len(completion.prompt_token_ids) for completion in lengths)
        drawn = self._drawn + sum(lengths.values())
        speeds = f"{_speed(read / waited_s)} tokens/s in, {_speed(drawn / waited_s)} out"
        # Answers are taken to get as long as those that have ended; until one has, as long as they may.
        mean = self._drawn / self._num_ended if self._num_ended else None
        done = float(self._num_ended)
        for completion, length in lengths.items():
            expected = completion.max_tokens if mean is None else min(mean, completion.max_tokens)
            # One that is longer than expected is taken to be about to end.
            done += length / max(expected, length + 1)
        left_s = round(waited_s * (self._num_completions - done) / done)
        left = f"{'at most ' if mean is None else ''}{_duration(left_s)} left"
        return f"{num_done:,} of {len(self._going):,} prompts, {speeds}, {left}"


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _speed(per_s: float) -> str:
    return f"{per_s:.1f}" if per_s < 10 else f"{per_s:,.0f}"


def _speeds(read_per_s: float, drawn_per_s: float) -> str:
    """As vLLM says them behind its bar."""
    return f"est. speed input: {read_per_s:.2f} toks/s, output: {drawn_per_s:.2f} toks/s"
