"""A completion grows token by token: what it shows, where it stops, and what it never shows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, every_kind, sentencepiece, tokenizer

from tsqp_shm.errors import RequestError, described
from tsqp_shm.tee.completion import Completion, checked_token_ids
from tsqp_shm.tee.sampling_params import SamplingParams

# Every token is one byte of UTF-8, so characters span tokens; but one is a whole text, and some are special.
BACKEND = byte_level(["headĠtailĠend"])
BYTES = tokenizer(BACKEND)
WHOLE_TEXT = BACKEND.token_to_id("headĠtailĠend")
EOS, START, END = (BACKEND.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
ALPHABET = "abcdé🙂 "


def ids_of(answer: str | list[int]) -> list[int]:
    """Its bytes' tokens; special tokens that it spells out are one each."""
    return BACKEND.encode(answer).ids if isinstance(answer, str) else answer


def completion_of(prompt, max_tokens, eos, tokens, **params):
    """Of a vocabulary in which whatever a test feeds it has a place."""
    params = SamplingParams(**{"max_tokens": None, **params})
    return Completion(prompt, params, max_tokens, eos, tokens, vocab_size=10_000)


def complete(answer: str | list[int], *, stop=(), max_tokens=1000, eos=True, **params):
    """Feeds a completion the tokens of an answer and then the end-of-sequence token; its text after each."""
    tokens = [*ids_of(answer), *([EOS] if eos else [])]
    completion = completion_of([1, 2], max_tokens, [EOS], BYTES, stop=stop, **params)
    texts = []
    for token in tokens:
        if completion.finish_reason is not None:
            break
        completion.grow(token)
        texts.append(completion.text)
    return completion, texts


def test_an_end_of_sequence_token_stops_and_is_no_text():
    completion, _ = complete("abc")
    assert (completion.text, completion.finish_reason) == ("abc", "stop")
    assert completion.token_ids == [*ids_of("abc"), EOS]
    assert completion.all_token_ids == [1, 2, *ids_of("abc"), EOS]


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
    assert completion.token_ids == ids_of("one two STOP")
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


@pytest.mark.parametrize("stop", [["tail", "head"], ["head", "tail"], ["d t", "head"]])
def test_of_two_stop_strings_in_one_token_the_earlier_cuts(stop):
    completion, _ = complete([WHOLE_TEXT], stop=stop)
    assert (completion.text, completion.finish_reason) == ("", "stop")
    assert completion.stop_reason == "head"


def test_cancelling_an_ended_completion_changes_nothing():
    completion, _ = complete("abc")
    completion.cancel()
    assert completion.finish_reason == "stop"


def test_times_are_in_order():
    completion, _ = complete("abc")
    assert completion.started_s <= completion.first_token_s <= completion.ended_s


answers = st.text(ALPHABET, max_size=30)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


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


def test_a_stop_reason_is_the_string_that_was_found():
    assert complete("one two", stop=["three", "tw"])[0].stop_reason == "tw"
    assert complete("one two", stop="three")[0].stop_reason is None
    assert complete("one two", stop="three", max_tokens=2)[0].stop_reason is None


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<|im_end|>", "ab", 3),
        ("b<|im_end|>", "a", 3),
        ("b<|im_", "a", 3),
        ("_end|>c", "ab", 4),
        ("<|im_end|>c", "ab", 4),
        (["zz", "|><|"], "abcd", 7),
        ("im_start", "abcd", 7),
        ("b<|im_end|>d", "abcdef", 10),
        ("bc", "abcdef", 10),
    ],
)
def test_stop_strings_see_special_tokens_which_the_text_leaves_out(stop, text, count):
    completion, texts = complete("ab<|im_end|>cd<|im_end|><|im_start|>ef", stop=stop)
    assert (completion.text, len(completion.token_ids)) == (text, count)
    for shown in texts:
        assert text.startswith(shown)


def test_stop_strings_see_the_end_of_sequence_token():
    assert complete("ab", stop="b<|endoftext|>")[0].text == "a"
    completion, _ = complete("ab", stop="<|endoftext|>")
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("ab", "stop", "<|endoftext|>")


