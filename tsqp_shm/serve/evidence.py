"""GET /v1/evidence/REQUEST_ID: how a request was computed and checked, for who has asked it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tsqp_shm.serve.front import Front
from tsqp_shm.serve.refusal import Refusal


async def evidence(request: Request) -> Response:
    """A file of evidence, as docs/evidence.md has it, of the requests behind one answer."""
    front: Front = request.app.state.front
    numbers = front.receipts_of(request.path_params["request_id"], front.principal(request))
    content = await front.aside(front.evidence_of, numbers)
    if content is None:
        raise Refusal(404, "the request has not ended, or its record is no longer kept", code="not_found")
    return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})
