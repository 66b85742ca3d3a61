"""The HTTP API: sessions without a WebSocket, uploads, snapshots, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from scd.data.clip import pixels_to_frames
from scd.evaluation.media import write_video
from scd.serving.access import Access, error_json
from scd.serving.codec import JpegEncoder, Packed
from scd.serving.connection import frame_header, serve_client
from scd.serving.events import Frame, Info
from scd.serving.messages import (
    Beginning,
    Fork,
    Observe,
    ProtocolError,
    Rewind,
    Set,
    Step,
    read_fields,
)
from scd.serving.service import Service, answer, as_error, check_known

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


BODY_S = 60.0
"""Seconds within which a body must have come."""

SMALL_BODY = 65536
"""Bytes of a body that is JSON."""

MOST_VIDEOS = 1
"""Videos that are written at once."""

Handler = Callable[..., Awaitable[Response]]


def make_router(service: Service) -> APIRouter:
    """Return all routes of one server."""
    router = APIRouter()
    api = HttpApi(service)
    for method, path, handler in (
        ("GET", "/health", api.health),
        ("GET", "/metrics", api.metrics),
        ("GET", "/v1/world", api.world),
        ("POST", "/v1/uploads", api.upload),
        ("POST", "/v1/sessions", api.create),
        ("POST", "/v1/sessions/restore", api.restore),
        ("GET", "/v1/sessions/{session}", api.state),
        ("DELETE", "/v1/sessions/{session}", api.delete),
        ("POST", "/v1/sessions/{session}/step", api.step),
        ("POST", "/v1/sessions/{session}/observe", api.observe),
        ("POST", "/v1/sessions/{session}/set", api.change),
        ("POST", "/v1/sessions/{session}/reset", api.reset),
        ("POST", "/v1/sessions/{session}/restart", api.restart),
        ("POST", "/v1/sessions/{session}/rewind", api.rewind),
        ("POST", "/v1/sessions/{session}/fork", api.fork),
        ("POST", "/v1/sessions/{session}/snapshot", api.snapshot),
        ("GET", "/v1/sessions/{session}/frames/{index}", api.frame),
        ("GET", "/v1/sessions/{session}/video", api.video),
    ):
        router.add_api_route(
            path, _guarded(handler, service), methods=[method], response_model=None
        )
    return router


def _guarded(handler: Handler, service: Service) -> Handler:
    async def guarded(request: Request) -> Response:
        try:
            session = request.path_params.get("session")
            if session is None:
                return await handler(request)
            check_known(session)
            await service.find(session)
            return await handler(request, session)
        except Exception as error:
            said = as_error(error)
            service.statistics.errors.labels(said.code).inc()
            status, body = error_json(said)
            return Response(body, status, media_type="application/json")

    return guarded


class HttpApi:
    """What each route does."""

    def __init__(self, service: Service) -> None:
        """For one server."""
        self._service, self._host, self._checks = service, service.host, service.checks
        self._videos = asyncio.Semaphore(MOST_VIDEOS)

    async def health(self, request: Request) -> Response:
        """Say with a status whether the server can be used, and what it does."""
        health = self._service.health()
        overview = self._host.overview()
        values = {"ok": health.ok, "reason": health.reason, "sessions": overview.num_sessions}
        return _json(values, 200 if health.ok else 503)

    async def metrics(self, request: Request) -> Response:
        """Return all counters as Prometheus reads them."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self._service.statistics.text(), media_type=kind)

    async def world(self, request: Request) -> Response:
        """Return what `welcome` says."""
        return _json(asdict(self._service.welcome()))

    async def upload(self, request: Request) -> Response:
        """Take a picture or a video: its id and number of frames."""
        uploads = self._service.uploads
        uploads.check_room()
        data = await _body(request, self._service.limits.max_upload_bytes)
        identity, num_frames = await uploads.add(data)
        self._service.statistics.uploads.inc()
        return _json({"upload": identity, "frames": num_frames}, 201)

    async def create(self, request: Request) -> Response:
        """Open a session."""
        asked = await _fields(request, Beginning)
        return self._state(await answer(self._host.create(self._checks.beginning(asked))), 201)

    async def restore(self, request: Request) -> Response:
        """Open a session from a snapshot."""
        data = await _body(request, self._service.limits.max_snapshot_bytes)
        return self._state(await answer(self._host.restore(data)), 201)

    async def state(self, request: Request, session: str) -> Response:
        """Say how a session stands."""
        return self._state(await answer(self._host.info(session)))

    async def delete(self, request: Request, session: str) -> Response:
        """End a session."""
        await answer(self._host.delete(session))
        return Response(status_code=204)

    async def step(self, request: Request, session: str) -> Response:
        """Make some frames and return them, each header with its picture."""
        kind = request.query_params.get("format", "jpeg")
        if kind not in ("jpeg", "png"):
            raise ProtocolError("bad_field", f"format: jpeg or png, got {kind[:20]!r}")
        asked = await _fields(request, Step)
        action, count = (
            self._checks.action(asked.action),
            self._checks.count(asked.count),
        )
        frames = await answer(self._host.step(session, action, count))
        for frame in frames:
            self._service.statistics.note_frame(frame)
        packed = await asyncio.to_thread(lambda: [_with_picture(frame, kind) for frame in frames])
        state = asdict(self._service.state(await answer(self._host.info(session))))
        return _json({"frames": packed, "state": state})

    async def observe(self, request: Request, session: str) -> Response:
        """Put in the next frame: the last one of an upload."""
        asked = await _fields(request, Observe)
        frame = self._service.uploads.frames(asked.upload)[-1]
        action = self._checks.action(asked.action)
        return self._state(await answer(self._host.observe(session, frame, action)))

    async def change(self, request: Request, session: str) -> Response:
        """Change how frames are made."""
        asked = await _fields(request, Set)
        steps, guidance = (
            self._checks.steps(asked.steps),
            self._checks.guidance(asked.guidance),
        )
        return self._state(await answer(self._host.change(session, steps, guidance, asked.seed)))

    async def reset(self, request: Request, session: str) -> Response:
        """Begin anew as the body says."""
        start = self._checks.beginning(await _fields(request, Beginning))
        return self._state(await answer(self._host.reset(session, start)))

    async def restart(self, request: Request, session: str) -> Response:
        """Begin anew as before."""
        return self._state(await answer(self._host.reset(session)))

    async def rewind(self, request: Request, session: str) -> Response:
        """Go back to a frame."""
        asked = await _fields(request, Rewind)
        return self._state(await answer(self._host.rewind(session, asked.frame)))

    async def fork(self, request: Request, session: str) -> Response:
        """Copy a session."""
        asked = await _fields(request, Fork)
        info = await answer(self._host.fork(session, asked.frame, asked.seed))
        return self._state(info, 201, forked_from=session)

    async def snapshot(self, request: Request, session: str) -> Response:
        """Return a session as a file."""
        data = await answer(self._host.snapshot(session))
        return Response(data, media_type="application/octet-stream")

    async def frame(self, request: Request, session: str) -> Response:
        """Return a frame of the history as a picture."""
        text = request.path_params["index"]
        if not (text.isascii() and text.isdecimal() and len(text) < 16):
            raise ProtocolError("bad_field", "a frame has a number")
        (frame,) = await answer(self._host.frames(session, int(text)))
        return Response(JpegEncoder().encode(frame.frame).payload, media_type="image/jpeg")

    async def video(self, request: Request, session: str) -> Response:
        """Return the history as an MP4 file."""
        async with self._videos:
            frames = await self._history(session)
            data = await asyncio.to_thread(_as_video, frames, self._service.world.fps)
        return Response(data, media_type="video/mp4")

    async def _history(self, session: str) -> list[np.ndarray]:
        info = await answer(self._host.info(session))
        first, stop = max(0, info.kept_from), info.index + 1
        if first >= stop:
            raise ProtocolError("out_of_history", "the session has no frame yet")
        # Few at a time: others' frames are made between.
        most = min(self._service.limits.max_step_count, 16)
        kept = []
        for begin in range(first, stop, most):
            count = min(most, stop - begin)
            kept += [one.frame for one in await answer(self._host.frames(session, begin, count))]
        return kept

    def _state(self, info: Info, status: int = 200, forked_from: str | None = None) -> Response:
        return _json(asdict(self._service.state(info, forked_from=forked_from)), status)


