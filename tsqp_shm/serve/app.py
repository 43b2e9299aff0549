"""The routes, and what holds for each of them: an id, the mode, an error object in the place of a traceback."""

from __future__ import annotations

import re
import uuid

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tsqp_shm.serve import health, tokens
from tsqp_shm.serve.chat import chat_completions
from tsqp_shm.serve.completions import completions
from tsqp_shm.serve.evidence import evidence
from tsqp_shm.serve.front import Front
from tsqp_shm.serve.metrics import metrics
from tsqp_shm.serve.page import PARTS, part
from tsqp_shm.serve.refusal import Refusal

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_GONE = 499


def application(front: Front) -> Starlette:
    """Everything that the server answers."""
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", health.models),
        Route("/v1/models/{name:path}", health.model),
        Route("/v1/evidence/{request_id}", evidence),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokens.tokenizer_info),
        Route("/health", health.health),
        Route("/ping", health.health, methods=["GET", "POST"]),
        Route("/live", health.live),
        Route("/version", health.version),
        Route("/metrics", metrics),
        *(Route(path, part(*named)) for path, named in PARTS.items()),
        Route("/session", health.session),
    ]
    middleware = [Middleware(_Named, mode=front.mode)]
    if front.settings.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(front.settings.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-request-id"],
                expose_headers=["x-request-id", "x-tsqp-mode", "x-tsqp-evidence", "x-tsqp-nonce"],
            )
        )
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            Refusal: _refused,
            HTTPException: _not_found,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )
    app.state.front = front
    return app


class _Named:
    """Gives each answer the id of its request, that of the client where it has one, and the session's mode."""

    def __init__(self, app: ASGIApp, mode: str) -> None:
        self._app, self._mode = app, mode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        # UNTRUSTED: it goes back into a header.
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-TSQP-Mode"] = self._mode
            await send(message)

        await self._app(scope, receive, named)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path", 405: "this path is not asked so"}.get(error.status_code, error.detail)
    return Refusal(error.status_code, what, headers=error.headers, code="not_found").response


async def _gone(request: Request, error: Exception) -> Response:
    # Nobody reads it.
    return Response(status_code=_GONE)


async def _failed(request: Request, error: Exception) -> Response:
    # What it says may hold what was asked; it is for nobody but who mends this program.
    return Refusal(500, f"internal error: {type(error).__name__}", kind="server_error", code="internal_error").response
