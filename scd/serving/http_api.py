"""The HTTP API: sessions without a WebSocket, uploads, snapshots, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp

from scd.data.clip import pixels_to_frames
from scd.evaluation.media import write_video
from scd.serving.access import Access
from scd.serving.admission import Counted
from scd.serving.codec import JpegEncoder
from scd.serving.connection import serve_client
from scd.serving.messages import (
    COMMANDS,
    Command,
    Frame,
    Look,
    Restore,
    ServeError,
    Show,
    State,
)
from scd.serving.protocol import error_json, read_body, write
from scd.serving.service import Service, answer, as_error, health_of
from scd.serving.snapshot import bad
from scd.serving.tensors import head_bytes
from scd.serving.worlds import Choice, picture

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
    return Access(inner, service.config, service.metrics, service.check_token)


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
            return _refused(ServeError("unknown_path", "there is no such page"))
        kind, data = files[name]
        return Response(data, media_type=kind)

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = _refused(ServeError("unknown_path", f"no such request: {error.detail}"))
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


def _refused(error: ServeError) -> Response:
    status, body = error_json(error)
    return Response(body, status, media_type="application/json")


SMALL_BODY = 65536
"""Bytes of a body that is JSON."""

MOST_VIDEOS = 1
"""Videos that are written at once."""

Handler = Callable[[Request], Awaitable[Response]]


def make_router(service: Service) -> APIRouter:
    """Return all routes of one server: those of messages, and some of HTTP alone."""
    router = APIRouter()
    api = HttpApi(service)
    routes: dict[str, Handler] = {
        "GET /health": api.health,
        "GET /metrics": api.metrics,
        "GET /v1/world": api.world,
        "GET /v1/worlds": api.worlds,
        "GET /v1/worlds/{name}/picture": api.world_picture,
        "POST /v1/worlds/{name}": api.choose_world,
        "POST /v1/uploads": api.upload,
        "GET /v1/sessions/{session}/frames/{index}": api.frame,
        "GET /v1/sessions/{session}/video": api.video,
    }
    routes |= {kind.route: partial(api.obey, kind) for kind in COMMANDS if kind.route}
    for route, handler in routes.items():
        method, path = route.split()
        router.add_api_route(
            path, _answered(handler, service), methods=[method], response_model=None
        )
    return router


def _answered(handler: Handler, service: Service) -> Handler:
    async def answered(request: Request) -> Response:
        try:
            if "session" in request.path_params:
                await service.reach(request.path_params["session"])
            return await handler(request)
        except asyncio.CancelledError:
            # By the web server, which ends; a trace of it would look like a fault.
            return _refused(ServeError("model_stopped", "the server is stopping", fatal=True))
        except Exception as error:
            said = as_error(error)
            service.metrics.errors.labels(said.code).inc()
            return _refused(said)

    return answered


class HttpApi:
    """What each route does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._videos = asyncio.Semaphore(MOST_VIDEOS)

    async def health(self, request: Request) -> Response:
        """Say with a status whether the server can be used, and what it does."""
        said = health_of(self._service)
        return _json(json.dumps(said), 200 if said["ok"] else 503)

    async def metrics(self, request: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self._service.metrics.text(), media_type=kind)

    async def world(self, request: Request) -> Response:
        return _json(write(self._service.welcome()))

    async def worlds(self, request: Request) -> Response:
        """Say which worlds a player may choose from; none where one is served to many."""
        choice = self._service.choice
        none = {"worlds": [], "current": self._service.host.info.name, "asked": True}
        return _json(json.dumps(none if choice is None else choice.listing()))

    async def world_picture(self, request: Request) -> Response:
        """Send a world's moving picture."""
        self._chooses()
        made = await asyncio.to_thread(picture, request.path_params["name"])
        return Response(made, media_type="image/webp")

    async def choose_world(self, request: Request) -> Response:
        """Have another world opened in place of this one, once this is answered."""
        self._chooses().choose(request.path_params["name"])
        return _json("{}", 202)

    def _chooses(self) -> Choice:
        choice = self._service.choice
        if choice is None:
            raise ServeError("unknown_path", "this server has one world: scd play has a choice")
        return choice

    async def upload(self, request: Request) -> Response:
        """Take a picture or a video: its id and number of frames."""
        uploads = self._service.uploads
        uploads.check_room()
        data = await self._file(request, self._service.limits.max_upload_bytes)
        identity, num_frames = await uploads.add(data)
        self._service.metrics.uploads.inc()
        return _json(json.dumps({"upload": identity, "frames": num_frames}), 201)

    async def obey(self, kind: type[Command], request: Request) -> Response:
        """Have a message obeyed: its fields are the body, its session is in the path."""
        picture = request.query_params.get("format", "jpeg")
        if picture not in ("jpeg", "png"):
            raise ServeError("bad_field", f"format: jpeg or png, got {picture[:20]!r}")
        session = request.path_params.get("session", "")
        file: bytes | bytearray = b""
        if kind is Restore:
            most, check = self._service.limits.max_snapshot_bytes, self._service.host.check_snapshot
            file = await self._file(request, most, check)
            message: Command = Restore()
        else:
            message = read_body(kind, await _body(request, SMALL_BODY))
        asked = self._service.ask(message, session, file=file)
        # The host lets go of it once it is read.
        del file
        found = await answer(asked)
        if kind.status == 204:
            return Response(status_code=204)
        if found.file is not None:
            return _sent(found.file, kind.status)
        assert found.message is not None, "messages without an answer have no route"
        if not found.frames:
            return _json(write(found.message), kind.status)
        for frame in found.frames:
            self._service.metrics.note_frame(frame.header)
        packed = await asyncio.to_thread(
            lambda: [_with_picture(frame, picture) for frame in found.frames]
        )
        values = {"frames": packed, "state": found.message.model_dump(mode="json")}
        return _json(json.dumps(values), kind.status)

    async def _file(
        self, request: Request, max_bytes: int, check: Callable[[bytearray], None] | None = None
    ) -> Counted:
        """Read a file as it comes; `check` refuses it by its head, before the rest is there."""
        under_way = self._service.host.under_way
        data = Counted(under_way)
        if (size := _announced(request)) <= max_bytes:
            under_way.check(size)

        async def put(part: bytes) -> None:
            nonlocal check
            data.add(part)
            if check is not None and (size := _head_bytes(data)) and len(data) >= size:
                await asyncio.to_thread(check, data[:size])
                check = None

        await _receive(request, max_bytes, put)
        return data

    async def frame(self, request: Request) -> Response:
        text = request.path_params["index"]
        if not (text.isascii() and text.isdecimal() and len(text) < 16):
            raise ServeError("bad_field", "a frame has a number")
        (pixels,) = await self._shown(request.path_params["session"], int(text), 1)
        return Response(JpegEncoder().encode(pixels).payload, media_type="image/jpeg")

    async def video(self, request: Request) -> Response:
        async with self._videos:
            frames = await self._history(request.path_params["session"])
            info = self._service.host.info
            # The history has one picture of each frame.
            fps = info.fps / info.pictures_per_frame
            data = await asyncio.to_thread(_as_video, frames, fps)
        return Response(data, media_type="video/mp4")

    async def _history(self, session: str) -> list[np.ndarray]:
        state = (await answer(self._service.ask(Look(), session))).message
        assert isinstance(state, State)
        first, stop = state.kept_from, state.frame + 1
        if first >= stop:
            raise ServeError("out_of_history", "the session has no frame yet")
        # Few at a time: others' frames are made between.
        most = min(self._service.limits.max_step_count, 16)
        kept = []
        for begin in range(first, stop, most):
            kept += await self._shown(session, begin, min(most, stop - begin))
        return kept

    async def _shown(self, session: str, first: int, count: int) -> list[np.ndarray]:
        asked = self._service.ask(Show(frame=first, count=count), session)
        return [frame.pixels for frame in (await answer(asked)).frames]