def test_a_stop_token_ends_the_completion_and_is_no_text():
    for token, text in ((END, "ab"), (ids_of("b")[0], "a")):
        completion, _ = complete("ab<|im_end|>cd", stop_token_ids=[token])
        assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", token)
        assert completion.token_ids[-1] == token


def test_ignoring_the_end_of_sequence_leaves_stop_tokens():
    completion, _ = complete("ab", ignore_eos=True, stop_token_ids=[EOS])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", EOS)
    assert complete("ab", stop_token_ids=[EOS])[0].stop_reason is None


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"stop": "o S"}, "two S"),
        ({"stop": ["STOP", "ST"]}, "two ST"),
        ({"stop": "<|im_end|>"}, "two STOP<|im_end|>"),
        ({"stop": "P<|im_"}, "two STOP<|im_"),
        ({"stop_token_ids": [END]}, "two STOP"),
        ({"stop_token_ids": [END], "skip_special_tokens": False}, "two STOP<|im_end|>"),
        ({"stop_token_ids": ids_of("S")}, "two S"),
        ({}, "two STOP three"),
        ({"skip_special_tokens": False}, "two STOP<|im_end|> three<|endoftext|>"),
    ],
)
def test_what_has_stopped_it_is_text_where_it_is_asked_for(params, text):
    completion, texts = complete("two STOP<|im_end|> three", include_stop_str_in_output=True, **params)
    assert completion.text == text
    for shown in texts:
        assert text.startswith(shown)


def test_special_tokens_are_text_where_they_are_asked_for():
    completion, texts = complete("a<|im_start|>b<|im_end|>", skip_special_tokens=False)
    assert completion.text == "a<|im_start|>b<|im_end|>"
    assert texts[1] == "a<|im_start|>"
    assert complete("a<|im_start|>bc", skip_special_tokens=False, stop="c")[0].text == "a<|im_start|>b"


def test_without_detokenizing_there_is_no_text():
    completion, _ = complete("abc", detokenize=False)
    assert (completion.text, completion.finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [(0, "x"), (3, "x"), (4, "xSTOPx"), (8, "xSTOPx"), (9, "xSTOPxSTOP")],
)
def test_a_stop_string_counts_where_it_ends_behind_min_tokens(min_tokens, text):
    completion, _ = complete("xSTOPxSTOP", stop="STOP", min_tokens=min_tokens + 1)
    assert completion.text == text


def test_a_stop_string_that_began_before_min_tokens_counts():
    assert complete("xSTOP", stop="STOP", min_tokens=4)[0].text == "x"


def spelled_out(ids: list[int]) -> str:
    return BYTES.decode(ids, skip_special_tokens=False)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_stop_string_ends_at_the_token_that_ends_it_in_transformers(data):
    torch = pytest.importorskip("torch")
    from transformers import PreTrainedTokenizerFast
    from transformers.generation.stopping_criteria import StopStringCriteria

    # The tokens of few texts, of which many stop strings can be found.
    alphabet = [*ids_of("ab "), *ids_of("é"), START, END]
    ids = data.draw(st.lists(st.sampled_from(alphabet), min_size=1, max_size=12))
    spelled = spelled_out(ids)
    start = data.draw(st.integers(0, len(spelled) - 1))
    stop = spelled[start : start + data.draw(st.integers(1, 20))]
    if "\N{REPLACEMENT CHARACTER}" in stop:
        return
    theirs = StopStringCriteria(PreTrainedTokenizerFast(tokenizer_object=BACKEND), [stop])
    # A prompt that no stop string can begin in: transformers looks into it, too.
    prompt = ids_of("~")
    count = next((n for n in range(1, len(ids) + 1) if theirs(torch.tensor([prompt + ids[:n]]), None).all()), len(ids))
    completion, texts = complete(ids, stop=stop, eos=False)
    assert len(completion.token_ids) == count
    before = spelled_out(ids[:count]).partition(stop)[0]
    for special in ("<|im_start|>", "<|im_end|>"):
        before = before.replace(special, "")
    # What is left of a special token in whose midst the stop string begins is no text.
    assert before.startswith(completion.text)
    assert before[len(completion.text) :] in {*special_beginnings(), ""} or completion.finish_reason is None
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier)


