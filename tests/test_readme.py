"""The README shows the command of every script, verb, benchmark and mode, and the commands are ones that are taken."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tsqp_shm.cli.verbs import build_parser
from tsqp_shm.modes import MODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())
COMMANDS = [path for path in SCRIPTS if os.access(path, os.X_OK)]
# They import next to nothing; the others take seconds for torch or numpy, on a busy machine more.
QUICK = {"check_transcript.py", "gpu_check", "release", "fuzz", "quickstart", "setup-environment", "test"}


def blocks(text: str) -> list[str]:
    """The lines of its code blocks, without what stands behind them in words."""
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def verbs(parser: argparse.ArgumentParser, before: str) -> list[str]:
    """Every command that it has, with what goes before it."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                found += verbs(verb, f"{before} {name}") or [f"{before} {name}"]
    return found


SHOWN = blocks(README)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_readme_names_every_script_and_shows_how_it_is_run(path):
    name = f"scripts/{path.name}"
    if path in COMMANDS and path.name != "serialized_baseline.py":
        assert any(re.match(rf"(\./)?{re.escape(name)}\b", line) for line in SHOWN)
    else:
        assert name in README


@pytest.mark.parametrize("command", verbs(build_parser(), "tsqp-shm"))
def test_the_readme_shows_every_verb_and_benchmark(command):
    assert any(re.match(rf"{command}\b", line) for line in SHOWN)


@pytest.mark.parametrize("mode", MODES)
def test_the_readme_shows_the_command_of_every_mode(mode):
    assert any(re.match(rf"tsqp-shm launch\b.* --mode {mode}\b", line) for line in SHOWN)


@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("tsqp-shm ") and "help" not in line])
def test_what_the_readme_shows_is_taken(line):
    """What is in brackets may be there or not, and a word in capitals stands for one."""
    for shown in (line.replace("[", "").replace("]", ""), re.sub(r"\[.*?\]", "", line)):
        words = shlex.split(re.sub(r"[>|].*", "", shown))
        assert callable(build_parser().parse_args(words[1:]).run)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.name in QUICK else pytest.mark.long) for path in COMMANDS],
    ids=lambda path: path.name,
)
def test_a_script_answers_help_in_lines_that_fit_and_refuses_what_it_does_not_know(path):
    interpreter = [sys.executable] if "python" in path.read_text().partition("\n")[0] else []
    settings = {"env": {**os.environ, "COLUMNS": "80"}, "capture_output": True, "text": True, "timeout": 50}
    helped = subprocess.run([*interpreter, path, "--help"], **settings)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert path.name in helped.stdout or path.name == "bench_latency.py"
    assert max(map(len, helped.stdout.splitlines())) <= 80
    if interpreter:
        refused = subprocess.run([*interpreter, path, "--no-such-flag"], **settings)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert "--help" in refused.stderr
