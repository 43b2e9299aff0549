"""The command's standard streams: closed, full, without a reader, in another encoding; and what is typed into it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import assert_one_line
from models import RandomModel, with_bytes_as_tokens
from pseudo_terminal import OnTerminal

from tsqp_shm.cli.settings import MAX_PROMPT_BYTES, decoded, prompt_text
from tsqp_shm.errors import ConfigError

COMMAND = [sys.executable, "-m", "tsqp_shm"]
REDIRECTIONS = {0: "<&-", 1: ">&-", 2: "2>&-"}
CLOSED = [(0,), (1,), (2,), (0, 1, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = with_bytes_as_tokens(RandomModel("llama").write(tmp_path_factory.mktemp("streams") / "model"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def run(words: Sequence[object], redirection: str = "", **options: object) -> subprocess.CompletedProcess:
    """Runs a command with redirections of a shell."""
    shell = ["sh", "-c", f'"$@" {redirection}', "sh", *COMMAND, *map(str, words)]
    return subprocess.run(shell, capture_output=True, **{"stdin": subprocess.DEVNULL, **options})


@pytest.mark.parametrize("closed", CLOSED, ids=lambda closed: " ".join(REDIRECTIONS[number] for number in closed))
def test_a_closed_stream_is_as_the_null_device(closed):
    """What is said on the one never lands in what was opened in its place, here the folder's lock or a socket."""
    said = run(["ps"], " ".join(REDIRECTIONS[number] for number in closed))
    assert said.returncode == 0
    assert (said.stdout == b"") == (1 in closed)
    assert said.stderr == b""
    refused = run(["launch", "/nowhere/at/all"], " ".join(REDIRECTIONS[number] for number in closed))
    assert refused.returncode == 1
    assert refused.stdout == b""
    assert (refused.stderr == b"") == (2 in closed)


@pytest.mark.parametrize("words", [["ps"], ["ps", "--json"], ["--help"], ["--version"], ["env"]], ids=" ".join)
def test_an_answer_that_cannot_be_written_is_one_line(words):
    said = run(words, "> /dev/full")
    assert_one_line(
        subprocess.CompletedProcess(words, said.returncode, said.stdout.decode(), said.stderr.decode()),
        1, "standard output cannot be written", os.strerror(errno.ENOSPC),
    )  # fmt: skip


def test_a_report_that_cannot_be_written_ends_nothing():
    said = run(["launch", "/nowhere/at/all"], "2> /dev/full")
    assert (said.returncode, said.stdout, said.stderr) == (1, b"", b"")
    said = run(["ps"], "2> /dev/full")
    assert (said.returncode, said.stdout != b"", said.stderr) == (0, True, b"")


def test_a_reader_that_has_gone_is_left_in_peace():
    reading, writing = os.pipe()
    os.close(reading)
    said = subprocess.run([*COMMAND, "ps"], stdout=writing, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    os.close(writing)
    assert (said.returncode, said.stderr) == (141, b"")


@pytest.mark.long
def test_a_session_with_all_streams_closed_works(model):
    said = run(["launch", model, "--max-new-tokens", "2", "--max-model-len", "64"], "<&- >&- 2>&-")
    assert (said.returncode, said.stdout, said.stderr) == (0, b"", b"")


@pytest.mark.slow
def test_an_answer_that_fits_nowhere_ends_the_session_with_one_line(model):
    said = run(["launch", model, "-q", "--max-new-tokens", "2", "--max-model-len", "64"], "> /dev/full")
    assert said.returncode == 1
    assert said.stderr.decode().splitlines() == [
        f"tsqp-shm: standard output cannot be written: {os.strerror(errno.ENOSPC)}"
    ]


UNREADABLE = [
    pytest.param(b"ab\xff", "byte 2 is 0xff", id="no UTF-8"),
    pytest.param("Grüße".encode("latin-1"), "byte 2 is 0xfc", id="latin-1"),
    pytest.param("hi".encode("utf-16"), "UTF-16", id="UTF-16"),
    pytest.param("hi".encode("utf-16-be").join([b"\xfe\xff", b""]), "UTF-16", id="UTF-16 BE"),
    pytest.param("hi".encode("utf-32"), "UTF-32", id="UTF-32"),
    pytest.param(b"\xed\xa0\x80", "byte 0", id="surrogate"),
]


@pytest.mark.parametrize(("data", "said"), UNREADABLE)
def test_a_prompt_that_is_no_utf8_text_is_one_line(model, tmp_path, data, said):
    path = tmp_path / "prompt"
    path.write_bytes(data)
    for file, options in ((path, {}), ("-", {"stdin": None, "input": data})):
        refused = run(["launch", model, "--prompt-file", file], **options)
        assert (refused.returncode, refused.stdout) == (2, b"")
        assert len(refused.stderr.splitlines()) == 1
        assert said in refused.stderr.decode()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfabc", "abc"),
        (b"abc\n", "abc\n"),
        (b"a\r\nb\rc", "a\nb\nc"),
        (b"a\0b\x1b", "a\0b\x1b"),
        ("Grüße 🙂".encode(), "Grüße 🙂"),
        (b"", ""),
        # In the middle it is a character like another.
        ("a\ufeffb".encode(), "a\ufeffb"),
    ],
)
def test_a_prompt_is_what_the_file_says(data, text):
    assert decoded(data) == text


