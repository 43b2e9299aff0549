"""What a person sees of a session and types into it: chats, answers that are cut, bring-up, statistics."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import assert_one_line, run
from models import RandomModel, with_bytes_as_tokens
from pseudo_terminal import OnTerminal

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.cli.settings import answer_params
from tsqp_shm.cli.verbs import build_parser
from tsqp_shm.console.answer import why_cut
from tsqp_shm.console.bring_up import print_bring_up
from tsqp_shm.console.chat import Chat
from tsqp_shm.console.interrupts import Interrupts
from tsqp_shm.console.notices import Notices
from tsqp_shm.console.statistics import print_line
from tsqp_shm.errors import RequestError
from tsqp_shm.modes import MODES
from tsqp_shm.tee.completion import Completion

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
FEW = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Each byte is a token, so that what was asked can be counted."""
    fields = {"vocab_size": 256, "max_position_embeddings": 8192}
    folder = with_bytes_as_tokens(RandomModel("llama", fields).write(tmp_path_factory.mktemp("console") / "model"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def llm(model) -> Iterator[LLM]:
    with LLM(model, mode="tee-only", max_model_len=64, max_num_seqs=2, tee_threads=1) as llm:
        yield llm


class Scripted:
    """Where lines come from that nobody types."""

    is_terminal = False
    unfinished = whereabouts = ""

    def __init__(self, *lines: str) -> None:
        self._lines = iter(lines)

    def remember(self) -> None: ...

    def unechoed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ask(self) -> str | None:
        return next(self._lines, None)


@pytest.fixture
def converse(llm, capsys) -> Callable[..., tuple[list[str], list[str]]]:
    """Returns what was asked of the model in each turn, and the lines that were said beside the answers."""

    def run_chat(*lines: str, params: SamplingParams = FEW, system: str | None = None) -> tuple[list[str], list[str]]:
        out = io.StringIO()
        asked: list[Completion] = []
        Chat(llm, params, Scripted(*lines), Notices(out), asked.append, system).run(lambda completion: None)
        return [llm.tokenizer.decode(each.prompt_token_ids) for each in asked], out.getvalue().splitlines()

    return run_chat


# A conversation.


def test_a_turn_has_all_that_was_said_before_it_and_begins_with_the_system_message(converse):
    asked, said = converse("one", "", "two", system="be brief")
    assert asked[0] == "[be brief][one]"
    assert re.fullmatch(r"\[be brief\]\[one\]\[.*\]\[two\]", asked[1], re.DOTALL)
    assert said == []


def test_a_conversation_that_has_outgrown_the_model_goes_on_without_its_oldest_turns(converse):
    asked, said = converse("a" * 20, "b" * 20, "c" * 20)
    assert "a" * 20 in asked[1]
    assert asked[2] == f"[{'c' * 20}]"
    assert said == ["the conversation has outgrown the 64 tokens of a sequence: its 2 oldest turns are left out"]


def test_a_message_that_does_not_fit_is_not_asked_and_the_conversation_is_as_it_was(converse):
    asked, said = converse("one", "x" * 70, "two")
    assert len(asked) == 2
    assert asked[1].startswith("[one][") and asked[1].endswith("][two]")
    (line,) = said
    assert line.startswith("not asked, and not part of the conversation: prompt: got 'more than 63 tokens'")


def test_a_request_that_fails_by_itself_ends_no_chat(converse, monkeypatch):
    """Rules that leave no token; nothing of it stays in the conversation."""
    rules = SamplingParams(max_tokens=4, allowed_token_ids=[65], bad_words=["b"])
    asked, said = converse("one", "two", params=rules)
    assert asked == ["[one]", "[two]"]
    assert len(said) == 2 and "leave none" in said[0]


def test_a_template_that_takes_no_such_conversation_is_refused_before_anything_is_typed(llm, monkeypatch):
    def refuse(messages):
        raise RequestError("messages", messages, "none with a system message")

    monkeypatch.setattr(llm, "chat_prompt", refuse)
    chat = Chat(llm, FEW, Scripted("never asked"), Notices(io.StringIO()), pytest.fail, "be brief")
    with pytest.raises(RequestError, match="none with a system message"):
        chat.run(pytest.fail)


def test_a_session_that_keeps_no_cache_says_so_once(model, capsys):
    with LLM(model, mode="tee-only", max_model_len=64, prefix_reuse=False) as llm:
        out = io.StringIO()
        Chat(llm, FEW, Scripted("one", "two"), Notices(out), lambda completion: None).run(lambda completion: None)
    assert out.getvalue() == "each turn computes the whole conversation again (--prefix-reuse keeps it)\n"


# An answer that is cut.


def completed(llm: LLM, **params: object) -> Completion:
    completion = llm.start([1] * 10, SamplingParams(temperature=0, ignore_eos=True, **params))
    for _ in llm.stream_completion(completion):
        pass
    return completion


def test_an_answer_that_was_cut_says_at_what_and_what_to_do(llm):
    assert why_cut(llm, completed(llm, max_tokens=3)) == "cut at 3 tokens; --max-new-tokens N allows more"
    for most in (None, 60):
        said = why_cut(llm, completed(llm, max_tokens=most))
        assert said == "cut at 64 tokens of prompt and answer; --max-model-len allows up to 8,192"
    said = why_cut(llm, completed(llm, max_tokens=8, deadline_s=1e-4))
    assert said == "cut at its deadline of 0.0001 s; --deadline S allows more"


def test_an_answer_that_has_ended_by_itself_says_nothing(llm):
    token = completed(llm, max_tokens=1).token_ids[0]
    assert why_cut(llm, completed(llm, max_tokens=8, stop_token_ids=[token])) is None


@pytest.mark.parametrize(
    ("flags", "most"),
    [([], 64), (["--chat"], None), (["--interactive"], None), (["--chat", "--max-new-tokens", "7"], 7)],
)
def test_an_answer_of_a_chat_goes_on_to_its_end_unless_a_flag_says_otherwise(llm, flags, most):
    assert answer_params(build_parser().parse_args(["launch", *flags]), llm).max_tokens == most


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--system", "secret"], "--chat or --interactive beside it"),
        (["--keep-history"], "--interactive beside it"),
    ],
)
def test_a_flag_of_a_chat_without_one_is_one_line(model, flags, said):
    refused = run("launch", model, "--mode", "tee-only", *flags)
    assert_one_line(refused, 2, said)
    assert "secret" not in refused.stderr


