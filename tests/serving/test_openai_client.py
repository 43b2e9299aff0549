"""OpenAI's own client against the server: what programs that are written for it find."""

from __future__ import annotations

import openai
import pytest

from tsqp_shm import LLM, SamplingParams

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client) -> str:
    (only,) = client.models.list()
    return only.id


@pytest.fixture(scope="module")
def inside(demo_model) -> dict[str, object]:
    """What a session of this process gives."""
    with LLM(demo_model, mode="tee-only") as llm:
        chat = llm.chat(QUESTION, GREEDY)[0].outputs[0]
        several = llm.generate(["The capital of France is", "One, two,"], GREEDY)
        scored = llm.generate(
            ["One, two,"], SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=2)
        )
        drawn = llm.generate(["Once"], SamplingParams(n=2, seed=7, temperature=0.9, max_tokens=8))[0]
    return {"chat": chat, "several": several, "scored": scored[0], "drawn": drawn}


def test_a_conversation_is_answered_as_in_process(client, model, inside):
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", inside["chat"].text)
    assert choice.finish_reason == inside["chat"].finish_reason
    assert answer.usage.completion_tokens == len(inside["chat"].token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_answer_in_pieces_with_role_first_and_usage_last(client, model, inside):
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_completion_tokens=12, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == inside["chat"].text
    assert chunks[-2].choices[0].finish_reason == inside["chat"].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(inside["chat"].token_ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_may_come_with_each_piece(client, model):
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=3, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    assert [chunk.usage.completion_tokens for chunk in stream][-1] == 3


def test_roles_and_parts_are_those_of_openai(client, model):
    messages = [
        {"role": "developer", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": "Go on."},
    ]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=2)
    assert answer.usage.completion_tokens <= 2


def test_prompts_are_completed_in_their_order_from_text_or_token_ids(client, model, inside):
    prompts = ["The capital of France is", "One, two,"]
    expected = [output.outputs[0].text for output in inside["several"]]
    ids = [output.prompt_token_ids for output in inside["several"]]
    for prompt in (prompts, ids):
        answer = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=12)
        assert [choice.text for choice in answer.choices] == expected
    for prompt in (prompts[0], ids[0]):
        answer = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=12)
        assert [choice.text for choice in answer.choices] == expected[:1]


def test_echo_and_scores_are_the_prompt_s_too_also_where_nothing_is_generated(client, model, inside):
    scored = inside["scored"]
    arguments = {"model": model, "prompt": "One, two,", "temperature": 0, "echo": True, "logprobs": 2}
    whole = client.completions.create(max_tokens=3, **arguments).choices[0]
    none = client.completions.create(max_tokens=0, **arguments).choices[0]
    of_prompt = [
        None,
        *(
            position[token].logprob
            for position, token in zip(scored.prompt_logprobs[1:], scored.prompt_token_ids[1:], strict=True)
        ),
    ]
    of_answer = [
        position[token].logprob
        for position, token in zip(scored.outputs[0].logprobs, scored.outputs[0].token_ids, strict=True)
    ]
    assert whole.text == "One, two," + scored.outputs[0].text
    assert whole.logprobs.token_logprobs == pytest.approx([*of_prompt, *of_answer])
    assert (none.text, none.logprobs.token_logprobs) == ("One, two,", pytest.approx(of_prompt))
    assert "".join(whole.logprobs.tokens) == whole.text
    offsets = whole.logprobs.text_offset
    assert [
        whole.text[first:].startswith(token) for first, token in zip(offsets, whole.logprobs.tokens, strict=True)
    ] == [True] * len(offsets)
    assert whole.logprobs.top_logprobs[0] is None and len(whole.logprobs.top_logprobs[-1]) >= 2
    pieces = list(client.completions.create(max_tokens=3, stream=True, **arguments))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.text
    joined = [
        score for piece in pieces if piece.choices[0].logprobs for score in piece.choices[0].logprobs.token_logprobs
    ]
    assert joined == pytest.approx(whole.logprobs.token_logprobs)


def test_scores_of_a_conversation_have_the_likeliest_first(client, model):
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob and bytes(entry.bytes).decode() == entry.token


def test_several_answers_are_those_of_the_seed_and_greedy_ones_are_equal(client, model, inside):
    drawn = client.completions.create(model=model, prompt="Once", n=2, seed=7, temperature=0.9, max_tokens=8)
    assert [choice.text for choice in drawn.choices] == [output.text for output in inside["drawn"].outputs]
    same = client.completions.create(model=model, prompt="Once", n=2, temperature=0, max_tokens=4)
    assert same.choices[0].text == same.choices[1].text and same.usage.completion_tokens == 8


def test_what_openai_has_not_is_asked_in_the_extra_body(client, model):
    answer = client.completions.create(
        model=model, prompt="One, two,", temperature=1.0, max_tokens=6,
        extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "ignore_eos": True, "min_tokens": 6},
    )  # fmt: skip
    likeliest = client.completions.create(model=model, prompt="One, two,", temperature=0, max_tokens=6)
    assert answer.choices[0].text == likeliest.choices[0].text
    stopped = client.completions.create(model=model, prompt="One, two,", temperature=0, max_tokens=9, stop=[" number"])
    assert " number" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"
    biased = client.completions.create(model=model, prompt="One", temperature=0, max_tokens=2, logit_bias={"42": 100})
    assert biased.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("arguments", "kind", "param", "code"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"max_completion_tokens": 0}, openai.BadRequestError, "max_completion_tokens", None),
        ({"messages": []}, openai.BadRequestError, "messages", None),
        ({"messages": [{"role": "king", "content": "x"}]}, openai.BadRequestError, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError,
         "messages[0].content[0].type", "unsupported"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.BadRequestError, None,
         "context_length_exceeded"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools", "unsupported"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "unsupported"),
        ({"n": 17}, openai.BadRequestError, None, "too_many"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_cannot_be_done_is_openai_s_error_of_its_class(client, model, arguments, kind, param, code):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": model, "messages": QUESTION, **arguments})
    assert (caught.value.param if param else None, caught.value.code) == (param, code)


def test_fields_that_nobody_knows_are_passed_over(client, model):
    client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=1, extra_body={"mystery": [1], "user": "x"}
    )


def test_keys_are_asked_for(locked):
    for key, is_right in (("first-key", True), ("second-key", True), ("first-kez", False), ("", False)):
        client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key or "x", max_retries=0)
        if is_right:
            client.models.list()
        else:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
