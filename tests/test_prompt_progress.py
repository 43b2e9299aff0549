"""How far a batch is: one line on a terminal, nothing in a pipe, or a bar of the caller's as vLLM has one."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import termios
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tsqp_shm import prompt_progress
from tsqp_shm.prompt_progress import PromptProgress
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampling_params import SamplingParams
from tsqp_shm.tee.updates import Update

GONE = "\r\x1b[K"


class Screen:
    """A terminal in the place of stderr, and what comes out of it."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self.terminal = os.fdopen(theirs, "w")
        self._screen = os.fdopen(ours, "rb", buffering=0)

    def shows(self, monkeypatch: pytest.MonkeyPatch, bar: object) -> PromptProgress:
        """What shows its line here. To be called in a test: between its fixtures and it pytest has its own stderr."""
        monkeypatch.setattr("sys.stderr", self.terminal)
        return PromptProgress(bar)

    def read(self) -> str:
        self.terminal.write("|")
        self.terminal.flush()
        seen = b""
        while not seen.endswith(b"|"):
            seen += self._screen.read(1000)
        return seen[:-1].decode()

    def close(self) -> None:
        self.terminal.close()
        self._screen.close()


@pytest.fixture
def screen(request) -> Iterator[Screen]:
    screen = Screen(getattr(request, "param", 120))
    yield screen
    screen.close()


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A time that stands still until a test says otherwise."""
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(prompt_progress, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


def made(number: int, prompt_tokens: int, max_tokens: int, n: int = 1) -> list[Completion]:
    params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True)
    return [
        Completion([1] * prompt_tokens, params, max_tokens, [], None, vocab_size=4, index=index, request_id=str(number))
        for index in range(n)
    ]


def grow(progress: PromptProgress, completion: Completion, num_tokens: int) -> None:
    for _ in range(num_tokens):
        completion.grow(2)
    progress.saw(Update(completion, [2] * num_tokens, finish_reason=completion.finish_reason))


def test_the_line_says_what_is_done_how_fast_and_for_how_long_still(screen, clock, monkeypatch):
    first, second, third = requests = [made(number, 100, 40) for number in range(3)]
    progress = screen.shows(monkeypatch, True)
    assert progress.wants_all
    progress.begin(requests)
    with progress:
        grow(progress, first[0], 1)
        # What is done within a second shows nothing.
        assert screen.read() == ""
        clock.now_s += 10
        grow(progress, second[0], 9)
        # Ten of at most 120 tokens.
        assert screen.read() == f"{GONE}0 of 3 prompts, 20 tokens/s in, 1.0 out, at most 1:50 left"
        clock.now_s += 10
        grow(progress, first[0], 39)
        # One whole answer and 9 of 40 tokens, where answers are 40 tokens.
        assert screen.read() == f"{GONE}1 of 3 prompts, 10 tokens/s in, 2.5 out, 0:29 left"
        clock.now_s += 0.5
        grow(progress, second[0], 31)
        assert screen.read() == ""
        clock.now_s += 39.5
        grow(progress, third[0], 40)
        assert screen.read() == f"{GONE}3 of 3 prompts, 5.0 tokens/s in, 2.0 out, 0:00 left"
    assert screen.read() == GONE


def test_answers_that_end_early_make_the_rest_shorter(screen, clock, monkeypatch):
    requests = [made(number, 1, 1000) for number in range(4)]
    progress = screen.shows(monkeypatch, True)
    progress.begin(requests)
    with progress:
        clock.now_s += 10
        (ended,) = requests[0]
        for _ in range(10):
            ended.grow(2)
        ended.cancel("deadline")
        progress.saw(Update(ended, ended.token_ids, finish_reason="deadline"))
        # Ten tokens in ten seconds, and three more of ten.
        assert screen.read().endswith(", 0:30 left")
        clock.now_s += 3590
        # One that is longer than those before may end any time.
        grow(progress, requests[1][0], 99)
        assert screen.read().endswith("1 of 4 prompts, 0.0 tokens/s in, 0.0 out, 1:00:36 left")


@pytest.mark.parametrize("screen", [40, 0], indirect=True)
def test_the_line_stays_one_line_on_a_narrow_terminal(screen, clock, monkeypatch):
    requests = [made(0, 5, 1000)]
    progress = screen.shows(monkeypatch, True)
    progress.begin(requests)
    with progress:
        clock.now_s += 123
        grow(progress, requests[0][0], 10)
        shown = screen.read().removeprefix(GONE)
        assert shown.startswith("0 of 1 prompts, 0.0 tokens/s in, 0.1")
        assert len(shown) < (screen.columns or 80)


def test_nothing_is_shown_in_a_pipe_or_unasked(screen, clock, monkeypatch):
    requests = [made(0, 5, 10)]
    for bar, stderr in ((False, screen.terminal), (True, io.StringIO())):
        monkeypatch.setattr("sys.stderr", stderr)
        progress = PromptProgress(bar)
        assert not progress.wants_all
        progress.begin(requests)
        with progress:
            clock.now_s += 100
            progress.saw(Update(requests[0][0], [2], finish_reason="stop"))
    assert stderr.getvalue() == screen.read() == ""


def test_a_bar_is_told_what_vllm_tells_tqdm(screen, clock, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    bars = []

    def make(**said: object) -> object:
        bars.append(tqdm.tqdm(**said, file=io.StringIO()))
        return bars[-1]

    one, two = requests = [made(0, 100, 10), made(1, 50, 20, n=2)]
    progress = screen.shows(monkeypatch, make)
    assert not progress.wants_all
    progress.begin(requests)
    with progress:
        (bar,) = bars
        assert (bar.total, bar.desc, bar.n) == (2, "Processed prompts", 0)
        assert bar.postfix == "est. speed input: 0.00 toks/s, output: 0.00 toks/s"
        clock.now_s += 10
        grow(progress, one[0], 10)
        assert (bar.n, bar.postfix) == (1, "est. speed input: 10.00 toks/s, output: 1.00 toks/s")
        grow(progress, two[1], 20)
        assert bar.n == 1
        clock.now_s += 10
        # Each of two completions has read its prompt.
        grow(progress, two[0], 20)
        assert (bar.n, bar.postfix) == (2, "est. speed input: 10.00 toks/s, output: 2.50 toks/s")
    assert bar.disable
    assert screen.read() == ""