# What is said beside it.


def test_statistics_are_one_line(llm):
    out = io.StringIO()
    print_line(completed(llm, max_tokens=3), out)
    line = r"prefill 10 tokens in [\d.e-]+ s \([\d,.]+/s\), decode 3 in [\d.e-]+ s \([\d,.]+/s\)\n"
    assert re.fullmatch(line, out.getvalue())


class Told:
    """A session of another mode, as far as its bring-up report goes."""

    max_model_len = 64

    def __init__(self, llm: LLM, **facts: object) -> None:
        self.config = llm.config
        self._facts = {**llm.bring_up(), **facts}

    def bring_up(self) -> dict[str, object]:
        return self._facts


PADS = {
    "capacity_rows": 4096, "bytes": 1 << 30, "locked": False, "out": "tee", "threads": 1, "maker": "direct",
    "prefill": "auto", "key_id": "0" * 64, "locks": {"stock": False, "reason": "not locked: stock (too little)"},
}  # fmt: skip
ARENA = {
    "name": "/arena", "bytes": 1 << 20, "slots": 3, "pages": 256, "locked": False, "locked_reason": "no room",
}  # fmt: skip
OF_TWO = {
    "arena": ARENA, "device": "cuda:0 NVIDIA", "transfer": "registered", "pads": PADS,
    "doorbell": {"mode": "adaptive", "endpoint": "ipc:///doorbell"},
    "processes": {"tee": {"pid": 1}, "gpu": {"pid": 2}},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_three_lines_leave_out_nothing_that_is_not_protected_pinned_or_locked(llm, mode):
    facts = {**OF_TWO, "mode": mode}
    if not MODES[mode].has_pads:
        del facts["pads"]
    told = Told(llm, **facts) if MODES[mode].has_gpu_process else llm
    out = io.StringIO()
    print_bring_up(told, out, verbose=False)
    first, second, third, last = out.getvalue().split("\n", 3)
    assert f"{mode}: {MODES[mode].protects}" in first
    assert all(other in first for other in MODES)
    assert "as found, not pinned" in second
    assert last == "\n"
    if MODES[mode].has_gpu_process:
        assert "cuda:0 NVIDIA, slots registered" in second
        assert "not locked (no room)" in third
    if MODES[mode].has_pads:
        assert "stock of 4,096 rows, 1,024 MiB, not locked" in third
        assert "not locked: stock (too little)" in third


def test_all_of_the_report_has_what_the_three_lines_have(llm):
    out = io.StringIO()
    print_bring_up(Told(llm, **OF_TWO, mode="blinded"), out, verbose=True)
    for said in (MODES["blinded"].protects, "--mode tee-only: ", "not pinned", "not locked (no room)", "4,096 rows"):
        assert said in out.getvalue()


def test_a_notice_waits_for_the_end_of_a_line_and_many_are_cut():
    out = io.StringIO()
    notices = Notices(out)
    notices.say("at once")
    with notices.held():
        for number in range(202):
            notices.say(f"held {number}")
        assert out.getvalue() == "at once\n"
    assert out.getvalue().splitlines()[1:3] == ["2 earlier lines are left out", "held 2"]
    assert out.getvalue().endswith("held 201\n")


def test_a_quiet_one_says_what_is_insisted_on_alone():
    out = io.StringIO()
    notices = Notices(out, is_quiet=True)
    notices.say("no")
    notices.insist("yes")
    assert out.getvalue() == "yes\n"


def test_an_interrupt_is_kept_until_it_is_welcome_and_comes_once():
    with Interrupts() as interrupts:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.welcome():
            raise AssertionError("the block is not entered")
        with interrupts.welcome():
            pass
        with pytest.raises(KeyboardInterrupt), interrupts.welcome():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        interrupts.forget()
        with interrupts.welcome():
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# On a terminal.


def prompts(terminal: OnTerminal) -> int:
    return terminal.seen.count(b"> ")


def test_a_chat_on_a_terminal(model, monkeypatch, tmp_path):
    """One session, in which a person does what persons do: one after the other, as a start takes longest."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = tmp_path / "tsqp-shm" / "history"
    flags = ["--mode", "tee-only", "--interactive", "--keep-history", "--ignore-eos", "--max-model-len", "8000"]
    with OnTerminal("launch", model, *flags, columns=40) as chat:

        def asks_again(after: int) -> None:
            chat.read_until(lambda: prompts(chat) > after)

        def ask(keys: bytes) -> str:
            """Returns what came until Ctrl-C had cut the answer."""
            begin, asked = len(chat.seen), prompts(chat)
            chat.type(keys)
            chat.read_until(lambda: b"\x1b[?2004l" in chat.seen[begin:] and len(chat.seen) > begin + 200)
            # Nothing of the next question is shown within an answer; Ctrl-C forgets it.
            chat.type(b"later")
            chat.type(b"\x03")
            asks_again(asked)
            assert b"later" not in chat.seen
            return chat.seen[begin:].decode()

        asks_again(0)
        start = re.sub(r"\x1b\[[?\d]*\w", "", chat.seen.decode())
        assert all(len(line) < 40 for line in start.splitlines())
        assert "kept in" in start

        # An answer is cut; it says so, and asks again.
        first = ask(b"abc\x01[\x05]\r")
        assert re.search(r"cut by Ctrl-C after [\d,]+\s+tokens", first)
        assert "prefill 7 tokens" in " ".join(first.split())

        # A line that was begun is thrown away; where there is none, it says how one leaves.
        asked = prompts(chat)
        chat.type(b"not this")
        chat.read_until(lambda: chat.seen.endswith(b"not this"))
        interrupt(chat, asked)
        begin = len(chat.seen)
        for count in (2, 3):
            chat.type(b"\x03")
            asks_again(asked + count - 1)
        assert chat.seen[begin:].count(b"Ctrl-D or /exit ends the chat") == 2

        # Who goes on after Ctrl-Z finds what was typed: the shell has taken the terminal back meanwhile.
        asked = prompts(chat)
        chat.type(b"xy")
        chat.read_until(lambda: chat.seen.endswith(b"xy"))
        os.kill(chat.pid, signal.SIGCONT)
        chat.read_until(lambda: prompts(chat) > asked and chat.seen.endswith(b"> xy"))
        chat.type(b"\x03")
        asks_again(asked + 1)

        # What is pasted is one question, in whatever characters.
        begin = prompts(chat)
        chat.type(b"/clear\r")
        asks_again(begin)
        pasted = ask("\x1b[200~日本\né\x1b[201~\r".encode())
        assert f"of {len('[日本?é]'.encode())} tokens" in " ".join(pasted.split())

        # The line before is there again, by the arrow.
        begin = prompts(chat)
        chat.type(b"/clear\r")
        asks_again(begin)
        again = ask(b"\x1b[A\x1b[A\r")
        assert f"of {len('[日本?é]'.encode())} tokens" in " ".join(again.split())

        assert not chat.echoes
        chat.type(b"\x04")
        assert chat.wait() == 0
        assert chat.echoes
    assert [json.loads(line) for line in history.read_text().splitlines()] == [
        "[abc]", "/clear", "日本\né", "/clear", "日本\né"
    ]  # fmt: skip
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def interrupt(chat: OnTerminal, asked: int) -> None:
    """Types Ctrl-C until there is another prompt: one that comes in the very moment in which the line begins to be read
    is lost, and is typed again by whoever sits there."""
    typed_s = [0.0]

    def asks_again() -> bool:
        if time.monotonic() > typed_s[0] + 2:
            typed_s[0] = time.monotonic()
            chat.type(b"\x03")
        return prompts(chat) > asked

    chat.read_until(asks_again)


TALKING_SITE = """
import os, sys, threading, time
if "gpu" in sys.orig_argv[:5]:
    def talk():
        for number in range(10000):
            time.sleep(0.02)
            os.write(1, b"talking %d\\n" % number)
    threading.Thread(target=talk, daemon=True).start()
"""


@pytest.mark.slow
def test_a_launch_s_chat_on_a_terminal_says_what_is_waited_for_and_no_line_of_it_is_torn(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    (tmp_path / "sitecustomize.py").write_text(TALKING_SITE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parents[1]}")
    flags = ["--interactive", "--max-new-tokens", "40", "--ignore-eos", "--max-model-len", "400"]
    with OnTerminal("launch", model, *flags, "-v", columns=100) as chat:
        chat.read_until(lambda: prompts(chat) and b"Ctrl-C" in chat.seen)
        assert b"imports torch" in chat.seen
        for _ in range(2):
            # As a terminal sends it: to the launcher, too, which goes on.
            interrupt(chat, prompts(chat))
        chat.type(b"12345")
        chat.read_until(lambda: chat.seen.endswith(b"12345"))
        begin = len(chat.seen)
        chat.type(b"\r")
        chat.read_until(lambda: b"decode" in chat.seen[begin:] and prompts(chat) > 3)
        chat.type(b"\x04")
        assert chat.wait() == 0
    lines = chat.seen.decode().replace("\x1b[?2004l", "\r\n").splitlines()
    talk = [line for line in lines if "talking" in line]
    assert len(talk) > 3
    assert all(re.fullmatch(r"gpu: talking \d+", line.strip()) for line in talk)
