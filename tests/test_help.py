"""What `--help` shows: what is wanted first, every flag with `--help-all`, and no line wider than the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tsqp_shm.cli.bench import add_cases
from tsqp_shm.cli.parser import Parser
from tsqp_shm.cli.verbs import build_parser

VERBS = ["launch", "tee", "gpu", "top", "trace", "doctor", "inspect", "replay", "env", "ps", "clean", "bench"]
CASES = ["modes", "prefill", "decode", "batch", "serve", "launch", "quality", "idle", "latency", "waits", "kernels"]
COMMANDS = [[verb] for verb in VERBS] + [["bench", case] for case in CASES]
# As many flags are read at a glance.
FEW = 16


@pytest.fixture
def helped(capsys, monkeypatch) -> Callable[..., str]:
    def said(words: list[str], columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args(words)
        assert ended.value.code == 0
        return str(capsys.readouterr().out)

    return said


def flags_in(text: str) -> set[str]:
    """Those that have an entry."""
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", [[], ["launch"], ["inspect"], ["bench", "modes"]], ids=" ".join)
def test_help_fits_the_terminal_and_cuts_no_word_that_fits_a_line(helped, command):
    wide = helped([*command, "--help"], 300)
    for columns in (80, 40):
        narrow = helped([*command, "--help"], columns)
        assert max(map(len, narrow.splitlines())) < columns
        short = {word for word in wide.split() if len(word) < columns - 10}
        assert {word for word in short if wide.split().count(word) > narrow.split().count(word)} == set()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_a_few_flags_and_help_all_shows_every_one(helped, command):
    few = flags_in(helped([*command, "--help"]))
    assert len(few) <= FEW + 1
    if "--help-all" in few:
        every = flags_in(helped([*command, "--help-all"]))
        (said,) = re.findall(r"--help-all shows (\d+) more", helped([*command, "--help"]))
        assert few < every
        assert len(every) == len(few) + int(said)


def test_help_all_begins_with_what_help_shows(helped):
    few, every = helped(["launch", "--help"]), helped(["launch", "--help-all"])
    assert every.startswith(few[: few.index("tsqp-shm launch --help-all shows")])
    assert {"--model-digest", "--pad-stock", "--spin-us"} <= flags_in(every) - flags_in(few)


def test_no_flag_is_lost_between_its_group_and_those_that_come_first(helped):
    parser = Parser(prog="some")
    parser.add_argument("--alone")
    parser.add_argument_group("others").add_argument("--grouped")
    add_cases(parser)
    parser.put_first(["--grouped", "--not-there"])
    assert flags_in(parser.format_help()) == {"--grouped", "--help", "--help-all"}
    assert flags_in(parser.format_help_all()) == {"--grouped", "--help", "--help-all", "--alone"}


def test_a_wrong_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["launch", "--helpless"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == ("tsqp-shm: unrecognized arguments: --helpless; see tsqp-shm launch --help\n")
