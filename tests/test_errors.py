"""Errors are facts, and stay them: pickled, copied, relayed by a process pool, or raised again."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys

import pytest

from tsqp_shm import errors
from tsqp_shm.errors import ConfigError, ForeignCause, PeerDied, ProtocolError, RequestError, TsqpError

# One of each class, by what its constructor takes.
FACTS = {
    "needed": 5,
    "available": 2,
    "name": "arena",
    "path": "/some/where",
    "field": "a_field",
    "value": 3,
    "expected": "4",
    "supported": "4",
    "found": 5,
    "reason": "it is so",
    "device": "cuda:9",
    "needed_bytes": 2**40,
    "free_bytes": 7,
    "advice": "make room",
    "limit": "threads",
    "where": "logits",
    "session": "mine",
    "owner_pid": 12,
    "slot": "x",
    "operation": "QKV",
    "role": "gpu",
    "exit": "signal SIGKILL",
    "last_words": "one\ntwo",
    "waited_s": 1.5,
    "heartbeat_age_s": None,
    "contender": "other",
    "layer": 3,
}
CLASSES = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)
]  # fmt: skip


class TwoFaults(PeerDied):
    """A caller's own, whose constructor takes other things than what it is made of."""

    exit_code = 77

    def __init__(self, first: Exception) -> None:
        self.first = str(first)
        super().__init__("gpu", "twice")


def made(kind: type[Exception]) -> Exception:
    if "__init__" not in vars(kind) and kind.__init__ in (Exception.__init__, TsqpError.__init__):
        return kind("something is wrong")
    parameters = inspect.signature(kind).parameters.values()
    return kind(**{each.name: FACTS[each.name] for each in parameters if each.default is each.empty})


def everyone() -> list[Exception]:
    relayed = [kind.relayed("what another process printed") for kind in CLASSES if issubclass(kind, TsqpError)]
    return [*(made(kind) for kind in CLASSES), *relayed, TwoFaults(KeyError("x"))]


def assert_equal(error: Exception, other: Exception) -> None:
    assert other is not error
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert repr(other) == repr(error)
    assert other.args == error.args
    assert vars(other) == vars(error)
    assert getattr(other, "exit_code", None) == getattr(error, "exit_code", None)
    assert other.__traceback__ is None
    assert other.__suppress_context__ is error.__suppress_context__


def pickled(protocol: int):
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


WAYS = {
    **{f"pickle {protocol}": pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickled copy": lambda error: pickled(2)(copy.copy(error)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_error_is_equal_afterwards(way):
    for error in everyone():
        assert_equal(error, WAYS[way](error))


def test_every_error_raised_again_is_equal():
    for error in everyone():
        if isinstance(error, TsqpError):
            assert_equal(error, error.again())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no notes")
@pytest.mark.parametrize("way", WAYS)
def test_notes_are_kept_and_not_shared(way):
    error = ConfigError("a", 1, "2")
    error.add_note("while reading it")
    other = WAYS[way](error)
    assert other.__notes__ == ["while reading it"]
    other.add_note("again")
    assert error.__notes__ == ["while reading it"]


class NotForOthers(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")


def test_a_cause_of_this_package_is_kept_and_another_one_as_its_text():
    error = ConfigError("a", 1, "2")
    error.__cause__ = ProtocolError("f", 1, 2)
    assert_equal(error.__cause__, pickled(4)(error).__cause__)
    error.__cause__ = NotForOthers(1, 2)
    assert error.again().__cause__ is error.__cause__ is copy.copy(error).__cause__
    there = pickled(4)(error)
    back = pickled(4)(there)
    for cause in (there.__cause__, back.__cause__, copy.deepcopy(error).__cause__):
        assert (type(cause), str(cause)) == (ForeignCause, "NotForOthers: 1 2")


def test_an_error_keeps_no_value_that_could_not_cross():
    for value in (iter([]), lambda: 0, open, object(), {"a": object()}, [1] * 10**6, 10**5000, "x" * 10**6, {1: 2}):
        error = RequestError("prompt", value, "a string", is_mistyped=True)
        assert_equal(error, pickled(4)(error))
        assert len(str(error)) < 1100
        assert type(value).__name__ in str(error)
        assert "\n" not in str(error)


def test_a_value_is_shown_in_few_words_on_one_line():
    for value, shown in (
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        ("a\n\x1b[31m\ud800", r"'a\n\x1b[31m\ud800'"),
        ([1, "a"], "[1, 'a']"),
        ([object()], "a list of 1"),
        (-(10**5000), "an int of 16610 bits"),
        ({"a": 1}, "a dict of 1"),
        (iter(()), "a tuple_iterator"),
    ):
        assert errors.described(value) == shown
    assert errors.described("x" * 2000) == repr("x" * 1000)[:-1] + "...'"


POOLS = """
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tsqp_shm.errors import RequestError

class Own(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")

def refuse(_):
    try:
        raise Own(1, 2)
    except Own as cause:
        raise RequestError("prompt", "9 tokens", "at most 8") from cause

def facts(error):
    return [type(error).__name__, str(error), vars(error), "Own: 1 2" in str(error.__cause__)]

# What stands in this text can be found in no other process than a forked one.
fork = get_context("fork")
with ProcessPoolExecutor(1, mp_context=fork) as pool:
    found = [facts(pool.submit(refuse, 1).exception(timeout=60))]
with fork.Pool(1) as pool:
    try:
        pool.map_async(refuse, [1]).get(timeout=60)
    except RequestError as error:
        found.append(facts(error))
print(json.dumps(found))
"""


def test_a_process_pool_gives_the_error_that_was_raised_there():
    result = subprocess.run([sys.executable, "-c", POOLS], capture_output=True, text=True, check=True, timeout=100)
    error = RequestError("prompt", "9 tokens", "at most 8")
    assert json.loads(result.stdout) == [["RequestError", str(error), vars(error), True]] * 2
