"""docs/troubleshooting.md and the errors stay in step, and the command line leads from one to the other."""

import re
from pathlib import Path

import pytest

import tsqp_shm
from tsqp_shm import errors
from tsqp_shm.cli import main
from tsqp_shm.errors import ArenaTooSmall, ConfigError, DeviceError, PeerDied, TsqpError

DOCUMENT = Path(tsqp_shm.__file__).parent.parent / "docs" / "troubleshooting.md"
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TsqpError)]


def entries() -> dict[str, str]:
    """The text under each heading, by the name that a link gives the heading."""
    parts = re.split(r"^#+ (.+)\n", DOCUMENT.read_text(), flags=re.MULTILINE)
    return {heading.lower().replace(" ", "-"): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_its_entry_with_symptom_cause_command_and_cure(kind):
    entry = entries()[kind.entry()]
    for part in ("Symptom", "Cause", "See", "Cure"):
        assert f"**{part}**" in entry


def test_no_entry_is_of_an_error_that_is_gone():
    errors_explained = {name for name, text in entries().items() if "**Symptom**" in text}
    assert errors_explained == {kind.entry() for kind in CLASSES}


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind.hint()], ids=lambda kind: kind.__name__)
def test_a_hint_names_an_entry_that_exists(kind):
    anchor = re.fullmatch(r"\(see docs/troubleshooting\.md#([a-z-]+)\)", kind.hint())[1]
    assert anchor in entries()


def failing(monkeypatch, error):
    def fail(arguments, lifeline):
        raise error

    monkeypatch.setattr("tsqp_shm.cli.verbs.print_environment", fail)
    return main(["env"])


@pytest.fixture(autouse=True)
def own_signals(monkeypatch):
    # `main` is for a process of its own.
    monkeypatch.setattr("signal.signal", lambda number, handler: None)


def test_the_command_line_adds_the_entry_to_the_one_line(monkeypatch, capsys):
    assert failing(monkeypatch, ArenaTooSmall("/a", 2, 1, "lower it")) == 1
    said = capsys.readouterr().err
    assert said.endswith("lower it (see docs/troubleshooting.md#arena-too-small)\n")
    assert said.count("\n") == 1


def test_last_words_end_before_the_hint(monkeypatch, capsys):
    assert failing(monkeypatch, PeerDied("gpu", "exit code 1", "alas\nfarewell")) == 3
    assert capsys.readouterr().err.splitlines()[-2:] == ["gpu: farewell", "(see docs/troubleshooting.md#peer-died)"]


def test_a_usage_error_says_all_itself(monkeypatch, capsys):
    assert failing(monkeypatch, ConfigError("field", 1, "2")) == 2
    assert capsys.readouterr().err == "tsqp-shm: field: got 1, expected 2\n"


def test_a_relayed_error_is_hinted_at_once():
    first = DeviceError("cuda", "is not there")
    again = DeviceError.relayed(f"{first} {DeviceError.hint()}")
    assert str(again) == str(first)


@pytest.mark.parametrize(("number", "said"), [(28, "disk space"), (24, "file descriptors"), (12, "memory")])
def test_what_the_system_runs_out_of_is_one_line(monkeypatch, capsys, number, said):
    assert failing(monkeypatch, OSError(number, "reason", "/a/file")) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line
    assert "/a/file: reason" in line


def test_another_refusal_of_the_system_is_a_defect_and_shows_as_one(monkeypatch):
    with pytest.raises(FileNotFoundError):
        failing(monkeypatch, FileNotFoundError(2, "no such file"))