@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
def test_an_argument_that_is_no_utf8_text_is_one_line_that_does_not_repeat_it(model, flag):
    refused = subprocess.run(
        [*COMMAND, "launch", str(model), flag, b"secret\xff"], capture_output=True, stdin=subprocess.DEVNULL
    )
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert len(refused.stderr.splitlines()) == 1
    assert b"UTF-8" in refused.stderr
    assert b"secret" not in refused.stderr


def prompt_of(path: object) -> str:
    return prompt_text(argparse.Namespace(prompt=None, prompt_file=str(path)))


@pytest.mark.parametrize("name", ["folder", "missing", "closed", "a\0b"])
def test_a_prompt_file_that_cannot_be_read_is_an_error_of_the_flag(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").symlink_to("/dev/fd/1000")
    with pytest.raises(ConfigError, match="prompt-file") as caught:
        prompt_of(tmp_path / name)
    assert caught.value.exit_code == 2


def test_a_prompt_file_without_an_end_is_refused():
    with pytest.raises(ConfigError, match=f"at most {MAX_PROMPT_BYTES:,} bytes"):
        prompt_of("/dev/zero")


@pytest.mark.parametrize("variable", ["TSQP_SHM_ARGUMENTS", "TSQP_SHM_LIFELINE"])
@pytest.mark.parametrize("value", ["", "x", "1000", "0"])
def test_a_variable_that_only_a_parent_sets_is_one_line(variable, value):
    refused = run(["ps"], env={**os.environ, variable: value})
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert len(refused.stderr.splitlines()) == 1
    assert variable.encode() in refused.stderr


@pytest.mark.slow
def test_a_prompt_comes_through_a_descriptor_and_the_answer_in_an_encoding_that_lacks_its_characters(model):
    """As from `--prompt-file <(...)`. Each byte of the prompt is a token; random bytes are hardly ever a character."""
    reading, writing = os.pipe()
    os.write(writing, b"\xef\xbb\xbfone\r\ntwo\0")
    os.close(writing)
    limits = ["--max-new-tokens", "30", "--max-model-len", "64", "--temperature", "1", "--seed", "3", "--ignore-eos"]
    said = subprocess.run(
        [*COMMAND, "launch", str(model), "--prompt-file", f"/dev/fd/{reading}", *limits],
        capture_output=True, pass_fds=[reading], stdin=subprocess.DEVNULL, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    os.close(reading)
    assert rb"\ufffd" in said.stdout
    assert f"prefill {len('one.two.')} tokens".encode() in said.stderr


@pytest.mark.slow
def test_a_prompt_of_utf8_is_one_also_where_the_locale_knows_no_more_than_ascii(model):
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = run(
        ["launch", model, "--prompt", "é", "--stop", "ü", "--json", "--max-model-len", "64"], env=plain, check=True
    )
    assert json.loads(said.stdout)["prompt_tokens"] == len("é".encode())


@pytest.mark.slow
def test_a_line_of_a_conversation_that_is_no_text_is_refused_and_the_next_is_asked(model):
    said = run(
        ["launch", model, "--interactive", "--max-new-tokens", "2", "--max-model-len", "64"],
        stdin=None, input=b"\xef\xbb\xbfab\nab\xff\nabc",
    )  # fmt: skip
    assert said.returncode == 0
    assert said.stderr.count(b"this line is no UTF-8 text") == 1
    assert said.stderr.count(b"cut at 2 tokens") == 2
    # Two bytes, and the mark before them was none of the prompt.
    assert b"prefill 2 tokens" in said.stderr


def test_a_prompt_is_on_no_command_line_when_it_is_read(model, tmp_path):
    """The launcher's own: it waits for a prompt that does not come, and its arguments are gone by then."""
    os.mkfifo(tmp_path / "prompt")
    secret = "the third oak"
    words = ["launch", model, "--stop", secret, "--session", "oak", "--prompt-file", tmp_path / "prompt"]
    with subprocess.Popen([*COMMAND, *map(str, words)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as launch:
        # It has opened the other end.
        with (tmp_path / "prompt").open("wb") as prompt:
            command_line = Path(f"/proc/{launch.pid}/cmdline").read_bytes()
            prompt.write(b"\xff")
        assert launch.wait() == 2
        launch.communicate()
    assert command_line.rstrip(b"\0").split(b"\0")[1:] == [b"-m", b"tsqp_shm", b"launch", os.fsencode(model)]
    assert secret.encode() not in command_line


def test_on_a_terminal_an_error_shows_what_it_quotes():
    with OnTerminal("launch", "/nowhere/\x1b[2J\u202e\nforged") as launch:
        assert launch.wait() == 1
        assert rb"/nowhere/\x1b[2J\u202e\nforged" in launch.seen
        # What is in progress is drawn by this program itself.
        assert b"\x1b" not in launch.seen.replace(b"\r\x1b[K", b"")


def test_what_is_typed_before_the_prompt_is_there_is_the_launcher_s_alone(model):
    """Ctrl-C while it is typed ends the command, of which nothing more exists then."""
    with OnTerminal("launch", model, "--prompt-file", "-") as launch:
        launch.type(b"my secret line\n")
        # It has begun, has blanked its command line, and no signal is lost any more.
        command_line = Path(f"/proc/{launch.pid}/cmdline")
        launch.read_until(lambda: command_line.read_bytes().rstrip(b"\0").endswith(os.fsencode(model)))
        assert Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text() == ""
        launch.type(b"\x03")
        assert launch.wait() == 130
