"""Where products are checked, what is broken in form ends the session as it does in `plain`: by the same misbehaviours,
of a GPU process that multiplies as it should."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_gpu import FIELDS
from models import RandomModel, model_folder
from test_hostile_gpu import completes, completes_or_ends_with, ends_with, outcome

from tsqp_shm.errors import IntegrityError, PeerDied, PeerTimeout, ProtocolError, TsqpError

Check = Callable[[TsqpError | None, int], None]
SESSION_NAMES = (f"form{os.getpid()}-{number}" for number in itertools.count())
CUT = ends_with(ProtocolError, "cut the object short")
ALWAYS: list[tuple[str, str, Check]] = [
    ("none", "adaptive", completes),
    ("twice", "adaptive", ends_with(ProtocolError, "sequence")),
    ("scribble-slots", "adaptive", completes_or_ends_with(IntegrityError)),
    ("truncate-slots", "adaptive", CUT),
    # To the TEE they are zeros, which are no product of its rows.
    ("punch-slots", "adaptive", ends_with(IntegrityError, "false: qkv of layer 0")),
]
IN_A_LONG_RUN: list[tuple[str, str, Check]] = [
    *((name, doorbell, check) for name, _, check in ALWAYS for doorbell in ("spin", "zmq")),
    ("vanish", "adaptive", ends_with(PeerDied, "no heartbeat")),
    ("late", "adaptive", ends_with(PeerTimeout, "waiting for QKV on slot y.qkv")),
    ("silent", "zmq", ends_with(PeerTimeout, "waiting for O on slot y.hidden")),
    ("drip", "adaptive", ends_with(PeerTimeout, "one step, ")),
    ("failed", "adaptive", ends_with(PeerDied, "DOWN failed")),
    ("rejected", "adaptive", ends_with(ProtocolError, "DOWN rejected")),
    ("stop", "zmq", ends_with(PeerDied, "was stopped")),
    ("pause", "adaptive", completes),
    ("out-of-order", "adaptive", ends_with(ProtocolError, "sequence", step=1)),
    ("boast", "adaptive", completes),
    *((f"wrong-{field}", "adaptive", ends_with(ProtocolError, f": {field}: expected")) for field in FIELDS),
    ("head-ahead", "adaptive", ends_with(ProtocolError, "ring head")),
    ("head-behind", "spin", ends_with(ProtocolError, "ring head")),
    ("tail-ahead", "adaptive", ends_with(ProtocolError, "ring tail")),
    ("tail-behind", "spin", ends_with(ProtocolError, "ring tail")),
    ("scribble-rings", "adaptive", completes_or_ends_with(ProtocolError, PeerTimeout)),
    ("scribble-header", "adaptive", completes),
    ("scribble-all", "adaptive", completes_or_ends_with(IntegrityError, ProtocolError, PeerTimeout)),
    ("flip-flags", "adaptive", completes),
    ("junk", "adaptive", completes),
    ("junk", "zmq", ends_with(ProtocolError, "sequence")),
    ("flood", "adaptive", completes),
    ("flood", "zmq", ends_with(ProtocolError, "sequence")),
    ("hang-up", "adaptive", ends_with(PeerTimeout, "QKV")),
    ("truncate", "adaptive", CUT),
    ("truncate-logits", "zmq", CUT),
    ("truncate-sometime", "adaptive", completes_or_ends_with(IntegrityError, ProtocolError)),
    ("punch", "zmq", ends_with(IntegrityError, "false: qkv of layer 0")),
    ("punch", "adaptive", completes_or_ends_with(IntegrityError, ProtocolError, PeerTimeout, PeerDied)),
    ("unlink", "adaptive", completes),
]


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder(RandomModel("llama"))


@pytest.mark.parametrize(
    ("misbehaviour", "doorbell", "expected"),
    [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.long) for case in IN_A_LONG_RUN)],
)
def test_form_is_held_where_products_are_checked(field_server, model, forked, misbehaviour, doorbell, expected):
    def play() -> None:
        expected(*outcome(model, session, mode="verified", doorbell=doorbell))

    session = next(SESSION_NAMES)
    field_server.start(str(model), session, misbehaviour)
    forked(play).join()
