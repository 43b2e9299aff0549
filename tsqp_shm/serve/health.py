"""What says how the server is, without asking for a key: nothing of a request is in it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tsqp_shm._version import __version__
from tsqp_shm.modes import MODES
from tsqp_shm.serve.front import Front


async def health(request: Request) -> Response:
    """200 where requests are answered at this moment, else 503 and why."""
    front: Front = request.app.state.front
    unready = front.unready
    body: dict[str, Any] = {"status": "ready" if unready is None else unready.code or "unready", "mode": front.mode}
    if unready is None:
        pads = front.pads()
        if pads is not None:
            # Answers are right from the start: what has no pad the TEE process computes itself.
            body["pads"] = {"stock_rows": pads["stock_rows"], "capacity_rows": pads["capacity_rows"]}
            body["pads"]["is_filling"] = pads["stock_rows"] < pads["capacity_rows"]
    else:
        body["reason"] = unready.message
    return JSONResponse(body, 200 if unready is None else 503, {"Cache-Control": "no-store"})


async def live(request: Request) -> Response:
    """200 as long as the process answers."""
    return JSONResponse({"status": "alive"})


async def version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def session(request: Request) -> Response:
    """What the page shows of the session: mode, what it protects, both processes."""
    front: Front = request.app.state.front
    front.principal(request)
    mode = MODES[front.mode]
    facts = await front.look(front.facts)
    return JSONResponse({"mode": mode.name, "protects": mode.protects, "model": front.model_name, **facts})


async def models(request: Request) -> Response:
    front: Front = request.app.state.front
    front.principal(request)
    return JSONResponse({"object": "list", "data": [_model(front)]})


async def model(request: Request) -> Response:
    front: Front = request.app.state.front
    front.principal(request)
    front.require_model(request.path_params["name"])
    return JSONResponse(_model(front))


def _model(front: Front) -> dict[str, Any]:
    length = front.max_model_len
    return {
        "id": front.model_name,
        "object": "model",
        "created": front.started_s,
        "owned_by": "tsqp-shm",
        **({} if length is None else {"max_model_len": length}),
    }