def _json(body: str, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")


async def _body(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []

    async def put(part: bytes) -> None:
        parts.append(part)

    await _receive(request, max_bytes, put)
    return b"".join(parts)


async def _receive(
    request: Request, max_bytes: int, put: Callable[[bytes], Awaitable[None]]
) -> None:
    """Pass a body on as it comes (ServeError: it is too large).

    How long that may take is up to `Access`, behind which this stands, or the router does.
    """
    too_large = ServeError("too_large", f"at most {max_bytes} bytes are taken here")
    if _announced(request) > max_bytes:
        raise too_large
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise too_large
        await put(part)


def _announced(request: Request) -> int:
    """Return the bytes that a body is said to have; 0: nothing is said."""
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdecimal() else 0


def _head_bytes(data: bytearray) -> int | None:
    try:
        return head_bytes(data)
    except ValueError as error:
        raise bad(str(error)) from None


PART_BYTES = 2**18
"""Of a file, put on the way at once."""


def _sent(data: bytes | bytearray, status: int) -> Response:
    """Return an answer with a file, of which only a part at a time is copied."""

    async def parts() -> AsyncIterator[bytes]:
        for begin in range(0, len(data), PART_BYTES):
            yield bytes(data[begin : begin + PART_BYTES])

    headers = {"content-length": str(len(data))}
    return StreamingResponse(parts(), status, headers, "application/octet-stream")


def _with_picture(frame: Frame, kind: str) -> dict[str, Any]:
    """Return a header with its picture, as JSON has them."""
    if kind == "jpeg":
        payload = JpegEncoder().encode(frame.pixels).payload
    else:
        file = io.BytesIO()
        Image.fromarray(frame.pixels).save(file, "PNG")
        payload = file.getvalue()
    header = frame.header.model_dump(mode="json")
    return header | {"codec": kind, "picture": base64.b64encode(payload).decode()}


def _as_video(frames: list[np.ndarray], fps: float) -> bytes:
    with tempfile.TemporaryDirectory(prefix="scd-") as folder:
        path = Path(folder) / "video.mp4"
        write_video(pixels_to_frames(torch.from_numpy(np.stack(frames))), path, fps)
        return path.read_bytes()
