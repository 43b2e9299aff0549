"""The invitation: what crosses in the header page, copied once and believed field by field."""

import json
import mmap
import os
from contextlib import closing
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from arenas import new_arena

from tsqp_shm import _native
from tsqp_shm.config import Limits
from tsqp_shm.errors import ArenaError, ArenaMismatch, TsqpError
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.shm import layout
from tsqp_shm.shm.invitation import Invitation, invitation_in, put_invitation, take_invitation
from tsqp_shm.shm.plan import Plan

PLAN = Plan.of_slots([("x", "float32", 1, 1)])
LIMITS = Limits(
    dtype="bfloat16", max_model_len=100, max_num_seqs=3, max_batch_tokens=70, tile_rows=16, tiles_in_flight=2
)


def invitation(**fields) -> Invitation:
    values = {
        "endpoint": "ipc:///tmp/bell",
        "doorbell": "adaptive",
        "spin_us": 20,
        "yield_us": 2000,
        "limits": LIMITS,
        "geometry": {"num_layers": 2, "windows": [None, 32]},
        "tee_pid": os.getpid(),
    }
    return Invitation(**{**values, **fields})


@pytest.fixture
def header():
    with closing(mmap.mmap(-1, layout.SLOTS_OFFSET_BYTES)) as buffer:
        yield SimpleNamespace(name="here", buffer=buffer)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 652, layout.MAX_INVITATION_BYTES - 1, layout.MAX_INVITATION_BYTES])
def test_every_length_that_is_allowed_is_taken_as_it_was_put(header, length):
    content = os.urandom(length)
    put_invitation(header, content)
    assert take_invitation(header) == content
    assert invitation_in("here", header.buffer[: layout.PAGE_BYTES]) == content
    # Whatever else the page holds is not touched, nor is the one behind it.
    assert not any(header.buffer[: layout.INVITATION_LENGTH_OFFSET_BYTES])
    assert not any(header.buffer[layout.PAGE_BYTES :])


def test_more_than_the_page_has_room_for_is_refused_before_anything_is_written(header):
    with pytest.raises(ArenaError, match="3,501 bytes"):
        put_invitation(header, bytes(layout.MAX_INVITATION_BYTES + 1))
    assert not any(header.buffer[:])


@pytest.mark.parametrize("length", [layout.MAX_INVITATION_BYTES + 1, 1 << 32, (1 << 64) - 1])
def test_a_length_that_cannot_be_is_refused(header, length):
    _native.store_word(header.buffer, layout.INVITATION_LENGTH_OFFSET_BYTES, length)
    for take in (lambda: take_invitation(header), lambda: invitation_in("here", header.buffer[:])):
        with pytest.raises(ArenaMismatch) as caught:
            take()
        assert caught.value.field == "length of the invitation"


def test_the_copy_does_not_change_with_the_page(header):
    put_invitation(header, invitation().pack())
    taken = take_invitation(header)
    header.buffer[:] = bytes(len(header.buffer))
    assert Invitation.parse(taken) == invitation()


def test_it_is_read_back_as_it_was_written():
    assert Invitation.parse(invitation(spin_us=7).pack()) == invitation(spin_us=7)


def test_a_transport_whose_sides_know_their_own_address_says_none():
    assert Invitation.parse(invitation(endpoint="").pack()).endpoint == ""


def test_it_is_in_the_page_before_the_header_is_published():
    with new_arena(PLAN) as arena:
        seen = []
        store = _native.store_word

        def look_first(buffer, offset_bytes, value):
            if offset_bytes == layout.HEADER_VERSION_OFFSET_BYTES:
                seen.append(take_invitation(arena))
            store(buffer, offset_bytes, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_native, "store_word", look_first)
            arena.publish(b"come in")
        assert seen == [b"come in"]


def test_an_arena_whose_invitation_is_too_long_is_not_published():
    with new_arena(PLAN) as arena:
        with pytest.raises(ArenaError, match="shorter --endpoint"):
            arena.publish(bytes(layout.MAX_INVITATION_BYTES + 1))
        assert _native.load_word(arena.buffer, layout.HEADER_VERSION_OFFSET_BYTES) == 0


def test_that_of_a_large_model_fits():
    """128 layers, every other one with a window, and as long an address as a socket can have."""
    spec = ModelSpec.from_config(
        {
            "model_type": "llama", "vocab_size": 256_000, "hidden_size": 16384, "intermediate_size": 65536,
            "num_hidden_layers": 128, "num_attention_heads": 128, "num_key_value_heads": 16,
            "max_position_embeddings": 1 << 20,
        }
    )  # fmt: skip
    geometry = {**Plan.derive(Network.of(spec), LIMITS).geometry.plain(), "windows": [None, 131072] * 64}
    content = invitation(endpoint="ipc:///" + 106 * "x", geometry=geometry).pack()
    assert len(content) <= layout.MAX_INVITATION_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"doorbell": "loud"},
        {"doorbell": None},
        {"endpoint": 7},
        {"endpoint": "tcp://192.168.0.1:80"},
        {"endpoint": "ipc:///tmp/\udc80"},
        {"spin_us": "2"},
        {"yield_us": -1},
        {"geometry": []},
        {"limits": {}},
        {"limits": None},
        {"tee_pid": 1.5},
        {"more": 1},
    ],
)
def test_a_field_that_is_not_allowed_is_one_clear_error(fields):
    written = json.loads(json.dumps(asdict(invitation())))
    with pytest.raises(TsqpError, match="cannot be read; do both run the same version"):
        Invitation.parse(json.dumps({**written, **fields}).encode())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xff", b"[" * 3500, b"7", b"[[1, 2]]", b"1" * 3500])
def test_what_is_no_json_object_is_one_clear_error(content):
    with pytest.raises(TsqpError, match="cannot be read; do both run the same version"):
        Invitation.parse(content)


@pytest.mark.parametrize("where", ["invitation", "limits"])
def test_a_name_that_is_not_known_is_not_repeated_to_a_terminal(where):
    values = json.loads(invitation().pack())
    (values if where == "invitation" else values["limits"])["\x1b]0;taken over\x07"] = 1
    with pytest.raises(TsqpError, match="not known") as caught:
        Invitation.parse(json.dumps(values).encode())
    assert str(caught.value).isprintable()
