"""Conversations in the forms in which callers have them, and how the last message is continued."""

from __future__ import annotations

import pytest
from demo_tokenizers import ours, theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp_shm.conversations import as_conversation, as_conversations, render
from tsqp_shm.errors import RequestError

pytestmark = pytest.mark.usefixtures("demo_tokenizers")
USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi the"}


def continued(messages) -> str:
    return render(ours(), as_conversation(messages), add_generation_prompt=False, continue_final_message=True)


def test_one_conversation_or_several():
    assert as_conversations([USER, ASSISTANT]) == [[USER, ASSISTANT]]
    assert as_conversations([[USER], [USER, ASSISTANT]]) == [[USER], [USER, ASSISTANT]]
    assert as_conversations(((USER,),)) == [[USER]]
    assert as_conversations(iter([USER])) == [[USER]]
    assert as_conversations([]) == []


def test_content_may_be_parts_and_other_keys_are_for_the_template():
    parts = [{"type": "text", "text": "one"}, {"text": "two"}, "three"]
    (message,) = as_conversation([{"role": "user", "content": parts, "name": "x", "tool_calls": [{"id": 1}]}])
    assert message == {"role": "user", "content": "one\ntwo\nthree", "name": "x", "tool_calls": [{"id": 1}]}
    assert as_conversation([{"role": "assistant", "content": None}]) == [{"role": "assistant", "content": None}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Hello", r"messages: got 'Hello' \(str\), expected a list of messages"),
        (None, "messages: got None"),
        (USER, "messages: got a dict of 2"),
        ([USER, "Hello"], r"messages\[1\]: got 'Hello' \(str\), expected a dict"),
        (["Hello"], r"messages\[0\]: got 'Hello'"),
        ([[USER], []], r"messages\[1\]: got \[\], expected at least one message"),
        ([[USER], [USER, 5]], r"messages\[1\]\[1\]: got 5 \(int\)"),
        ([{"content": "x"}], r"messages\[0\]: got a dict of 1, expected a role in it"),
        ([USER, {"role": "user"}], r"messages\[1\]: got a dict of 1, expected a content in it"),
        ([{"role": 5, "content": "x"}], r"messages\[0\]\['role'\]: got 5 \(int\)"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\['role'\]: got ''"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\]: got 5 \(int\)"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\['content'\]: got a bytes of 1"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\['content'\]\[0\]\['type'\]: got 'image_url', expected text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"\['content'\]\[0\]: got a dict of 1"),
        ([{"role": "user", "content": [5]}], r"\['content'\]\[0\]: got 5 \(int\)"),
        ([{5: "x", **USER}], r"messages\[0\]: key 5: got 5 \(int\), expected a string"),
        ([{**USER, "x": object()}], r"messages\[0\]: got a dict of 3, expected values that JSON has"),
    ],
)
def test_what_is_no_message_is_named_with_its_place(given, said):
    with pytest.raises(RequestError, match=said) as caught:
        as_conversations(given)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(st.text("ab <|>\n\t", min_size=1, max_size=8).filter(str.strip))
def test_a_last_message_is_continued_as_in_transformers(demo_model, content):
    messages = [USER, {"role": "assistant", "content": content}]
    expected = theirs().apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert continued(messages) == expected


def test_a_last_message_that_cannot_be_continued_is_refused(demo_model):
    with pytest.raises(RequestError, match="only one of"):
        render(ours(), [USER], add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(RequestError, match=r"add_generation_prompt: got 'yes' \(str\)"):
        render(ours(), [USER], add_generation_prompt="yes", continue_final_message=False)
    with pytest.raises(RequestError, match="content"):
        continued([USER, {"role": "assistant", "content": None}])
