"""docs/threat-model.md makes no claim without a test, and names no test that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tsqp_shm.modes import MODES

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "threat-model.md").read_text()
HEAD = "| claim | modes | what | adversary | assumes | fails if it is false |"
CLAIMS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.split(HEAD)[1].split("\n\n")[0].splitlines()[2:]
]


def test_claims_are_numbered_in_order():
    assert [claim[0] for claim in CLAIMS] == [str(number) for number in range(1, len(CLAIMS) + 1)]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"claim {claim[0]}")
def test_a_claim_names_its_modes_its_adversary_and_tests_that_are_there(claim):
    _, modes, what, adversary, assumes, tests = claim
    assert set(modes.split(", ")) <= {"all", *MODES}
    assert what and adversary and assumes
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_every_mode_has_its_column():
    """In the tables of modes, assets and actors."""
    heads = [line for line in DOCUMENT.splitlines() if line.startswith(("| | `", "| asset |", "| actor |"))]
    assert [re.findall(r"`([\w-]+)`", head) for head in heads] == [list(MODES)] * 3


def test_every_mode_makes_a_claim_of_its_own():
    assert {claim[1] for claim in CLAIMS} >= set(MODES)


def test_the_claim_of_blinded_names_leakage_adversary_bound_sketch_and_what_is_not_covered():
    section = DOCUMENT.split("## The claim of `blinded`")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ")[0].strip() for line in section.split("\n\n")[1].splitlines()[2:]]
    assert rows == ["leakage L", "adversary", "claim", "sketch", "not covered"]
    assert "Adv_PRF(AES-256-CTR) + Adv_KDF + Adv_seed + Q p^-2" in section
    assert "computational" in section


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_no_document_promises_what_nobody_can_keep(document):
    text = (ROOT / document).read_text().lower()
    for promise in ("information-theoretic", "perfect secrecy", "learns nothing", "no accuracy loss"):
        assert promise not in text