def special_beginnings() -> set[str]:
    return {token[:length] for token in ("<|im_start|>", "<|im_end|>") for length in range(len(token))}


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_prompt_and_text_are_the_decoding_of_all_tokens_whatever_the_decoder(data):
    backend = data.draw(st.sampled_from(list(every_kind().items())))[1]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 1), min_size=1, max_size=12))
    cut = data.draw(st.integers(1, len(ids)))
    stop = data.draw(st.sampled_from([(), "never there", ("<", "\0")]))
    tokens = tokenizer(backend)
    whole, prompt = tokens.decode(ids), tokens.decode(ids[:cut])
    completion = completion_of(ids[:cut], 1000, [], tokens, stop=stop)
    texts = []
    for token in ids[cut:]:
        completion.grow(token)
        texts.append(completion.text)
        if completion.finish_reason is not None:
            return
    completion.cancel()
    if whole.startswith(prompt):
        assert prompt + completion.text == whole
    for shown in texts:
        assert completion.text.startswith(shown)


def test_stop_strings_see_the_first_space_and_the_text_has_it():
    backend = sentencepiece()
    tokens = tokenizer(backend)
    prompt = backend.encode("Hello", add_special_tokens=False).ids
    world = backend.token_to_id("▁world")
    for stop, text in (((), " world"), (" w", ""), ("wor", " ")):
        completion = completion_of(prompt, 1, [], tokens, stop=stop)
        completion.grow(world)
        assert completion.text == text


def test_a_stop_string_cuts_behind_a_first_word_that_has_lost_its_space():
    backend = every_kind()["Metaspace, always"]
    word, special = backend.token_to_id("d▁"), backend.token_to_id("<s>")
    completion = completion_of([special], 100, [], tokenizer(backend), stop=" d")
    completion.grow(word)
    completion.grow(word)
    assert (completion.text, completion.finish_reason) == ("d", "stop")


def test_a_stop_string_of_byte_tokens_ends_at_their_last():
    backend = sentencepiece()
    flamingo = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "🦩".encode()]
    completion = completion_of([1], 100, [], tokenizer(backend), stop="🦩")
    for token in [*flamingo, 5, 5]:
        if completion.finish_reason is None:
            completion.grow(token)
    assert (completion.token_ids, completion.text) == (flamingo, "")


@pytest.mark.parametrize("token_ids", [(5, 6), [np.int64(5), np.uint8(6)], iter([5, 6]), np.array([5, 6]), range(5, 7)])
def test_token_ids_of_any_kind_become_pythons_own(token_ids):
    ids = checked_token_ids(token_ids, 2, 3, 7)
    assert ids == [5, 6]
    assert all(type(token_id) is int for token_id in ids)


@pytest.mark.parametrize(
    ("token_ids", "said"),
    [
        ([], "mine: got '0 tokens', expected at least one token"),
        ([1, 2, 3, 4, 5], "mine: got '5 tokens', expected at most 3"),
        (range(10**30), "more than 3 tokens"),
        ([1, 7], "mine: token 1: got 7, expected a token id, 0 to 6"),
        ([1, -1], "token 1: got -1"),
        ([1.0], r"token 0: got 1.0 \(float\)"),
        (["a"], r"token 0: got 'a' \(str\)"),
        ([True], r"token 0: got True \(bool\)"),
        ([np.True_], r"token 0: got a bool"),
        ([[1]], "token 0: got \\[1\\]"),
        ([10**5000], "token 0: got an int of 16610 bits"),
    ],
    ids=described,
)
def test_wrong_token_ids_are_named_with_their_place(token_ids, said):
    with pytest.raises(RequestError, match=said):
        checked_token_ids(token_ids, 3, 4, 7, "mine")
