"""The web application of one server: the page, the HTTP API and the WebSocket."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI, Request, Response, WebSocket
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from scd.serving.access import Access, error_json
from scd.serving.connection import serve_client
from scd.serving.http_api import make_router
from scd.serving.protocol import ProtocolError
from scd.serving.service import Service

PAGE = Path(__file__).resolve().parent / "web"
"""Folder of the page."""

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}
"""Media types of the page's files, by the end of their names; others are not served."""


def make_app(service: Service, page: Path = PAGE) -> ASGIApp:
    """Build the application; starting and stopping the host is up to the caller.

    Args:
        service: of the host.
        page: folder of the page. Its files are read now: no path of a client is ever looked up.
    """
    inner = make_inner_app(service, page)
    return Access(inner, service.config, service.statistics, service.check_token)


def make_inner_app(service: Service, page: Path = PAGE) -> ASGIApp:
    """Build what stands behind the check of who may ask; arguments as for `make_app`."""
    files = read_page(page)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(make_router(service))

    async def stream(socket: WebSocket) -> None:
        await serve_client(service, socket)

    app.add_api_websocket_route("/v1/stream", stream)

    async def show(request: Request) -> Response:
        name = request.url.path.removeprefix("/") or "index.html"
        if name not in files:
            return _refused(ProtocolError("unknown_path", "there is no such page"))
        kind, data = files[name]
        return Response(data, media_type=kind)

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = _refused(ProtocolError("unknown_path", f"no such request: {error.detail}"))
        answer.status_code = error.status_code
        return answer

    app.add_exception_handler(HTTPException, refuse)
    app.add_api_route("/{path:path}", show, methods=["GET"], response_model=None)
    return app


def read_page(folder: Path) -> Mapping[str, tuple[str, bytes]]:
    """Read the files of the page: name -> media type and content."""
    return {
        str(path.relative_to(folder)): (KINDS[path.suffix], path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.suffix in KINDS and path.is_file()
    }


def _refused(error: ProtocolError) -> Response:
    status, body = error_json(error)
    return Response(body, status, media_type="application/json")
