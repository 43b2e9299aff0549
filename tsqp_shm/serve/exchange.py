"""One HTTP exchange: a body that is read within bounds, and an answer for as long as its client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from tsqp_shm.serve.admission import HeldBytes
from tsqp_shm.serve.refusal import Refusal
from tsqp_shm.serve.settings import ServeSettings

T = TypeVar("T")
# Beyond it, parsing would keep the loop from everybody else.
_SMALL_BYTES = 1 << 18
_NO_STORE = {"Cache-Control": "no-cache, no-store"}


@asynccontextmanager
async def json_body(request: Request, settings: ServeSettings, held: HeldBytes) -> AsyncIterator[object]:
    """What a request's body says; its bytes count as held during the block.

    Raises:
        Refusal: it is no JSON, too large, or does not come in time.
    """
    # UNTRUSTED: a length that is said is a reason to refuse, and none to believe.
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > settings.max_body_bytes:
        raise _too_large(settings)
    body, taken = bytearray(), 0
    try:
        stream = request.stream()
        end_s = asyncio.get_running_loop().time() + settings.receive_s
        while True:
            left_s = end_s - asyncio.get_running_loop().time()
            try:
                piece = await asyncio.wait_for(anext(stream, None), max(0.0, left_s))
            except asyncio.TimeoutError:
                raise Refusal(408, f"the body took longer than {settings.receive_s:g} s") from None
            if piece is None:
                break
            held.take(len(piece))
            taken += len(piece)
            if taken > settings.max_body_bytes:
                raise _too_large(settings)
            body += piece
        parsed = _parsed(bytes(body)) if taken <= _SMALL_BYTES else await asyncio.to_thread(_parsed, bytes(body))
        body.clear()
        yield parsed
    finally:
        held.give_back(taken)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; where the client goes away first, the work is cancelled.

    Raises:
        ClientDisconnect: it has.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


class EventStream:
    """An answer of server-sent events, each sent as it is made.

    Args:
        events: text of whole events.
        patience_s: how long the client may take to take one.
    """

    def __init__(self, events: AsyncIterator[str], headers: Mapping[str, str], patience_s: float) -> None:
        self._events, self._patience_s = events, patience_s
        shown = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no", **_NO_STORE, **headers}
        self._headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in shown.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        # A client that takes nothing holds neither a place in the batch nor memory for ever.
        patience = _Patience(self._patience_s)
        try:
            async with aclosing(self._events) as events:  # type: ignore[type-var]
                async for event in events:
                    with patience:
                        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except asyncio.CancelledError:
            if patience.is_over:
                raise ClientDisconnect from None
            raise
        finally:
            patience.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Patience:
    """Cancels the task that makes it when one of its blocks lasts too long. A timer for all of them, as each token of
    each stream is one: `asyncio.wait_for` would make a task and a timer for each.

    Attributes:
        is_over: whether it has cancelled.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._loop, self._task = seconds, asyncio.get_running_loop(), asyncio.current_task()
        self._began_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.is_over = False

    def __enter__(self) -> None:
        self._began_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._look)

    def __exit__(self, *of_error: object) -> None:
        self._began_s = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._began_s is None:
            return
        left_s = self._began_s + self._seconds - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        elif self._task is not None:
            self.is_over = True
            self._task.cancel()


_encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(content: object) -> str:
    return f"data: {_encoded(content)}\n\n"


DONE = "data: [DONE]\n\n"


async def until_end(stack: AsyncExitStack, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """The pieces; what the stack holds is held until the last."""
    async with stack, aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            yield piece


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # Where, and not what: the text around it may be a prompt's.
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise Refusal(400, f"the body is no JSON{where}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _too_large(settings: ServeSettings) -> Refusal:
    return Refusal(413, f"a body may have {settings.max_body_bytes:,} bytes", code="body_too_large")