def _json(values: Any, status: int = 200) -> Response:
    body = json.dumps(values, allow_nan=False)
    return Response(body, status, media_type="application/json")


async def _fields(request: Request, kind: type) -> Any:
    return read_fields(kind, await _body(request, SMALL_BODY))


async def _body(request: Request, max_bytes: int) -> bytes:
    """Read a body, as far as it is allowed to go."""
    too_large = ProtocolError("too_large", f"at most {max_bytes} bytes are taken here")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ProtocolError("too_late", f"the body did not come within {BODY_S:g} s") from None
    return bytes(data)


def _with_picture(frame: Frame, kind: str) -> dict[str, Any]:
    if kind == "jpeg":
        packed = JpegEncoder().encode(frame.frame)
    else:
        file = io.BytesIO()
        Image.fromarray(frame.frame).save(file, "PNG")
        packed = Packed(payload=file.getvalue(), key=True)
    header = asdict(frame_header(frame, False, "jpeg", packed))
    header["codec"] = kind
    return header | {"picture": base64.b64encode(packed.payload).decode()}


def _as_video(frames: list[np.ndarray], fps: float) -> bytes:
    with tempfile.TemporaryDirectory(prefix="scd-") as folder:
        path = Path(folder) / "video.mp4"
        write_video(pixels_to_frames(torch.from_numpy(np.stack(frames))), path, fps)
        return path.read_bytes()
