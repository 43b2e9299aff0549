"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tsqp_shm.errors import TsqpError
from tsqp_shm.llm import LLM
from tsqp_shm.serve.answers import Answered, Spelling, finish_reason, prepared, usage
from tsqp_shm.serve.exchange import DONE, EventStream, event, json_body, until_end, while_connected
from tsqp_shm.serve.fields import Fields
from tsqp_shm.serve.front import Front
from tsqp_shm.serve.generation import Generation
from tsqp_shm.serve.refusal import Refusal, wrong

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_TOP_LOGPROBS = 20


async def chat_completions(request: Request) -> Response | EventStream:
    front: Front = request.app.state.front
    principal = front.principal(request)
    async with AsyncExitStack() as stack:
        fields = Fields(await stack.enter_async_context(json_body(request, front.settings, front.held)))
        llm = front.llm
        front.require_model(fields.text("model"))
        num_top = _num_top(fields)
        names = {"max_tokens": "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"}
        params, count = fields.params(front.defaults, names, logprobs=num_top)
        token_ids = await front.aside(prompt_of, llm, fields)
        stack.enter_context(front.admission.places(count))
        completions = await front.aside(prepared, llm, token_ids, params, count)
        generation = Generation(llm.runtime, front.hand_over, completions)
        answer = _Answer(front, llm, generation, num_top)
        headers = front.keep_receipts(answer.head.id, principal, completions)
        stack.callback(generation.end)
        try:
            generation.begin()
        except TsqpError as error:
            raise Refusal.of(error, names) from None
        if not fields.flag("stream"):
            return JSONResponse(await while_connected(request.receive, answer.whole()), headers=headers)
        # What it holds, it holds until the last event.
        return EventStream(
            until_end(stack.pop_all(), answer.pieces(*fields.stream_options)), headers, front.settings.receive_s
        )
    raise AssertionError


class _Answer:
    def __init__(self, front: Front, llm: LLM, generation: Generation, num_top: int | None) -> None:
        self._generation, self._num_top = generation, num_top
        self._spelling = Spelling(llm)
        self.head = Answered("chatcmpl", "chat.completion", front.model_name)
        self._chunk = {"object": "chat.completion.chunk"}

    async def whole(self) -> dict[str, Any]:
        completions = self._generation.completions
        try:
            async for _ in self._generation.updates():
                pass
        except TsqpError as error:
            raise Refusal.of(error) from None
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                "logprobs": None if self._num_top is None else self._spelling.chat(each.scores, self._num_top),
                "finish_reason": finish_reason(each),
                "stop_reason": each.stop_reason,
            }
            for index, each in enumerate(completions)
        ]
        return self.head.body(choices, usage=usage(completions))

    async def pieces(self, includes_usage: bool, always: bool) -> AsyncIterator[str]:
        completions = self._generation.completions
        places = {completion: index for index, completion in enumerate(completions)}
        seen = dict.fromkeys(completions, 0)

        def chunk(choices: list[dict[str, Any]], *, is_last: bool = False) -> str:
            shown = {"usage": usage(completions) if is_last or always else None} if includes_usage else {}
            return event(self.head.body(choices, **self._chunk, **shown))

        for index in places.values():
            yield chunk([_choice(index, {"role": "assistant", "content": ""})])
        try:
            async for update in self._generation.updates():
                completion, index = update.completion, places[update.completion]
                first, seen[completion] = seen[completion], seen[completion] + len(update.token_ids)
                logprobs = None
                if self._num_top is not None and update.token_ids:
                    logprobs = self._spelling.chat(completion.scores[first : seen[completion]], self._num_top)
                if update.text or logprobs is not None:
                    yield chunk([_choice(index, {"content": update.text}, logprobs)])
                if update.is_last:
                    ended = {"stop_reason": completion.stop_reason}
                    yield chunk([_choice(index, {}, None, finish_reason(completion)) | ended])
        except TsqpError as error:
            yield event(Refusal.of(error).body)
            yield DONE
            return
        if includes_usage:
            yield chunk([], is_last=True)
        yield DONE


def _choice(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _num_top(fields: Fields) -> int | None:
    top = fields.whole("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if not fields.flag("logprobs"):
        if top:
            raise wrong("top_logprobs", top, "logprobs true beside it")
        return None
    return top or 0


def prompt_of(llm: LLM, fields: Fields) -> list[int]:
    continues = fields.flag("continue_final_message")
    variables = fields.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise wrong("chat_template_kwargs", variables, "an object")
    return llm.chat_prompt(
        _messages(fields.required("messages")),
        add_generation_prompt=fields.flag("add_generation_prompt", not continues),
        continue_final_message=continues,
        chat_template_kwargs=variables,
    )


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, "an array of messages, one at least")
    messages = []
    for index, message in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            raise wrong(name, message, "an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise wrong(f"{name}.role", role, "one of " + ", ".join(_ROLES))
        content = message.get("content")
        if isinstance(content, list):
            _require_text(content, name)
        messages.append({**message, "role": _ROLES[role], "content": content if content is not None else ""})
    return messages


def _require_text(parts: list[object], name: str) -> None:
    for index, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text":
            place = f"{name}.content[{index}].type"
            reason = f"{place}: expected text, as this model reads nothing else"
            raise Refusal(400, reason, param=place, code="unsupported")
