"""POST /tokenize and /detokenize, GET /tokenizer_info: for clients that have no tokenizer of their own."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from tsqp_shm.llm import LLM
from tsqp_shm.serve.chat import prompt_of
from tsqp_shm.serve.exchange import json_body
from tsqp_shm.serve.fields import Fields
from tsqp_shm.serve.front import Front
from tsqp_shm.serve.refusal import wrong


async def tokenize(request: Request) -> JSONResponse:
    """A prompt's token ids, or those of a conversation."""
    front: Front = request.app.state.front
    front.principal(request)
    async with json_body(request, front.settings, front.held) as content:
        fields, llm = Fields(content), front.llm
        front.require_model(fields.text("model"))
        token_ids = await front.aside(_encoded, llm, fields)
        body: dict[str, Any] = {"count": len(token_ids), "max_model_len": llm.max_model_len, "tokens": token_ids}
        if fields.flag("return_token_strs"):
            body["token_strs"] = [llm.tokenizer.token(token_id) or "" for token_id in token_ids]
        return JSONResponse(body)


async def detokenize(request: Request) -> JSONResponse:
    front: Front = request.app.state.front
    front.principal(request)
    async with json_body(request, front.settings, front.held) as content:
        fields, llm = Fields(content), front.llm
        front.require_model(fields.text("model"))
        tokens = fields.required("tokens")
        most = llm.spec.vocab_size
        if not isinstance(tokens, list) or not all(type(each) is int and 0 <= each < most for each in tokens):
            raise wrong("tokens", tokens, f"an array of token ids, 0 to {most - 1}")
        return JSONResponse({"prompt": await front.aside(llm.tokenizer.decode, tokens, False)})


async def tokenizer_info(request: Request) -> JSONResponse:
    front: Front = request.app.state.front
    front.principal(request)
    return JSONResponse({"tokenizer_class": "tokenizers", **front.llm.tokenizer.config.special_tokens})


def _encoded(llm: LLM, fields: Fields) -> list[int]:
    if "messages" in fields:
        return prompt_of(llm, fields)
    text = fields.text("prompt")
    if text is None:
        raise wrong("prompt", None, "a string, or messages in its place")
    return llm.tokenizer.encode(text, fields.flag("add_special_tokens", True), llm.spec.max_positions)
