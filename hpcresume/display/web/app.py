"""The server behind the page: a few fixed addresses, all relative, all read-only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hpcresume.display.web.access import Gate
from hpcresume.display.web.assets import PAGE, Asset, load_assets
from hpcresume.display.web.patch import difference
from hpcresume.display.web.rooms import Rooms
from hpcresume.display.web.watching import Watched

PING_S = 15.0
_MOST_LOGIN_BYTES = 1000
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def build_app(rooms: Rooms, gate: Gate, *, ping_s: float = PING_S) -> ASGIApp:
    """The page, its files, the login and the streams of events."""
    assets = load_assets()

    async def login(request: Request) -> Response:
        return await _login(request, gate)

    async def events(request: Request) -> Response:
        return await _events(request, gate, rooms, ping_s)

    routes = [
        Route("/", _serving(assets[PAGE])),
        *(Route(f"/static/{name}", _serving(asset)) for name, asset in assets.items()),
        Route("/login", login, methods=["POST"]),
        Route("/events", events),
    ]
    return _Guarded(Starlette(routes=routes), gate)


def _serving(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        headers = {"ETag": asset.tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == asset.tag:
            return Response(status_code=304, headers=headers)
        return Response(asset.content, media_type=asset.media_type, headers=headers)

    return serve


async def _login(request: Request, gate: Gate) -> Response:
    """Turns the token into a cookie."""
    text = b""
    async for part in request.stream():
        text += part
        if len(text) > _MOST_LOGIN_BYTES:
            break
    cookie = gate.opens(text[:_MOST_LOGIN_BYTES].decode(errors="replace").strip())
    if cookie is None:
        return JSONResponse({"error": "This is not the token."}, status_code=403)
    response = Response(status_code=204)
    # Without a path it holds for the folder that this address lies in, whatever stands before it.
    response.set_cookie(gate.cookie_name, cookie, path=None, httponly=True, samesite="strict")
    return response


async def _events(request: Request, gate: Gate, rooms: Rooms, ping_s: float) -> Response:
    if not gate.admits(request.cookies):
        return JSONResponse({"error": "Open the page by the line in the terminal."}, 401)
    run_id = request.query_params.get("run")
    watched = rooms.list if run_id is None else await rooms.run(run_id)
    if watched is None:
        return JSONResponse({"error": "There is no such run here."}, 404)
    return StreamingResponse(
        stream(watched, ping_s),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def stream(watched: Watched, ping_s: float) -> AsyncIterator[str]:
    """The whole first, then what changes; a comment where nothing does, for the proxies between."""
    shown: dict[str, Any] | None = None
    views = watched.views(ping_s)
    try:
        async for seen in views:
            if seen is None:
                yield ": still here\n\n"
            elif shown is None:
                yield _event("whole", seen)
            else:
                yield _event("patch", difference(shown, seen))
            shown = seen or shown
    finally:
        await views.aclose()  # type: ignore[attr-defined]


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n"


class _Guarded:
    """Answers only who asks by a known name, and tells browsers what the page may do: little."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(n.lower().encode(), v.encode()) for n, v in _SECURITY.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not self._gate.knows_host(hosts[0]):
            words = "This server does not go by that name: start it with --allow-host NAME.\n"
            await Response(words, 421)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)
