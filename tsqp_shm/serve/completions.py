"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tsqp_shm.errors import TsqpError
from tsqp_shm.llm import LLM
from tsqp_shm.serve.answers import Answered, LegacyLogprobs, Spelling, finish_reason, prepared, usage
from tsqp_shm.serve.exchange import DONE, EventStream, event, json_body, until_end, while_connected
from tsqp_shm.serve.fields import Fields
from tsqp_shm.serve.front import Front
from tsqp_shm.serve.generation import Generation
from tsqp_shm.serve.refusal import Refusal, wrong
from tsqp_shm.tee.completion import Completion
from tsqp_shm.tee.sampling_params import SamplingParams

MOST_LOGPROBS = 20
MOST_PROMPTS = 1024
_DEFAULT_MAX_TOKENS = 16


async def completions(request: Request) -> Response | EventStream:
    front: Front = request.app.state.front
    principal = front.principal(request)
    async with AsyncExitStack() as stack:
        fields = Fields(await stack.enter_async_context(json_body(request, front.settings, front.held)))
        llm = front.llm
        front.require_model(fields.text("model"))
        asked = _Asked(fields, front.defaults)
        stack.enter_context(front.admission.places(len(asked.prompts) * asked.count))
        texts, made = await front.aside(asked.prepare, llm)
        generation = Generation(llm.runtime, front.hand_over, made)
        answer = _Answer(front, llm, generation, asked, texts)
        headers = front.keep_receipts(answer.head.id, principal, made)
        stack.callback(generation.end)
        try:
            generation.begin()
        except TsqpError as error:
            raise Refusal.of(error) from None
        if not fields.flag("stream"):
            return JSONResponse(await while_connected(request.receive, answer.whole()), headers=headers)
        return EventStream(
            until_end(stack.pop_all(), answer.pieces(*fields.stream_options)), headers, front.settings.receive_s
        )
    raise AssertionError


class _Asked:
    """What a request wants, its tokens not looked at yet.

    Attributes:
        prompts: texts or token ids.
        params: of each prompt.
        count: completions of each.
        echo: whether the prompt is part of the answer.
        drops_answers: whether nothing but the prompt is: a token has to be drawn all the same.
    """

    def __init__(self, fields: Fields, defaults: SamplingParams) -> None:
        self.prompts = _prompts(fields.required("prompt"))
        self.echo = fields.flag("echo")
        self.num_logprobs = _num_logprobs(fields)
        self.drops_answers = fields.get("max_tokens") == 0
        self.max_tokens = fields.whole("max_tokens", 0, 1 << 20)
        more: dict[str, Any] = {"logprobs": self.num_logprobs}
        if self.echo:
            more["prompt_logprobs"] = self.num_logprobs
        if self.drops_answers:
            more["min_tokens"] = 0
        most = _DEFAULT_MAX_TOKENS if self.max_tokens is None else max(1, self.max_tokens)
        self.params, self.count = fields.params(defaults, {}, max_tokens=most, **more)

    def prepare(self, llm: LLM) -> tuple[list[str], list[Completion]]:
        """The prompts' texts, where they are part of the answer, and the completions, prompt by prompt.

        Raises:
            RequestError: a prompt is none, or does not fit.
        """
        made = [each for prompt in self.prompts for each in prepared(llm, prompt, self.params, self.count)]
        if not self.echo:
            return [], made
        spelled = [
            prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt, skip_special_tokens=False)
            for prompt in self.prompts
        ]
        return spelled, made


