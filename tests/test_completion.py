"""A completion grows token by token: what it shows, where it stops, and what it never shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampler import SamplingParams

EOS = 0
ALPHABET = "\0abcdé🙂 "


class BytesTokenizer:
    """Every token is one byte of UTF-8, so characters span tokens."""

    def stream(self):
        return BytesStream()


class BytesStream:
    def __init__(self):
        self._bytes = b""

    def push(self, token_id):
        self._bytes += bytes([token_id])
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError:
            return ""
        self._bytes = b""
        return text

    def finish(self):
        text, self._bytes = self._bytes.decode(errors="replace"), b""
        return text


def complete(answer: str | bytes, *, stop=(), max_tokens=1000, eos=True, **params):
    """Feeds a completion the bytes of an answer and then the end-of-sequence token; yields it after each."""
    tokens = [*(answer.encode() if isinstance(answer, str) else answer), *([EOS] if eos else [])]
    completion = Completion(
        [1, 2],
        SamplingParams(stop=stop, **params),
        max_tokens,
        [EOS],
        BytesTokenizer(),  # type: ignore[arg-type]
    )
    texts = []
    for token in tokens:
        if completion.finish_reason is not None:
            break
        logits = np.zeros(256, np.float32)
        logits[token] = 1
        completion.grow(completion.choose(logits))
        texts.append(completion.text)
    return completion, texts


def test_an_end_of_sequence_token_stops_and_is_no_text():
    completion, _ = complete("abc")
    assert (completion.text, completion.finish_reason) == ("abc", "stop")
    assert completion.token_ids == [*b"abc", EOS]
    assert completion.all_token_ids == [1, 2, *b"abc", EOS]


def test_ignore_eos_goes_on_to_the_length():
    completion, _ = complete("ab", max_tokens=3, ignore_eos=True)
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 3)


def test_max_tokens_ends_by_length_and_shows_half_a_character_as_a_replacement():
    completion, _ = complete("aé", max_tokens=2)
    assert (completion.text, completion.finish_reason) == ("a\N{REPLACEMENT CHARACTER}", "length")


def test_an_end_at_the_last_allowed_token_is_a_stop():
    assert complete("ab", max_tokens=3)[0].finish_reason == "stop"
    assert complete("abX", max_tokens=3, stop="X")[0].finish_reason == "stop"


def test_a_stop_string_cuts_the_text_and_none_of_it_is_ever_shown():
    completion, texts = complete("one two STOP three", stop="STOP")
    assert (completion.text, completion.finish_reason) == ("one two ", "stop")
    assert completion.token_ids == [*b"one two STOP"]
    assert not any("S" in text for text in texts)


def test_a_beginning_of_a_stop_string_that_goes_on_otherwise_is_shown():
    assert complete("a STar", stop="STOP")[0].text == "a STar"
    assert complete("aaab", stop="aab")[0].text == "a"


def test_the_held_beginning_of_a_stop_string_is_shown_at_any_end():
    assert complete("a ST", stop="STOP")[0].text == "a ST"
    assert complete("a ST", stop="STOP", max_tokens=4)[0].text == "a ST"
    completion, _ = complete("a ST", stop="STOP", eos=False)
    completion.cancel()
    assert (completion.text, completion.finish_reason) == ("a ST", "cancelled")


def test_the_first_of_several_stop_strings_in_the_text_cuts():
    completion, _ = complete("xx🙂yy", stop=["yy", "🙂"])
    assert completion.text == "xx"


class WordTokenizer(BytesTokenizer):
    """Every token is a whole word of its own."""

    def stream(self):
        return self

    def push(self, token_id):
        return WORDS[token_id]

    def finish(self):
        return ""


WORDS = ["", "head tail end"]


@pytest.mark.parametrize("stop", [["tail", "head"], ["head", "tail"], ["d t", "head"]])
def test_of_two_stop_strings_in_one_token_the_earlier_cuts(stop):
    completion = Completion([1], SamplingParams(stop=stop), 9, [], WordTokenizer())  # type: ignore[arg-type]
    completion.grow(completion.choose(np.array([0, 1], np.float32)))
    assert (completion.text, completion.finish_reason) == ("", "stop")


def test_cancelling_an_ended_completion_changes_nothing():
    completion, _ = complete("abc")
    completion.cancel()
    assert completion.finish_reason == "stop"


def test_times_are_in_order():
    completion, _ = complete("abc")
    assert completion.started_s <= completion.first_token_s <= completion.ended_s


answers = st.text(ALPHABET[1:], max_size=30)
stop_lists = st.lists(st.text(ALPHABET[1:], min_size=1, max_size=4), max_size=3)


@given(answers, stop_lists, st.integers(1, 40))
def test_text_is_the_answer_up_to_the_earliest_completed_stop_string(answer, stops, max_tokens):
    completion, texts = complete(answer, stop=stops, max_tokens=max_tokens)
    # Told token by token, so a stop string counts when its last byte is there.
    seen = b""
    expected, reason = None, None
    for count, byte in enumerate(answer.encode(), 1):
        seen += bytes([byte])
        text = seen.decode(errors="ignore")
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            expected, reason = text[: min(found)], "stop"
            break
        if count == max_tokens:
            expected, reason = seen.decode(errors="replace"), "length"
            break
    if reason is None:
        expected, reason = answer, "stop"
    assert (completion.text, completion.finish_reason) == (expected, reason)
    for shown in texts:
        assert completion.text.startswith(shown)
        assert not any(stop in shown for stop in stops)
