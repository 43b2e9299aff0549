"""What a pass has computed opens when its checks have ended and held, and there is one way out of it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import tsqp_shm
from tsqp_shm.errors import IntegrityError
from tsqp_shm.shm.plan import Operation
from tsqp_shm.tee.verification import Unverified, Verification

PACKAGE = Path(tsqp_shm.__file__).parent
DOWN, HEAD = Operation("DOWN", 3), Operation("LM_HEAD", None)


def test_a_value_does_not_open_before_the_checks_of_its_pass_have_ended():
    verification = Verification()
    value = Unverified([1], verification)
    doubled = value.map(lambda numbers: numbers * 2)
    verification.expect()
    for early in (value, doubled):
        with pytest.raises(AssertionError, match="before the pass's checks had ended"):
            early.open()
    verification.add(DOWN, 1, held=True)
    with pytest.raises(AssertionError):
        value.open()
    verification.end()
    assert (value.open(), doubled.open()) == ([1], [1, 1])


def test_a_pass_does_not_end_while_a_check_is_outstanding():
    verification = Verification()
    verification.expect()
    with pytest.raises(AssertionError, match="1 checks"):
        verification.end()


def test_nothing_of_a_pass_opens_whose_check_failed_and_the_first_failure_is_told():
    verification = Verification()
    value = Unverified("false", verification)
    for operation, held in ((HEAD, True), (DOWN, False), (HEAD, False)):
        verification.expect()
        verification.add(operation, 1, held=held)
    for _ in range(2):
        with pytest.raises(IntegrityError) as caught:
            verification.end()
        assert (caught.value.operation, caught.value.layer) == ("down", 3)
        with pytest.raises(AssertionError):
            value.open()


def test_what_one_pass_has_computed_is_not_opened_by_another_ones_end():
    value = Unverified("of the first", Verification())
    second = Verification()
    second.end()
    with pytest.raises(AssertionError):
        value.open()


# Who may have one in hand, and what they may do with it.
MAKERS = {"tee/verification.py", "tee/engine.py"}
# Hands on the function that takes them, and looks at none.
HANDS_ON = {"tee/plain.py"}
MAPS = {"tee/harvest.py", "tee/stepper.py"}
OPENS = {"tee/harvest.py", "tee/stepper.py"}


@cache
def sources() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def calls(tree: ast.Module, method: str) -> list[ast.Call]:
    """Of a method of that name, of whatever object: `x.method(...)`."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
    ]


def names(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_nobody_else_has_one_in_hand():
    holders = {path for path, tree in sources().items() if {"Unverified", "TakeLogits"} & names(tree)}
    assert holders == MAKERS | HANDS_ON | MAPS | OPENS


def test_one_is_opened_where_its_pass_is_over():
    """`Unverified.open` is the one `open` that takes nothing, where one is at hand."""
    trees = sources()
    opening = {path for path in MAKERS | MAPS | OPENS if any(not call.args for call in calls(trees[path], "open"))}
    assert opening == OPENS
    (call,) = calls(trees["tee/harvest.py"], "open")
    # The harvest opens where the scheduler has it bring in, and that is after the pass.
    (owner,) = [
        node
        for node in ast.walk(trees["tee/harvest.py"])
        if isinstance(node, ast.FunctionDef) and any(inner is call for inner in ast.walk(node))
    ]
    assert owner.name == "bring_in"
    forwards, brings = (calls(trees["tee/scheduler.py"], method) for method in ("forward", "bring_in"))
    assert [each.lineno for each in forwards + brings] == sorted(each.lineno for each in forwards + brings)
    assert len(forwards) == len(brings) == 1
    # Logits that are asked for themselves: where the engine has returned.
    (call,) = calls(trees["tee/stepper.py"], "open")
    (forward,) = [each for each in calls(trees["tee/stepper.py"], "forward") if len(each.args) == 2]
    assert forward.lineno < call.lineno


def test_what_is_computed_of_one_is_so_by_named_functions_that_tell_nobody():
    trees = sources()
    mapped = {
        (path, ast.unparse(call.args[0]))
        for path in MAKERS | MAPS | OPENS
        for call in calls(trees[path], "map")
        if path != "tee/verification.py"
    }
    assert mapped == {
        ("tee/harvest.py", "partial(self._read, first)"),
        ("tee/stepper.py", "partial(self._copy, logits, at + first)"),
    }


def test_nobody_reaches_into_one():
    for path, tree in sources().items():
        reached = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "_value"]
        assert not reached or path == "tee/verification.py", path
