"""What a pad is: a row of a key's stream, and words of it that are in the field, against another library's AES.

`native/tests/test_pads.cpp` has the standards' own answers, and what rows become that are masked with pads.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from checked_linear import FIELD
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import instruction_set

from tsqp_shm import _native

COUNTED_KEY = bytes(range(32))
INSTRUCTION_SETS = st.sampled_from(_native.instruction_sets())
ROWS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**64 - 1]))


def stream_of(key: bytes, row: int, num_words: int) -> np.ndarray:
    counter = bytes(4) + row.to_bytes(8, "big") + bytes(4)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * num_words)), "<u4")


def pads_of(words: np.ndarray, inputs: int) -> np.ndarray:
    """r by its definition, of a stream with words to spare."""
    words = words & FIELD
    behind = iter(words[inputs:][words[inputs:] != FIELD])
    return np.array([next(behind) if word == FIELD else word for word in words[:inputs]], np.uint32)


@given(INSTRUCTION_SETS, st.binary(min_size=32, max_size=32), ROWS, st.integers(0, 700))
@settings(max_examples=150, deadline=None)
def test_pads_are_the_stream_of_another_library(isa, key, row, inputs):
    with instruction_set(isa):
        drawn = _native.draw_pads(key, row, inputs)
    np.testing.assert_array_equal(drawn, pads_of(stream_of(key, row, inputs + 16), inputs))


def test_a_long_row_is_the_stream_of_another_library(isa):
    """Past 2^16 blocks, so that three bytes of their number are in use."""
    inputs = 4 * 2**16 + 258
    expected = pads_of(stream_of(COUNTED_KEY, 5, inputs + 16), inputs)
    np.testing.assert_array_equal(_native.draw_pads(COUNTED_KEY, 5, inputs), expected)


def replaced_words(rows: int) -> int:
    """How many words of so many rows of 2^16 were not in the field; all pads are another library's."""
    inputs, replaced = 2**16, 0
    random = np.random.default_rng(rows)
    key = b""
    for index in range(rows):
        if index % 64 == 0:
            key = random.bytes(32)
        row = int(random.integers(2**64, dtype=np.uint64))
        stream = stream_of(key, row, inputs + 16)
        drawn = _native.draw_pads(key, row, inputs)
        outside = np.count_nonzero(stream[:inputs] & FIELD == FIELD)
        expected = pads_of(stream, inputs) if outside else stream[:inputs] & FIELD
        assert np.array_equal(drawn, expected)
        replaced += outside
    return replaced


def test_many_rows_are_the_streams_of_another_library():
    replaced_words(300)


@pytest.mark.long
@pytest.mark.parametrize("isa", [name for name in ("avx2", "avx512") if name in _native.instruction_sets()])
def test_as_many_rows_as_have_words_to_be_replaced_are_the_streams_of_another_library(isa):
    """2^33 words, of which four are expected to be p. `-s` prints how many were."""
    with instruction_set(isa):
        began = time.monotonic()
        replaced = replaced_words(2**17)
        print(f"{_native.pads_instruction_set()}: 2^33 words, {replaced} replaced, {time.monotonic() - began:.0f} s")
    assert 1 <= replaced <= 20


@pytest.mark.parametrize(("row", "k"), [(875_322, 274), (2_121_503, 702), (2_816_882, 2903)])
def test_a_word_of_a_real_stream_that_is_not_in_the_field_is_replaced(isa, row, k):
    """Rows in which a search has found a word equal to p, at their first, in their middle and behind their end."""
    stream = stream_of(COUNTED_KEY, row, k + 700)
    assert stream[k] & FIELD == FIELD
    for inputs in (k, k + 1, k + 2, k + 31, k + 600):
        np.testing.assert_array_equal(_native.draw_pads(COUNTED_KEY, row, inputs), pads_of(stream, inputs))


@given(INSTRUCTION_SETS, st.integers(1, 300), st.sets(st.integers(0, 320), max_size=40), st.randoms())
@settings(max_examples=150, deadline=None)
def test_words_that_are_not_in_the_field_are_replaced_in_order(isa, inputs, outside, random):
    """Words equal to p, with and without the stream's top bit, anywhere in a row and behind it."""
    words = np.random.default_rng(random.getrandbits(32)).integers(0, 2**32, inputs + 400, np.uint32)
    for index in outside:
        words[index] = random.choice([FIELD, 2**32 - 1])
    with instruction_set(isa):
        pads = _native.pads_of_stream(words.tobytes(), inputs)
    np.testing.assert_array_equal(pads, pads_of(words, inputs))


def test_every_word_of_a_row_may_be_replaced(isa):
    words = np.array([FIELD] * 77 + [FIELD, 1, FIELD, *range(2, 78)], np.uint32)
    np.testing.assert_array_equal(_native.pads_of_stream(words.tobytes(), 77), np.arange(1, 78))


def test_a_stream_that_has_not_enough_words_is_refused():
    words = np.array([1, FIELD, 3, FIELD], np.uint32)
    assert _native.pads_of_stream(words.tobytes(), 1).tolist() == [1]
    with pytest.raises(ValueError, match=r"stream: 2 words other than 2\^31 - 1, expected 3"):
        _native.pads_of_stream(words.tobytes(), 3)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=rf"key: got {size} bytes, expected 32"):
        _native.draw_pads(bytes(size), 0, 4)


# RFC 5869, A.1 to A.3.
KNOWN_DERIVATIONS = [
    (
        b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)), bytes(range(0x60, 0xB0)), bytes(range(0xB0, 0x100)),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        b"\x0b" * 22, b"", b"",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ikm", "salt", "info", "expected"), KNOWN_DERIVATIONS)
def test_derivations_have_the_answers_of_rfc_5869(ikm, salt, info, expected):
    assert _native.hkdf_sha256(salt, ikm, info, len(expected) // 2).hex() == expected


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=200), st.integers(1, 255 * 32))
@settings(max_examples=100, deadline=None)
def test_derivations_are_those_of_another_library(salt, ikm, info, size):
    assert _native.hkdf_sha256(salt, ikm, info, size) == HKDF(hashes.SHA256(), size, salt, info).derive(ikm)


def test_more_than_a_derivation_can_give_is_refused():
    with pytest.raises(ValueError, match="size: got 8161, expected at most 8160"):
        _native.hkdf_sha256(b"", b"", b"", 8161)
