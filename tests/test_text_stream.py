"""Tokens into text as they come: the pieces add up to what the decoding of all has and that of the prompt has not."""

from __future__ import annotations

import itertools

import pytest
from demo_tokenizers import ours
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, every_kind, sentencepiece, tokenizer

from tsqp_shm.model.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("demo_tokenizers")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
KINDS = every_kind()
# How a byte-level vocabulary spells bytes: printable characters stand for themselves.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SPELLING = [chr(byte) if byte in PRINTABLE else chr(256 + OTHERS.index(byte)) for byte in range(256)]


def text_by_token(tokenizer: Tokenizer, ids, skip_special_tokens=True, prompt=()):
    stream = tokenizer.stream(prompt, skip_special_tokens)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def added_by(tokenizer: Tokenizer, prompt, ids, skip_special_tokens=True) -> str:
    """What the decoding of all has that the decoding of the prompt has not."""
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens)
    before = tokenizer.decode(prompt, skip_special_tokens)
    shared = (one == other for one, other in zip(whole, before, strict=False))
    return whole[sum(itertools.takewhile(bool, shared)) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_stream_adds_up_to_the_decoding_of_any_ids_after_any_prompt(kind, data):
    tokens = tokenizer(KINDS[kind])
    # Ids beyond the vocabulary as well, and for some examples few that meet often.
    some = st.integers(0, KINDS[kind].get_vocab_size() + 1)
    few = data.draw(st.lists(some, min_size=1, max_size=4))
    ids = data.draw(st.lists(some | st.sampled_from(few), max_size=14))
    cut = data.draw(st.integers(0, len(ids)))
    skip_special_tokens = data.draw(st.booleans())
    pieces = text_by_token(tokens, ids[cut:], skip_special_tokens, ids[:cut])
    assert "".join(pieces) == added_by(tokens, ids[:cut], ids[cut:], skip_special_tokens)


@settings(deadline=None, max_examples=150)
@given(
    st.text("aé€🦩🙂", max_size=8).map(str.encode), st.integers(0, 30), st.sampled_from(["ByteLevel", "ByteFallback"])
)
def test_a_character_that_the_prompt_begins_and_the_completion_ends_belongs_to_the_completion(text, cut, kind):
    backend = byte_level() if kind == "ByteLevel" else KINDS[kind]
    spelling = SPELLING if kind == "ByteLevel" else [f"<0x{byte:02X}>" for byte in range(256)]
    ids = [backend.token_to_id(spelling[byte]) for byte in text]
    cut = min(cut, len(ids))
    whole = text.decode()
    prompt = text[:cut].decode(errors="ignore")
    if kind == "ByteFallback" and text[:cut] != prompt.encode():
        # All of a run of bytes is replaced where one of them is bad, and so nothing of the prompt's is shared.
        prompt = ""
    assert "".join(text_by_token(tokenizer(backend), ids[cut:], True, ids[:cut])) == whole[len(prompt) :]


def test_the_first_space_belongs_to_the_completion():
    backend = sentencepiece()
    tokens = tokenizer(backend)
    hello, world = backend.token_to_id("▁Hello"), backend.token_to_id("▁world")
    assert text_by_token(tokens, [world, world], True, [1, hello]) == [" world", " world", ""]
    # Where the prompt has no text, the first word is the first of all.
    assert text_by_token(tokens, [world, world], True, [1]) == ["world", " world", ""]
    assert text_by_token(tokens, [world, world], False, [1]) == [" world", " world", ""]


def test_a_long_prompt_is_not_decoded_for_each_token():
    """Its end suffices, wherever in a character or in a run of bytes that begins."""
    backend = sentencepiece()
    run = [backend.token_to_id(f"<0x{byte:02X}>") for byte in ("🦩" * 40).encode()]
    tokens = tokenizer(backend)
    for prompt in ([9] * 200, [*run, 260], run, [*run[:-1]], [260] * 100 + run[:2]):
        for ids in ([260, 261], run[-1:], [*run[2:4], 260]):
            assert "".join(text_by_token(tokens, ids, True, prompt)) == added_by(tokens, prompt, ids)


def test_nothing_is_given_out_that_a_bad_byte_would_change():
    backend = sentencepiece()
    tokens = tokenizer(backend)
    euro = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    hello = backend.token_to_id("▁Hello")
    assert text_by_token(tokens, [*euro, *euro, hello]) == [""] * 6 + ["€€ Hello", ""]
    assert text_by_token(tokens, [*euro, euro[0], hello]) == [""] * 4 + [4 * REPLACEMENT + " Hello", ""]


def test_pending_is_what_would_follow_and_changes_nothing():
    backend = sentencepiece()
    stream = tokenizer(backend).stream()
    euro = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    pending = []
    for token_id in euro:
        stream.push(token_id)
        pending += [stream.pending, stream.pending]
    assert pending == [REPLACEMENT, REPLACEMENT, 2 * REPLACEMENT, 2 * REPLACEMENT, "€", "€"]
    assert stream.finish() == "€"


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 49_151) | st.integers(0, 300), max_size=24), st.integers(0, 24), st.booleans())
def test_a_stream_of_the_demo_model_adds_up(demo_model, ids, cut, skip_special_tokens):
    pieces = text_by_token(ours(), ids[cut:], skip_special_tokens, ids[:cut])
    assert "".join(pieces) == added_by(ours(), ids[:cut], ids[cut:], skip_special_tokens)


@settings(deadline=None, max_examples=150)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("🙂👩‍👧東é\N{REPLACEMENT CHARACTER}")),
    st.integers(0, 3),
)
def test_a_stream_of_text_adds_up_even_where_it_is_cut_inside_a_character(demo_model, text, cut):
    ids = ours().encode(text)
    ids = ids[: len(ids) - cut]
    assert "".join(text_by_token(ours(), ids)) == ours().decode(ids)


def test_a_stream_gives_an_emoji_only_when_it_is_whole(demo_model):
    ids = ours().encode("🦩")
    assert len(ids) > 1
    assert text_by_token(ours(), ids) == [""] * (len(ids) - 1) + ["🦩", ""]


def test_a_stream_that_ends_inside_a_character_finishes_with_a_replacement(demo_model):
    ids = ours().encode("a🦩")[:-1]
    assert text_by_token(ours(), ids)[-1] == REPLACEMENT


def test_a_stream_does_not_wait_for_bytes_that_can_no_longer_become_a_character(demo_model):
    flamingo = ours().encode("🦩")
    pieces = text_by_token(ours(), flamingo[:1] * 300)
    assert max(map(len, pieces)) <= 3
    assert "".join(pieces) == ours().decode(flamingo[:1] * 300)