class _Answer:
    def __init__(self, front: Front, llm: LLM, generation: Generation, asked: _Asked, texts: list[str]) -> None:
        self._generation, self._asked, self._texts = generation, asked, texts
        self._spelling = Spelling(llm)
        self.head = Answered("cmpl", "text_completion", front.model_name)

    async def whole(self) -> dict[str, Any]:
        try:
            async for _ in self._generation.updates():
                pass
        except TsqpError as error:
            raise Refusal.of(error) from None
        choices = [self._choice(index, each) for index, each in enumerate(self._generation.completions)]
        return self.head.body(choices, usage=self._usage())

    async def pieces(self, includes_usage: bool, always: bool) -> AsyncIterator[str]:
        completions = self._generation.completions
        places = {completion: index for index, completion in enumerate(completions)}
        seen = dict.fromkeys(completions, 0)
        logprobs = {completion: LegacyLogprobs(self._spelling) for completion in completions}
        has_begun: set[Completion] = set()

        def chunk(choices: list[dict[str, Any]], *, is_last: bool = False) -> str:
            shown = {"usage": self._usage() if is_last or always else None} if includes_usage else {}
            return event(self.head.body(choices, **shown))

        try:
            async for update in self._generation.updates():
                completion, index = update.completion, places[update.completion]
                if self._asked.echo and completion not in has_begun:
                    has_begun.add(completion)
                    of_prompt = self._of_prompt(completion, logprobs[completion])
                    yield chunk([_piece(index, self._prompt_of(index), of_prompt)])
                first, seen[completion] = seen[completion], seen[completion] + len(update.token_ids)
                text, scored = update.text, None
                if self._asked.drops_answers:
                    text = ""
                elif self._asked.num_logprobs is not None and update.token_ids:
                    scores = completion.scores[first : seen[completion]]
                    scored = logprobs[completion].take(update.token_ids, scores)
                if text or scored is not None or update.is_last:
                    yield chunk([_piece(index, text, scored, self._reason(completion) if update.is_last else None)])
        except TsqpError as error:
            yield event(Refusal.of(error).body)
            yield DONE
            return
        if includes_usage:
            yield chunk([], is_last=True)
        yield DONE

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        text, found = "" if self._asked.drops_answers else completion.text, None
        if self._asked.num_logprobs is not None:
            logprobs = LegacyLogprobs(self._spelling)
            parts = [self._of_prompt(completion, logprobs)] if self._asked.echo else []
            if not self._asked.drops_answers:
                parts.append(logprobs.take(completion.token_ids, completion.scores))
            found = {name: [each for part in parts if part for each in part[name]] for name in _LEGACY}
        if self._asked.echo:
            text = self._prompt_of(index) + text
        return {**_piece(index, text, found, self._reason(completion)), "stop_reason": completion.stop_reason}

    def _of_prompt(self, completion: Completion, logprobs: LegacyLogprobs) -> dict[str, Any] | None:
        """The scores of the prompt's tokens. Of several completions of a prompt, the first has them."""
        if self._asked.num_logprobs is None:
            return None
        completions = self._generation.completions
        first = completions[self._prompt_index(completions.index(completion)) * self._per_prompt]
        return logprobs.take(completion.prompt_token_ids, [None, *first.prompt_scores])

    def _prompt_of(self, index: int) -> str:
        return self._texts[self._prompt_index(index)]

    def _prompt_index(self, index: int) -> int:
        return index // self._per_prompt

    @property
    def _per_prompt(self) -> int:
        return self._asked.count

    def _reason(self, completion: Completion) -> str | None:
        return "length" if self._asked.drops_answers else finish_reason(completion)

    def _usage(self) -> dict[str, Any]:
        asked = self._asked
        return usage(self._generation.completions, len(asked.prompts), drops_answers=asked.drops_answers)


_LEGACY = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def _piece(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _num_logprobs(fields: Fields) -> int | None:
    if fields.get("logprobs") is False:
        return None
    return fields.whole("logprobs", 0, MOST_LOGPROBS)


def _prompts(value: object) -> Sequence[str | list[int]]:
    """One prompt or several: a string, token ids, or a list of either."""
    expected = "a string, token ids, or an array of these"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong("prompt", value, expected)
    if _are_ids(value):
        return [value]
    if len(value) > MOST_PROMPTS:
        raise wrong("prompt", value, f"at most {MOST_PROMPTS} prompts")
    for index, each in enumerate(value):
        if not isinstance(each, str) and not _are_ids(each):
            raise wrong(f"prompt[{index}]", each, expected)
    return value


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)
