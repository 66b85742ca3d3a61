"""What WebSocket and HTTP share: the host and what surrounds it, the token, health, errors."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, get_args

from starlette.requests import ClientDisconnect

from scd import __version__
from scd.common.memory import forget_frames
from scd.serving.codec import announced_codec
from scd.serving.host import Host
from scd.serving.messages import (
    Answer,
    Codec,
    Command,
    Limits,
    ServeError,
    Sink,
    Welcome,
)
from scd.serving.metrics import Metrics
from scd.serving.protocol import VERSION
from scd.serving.settings import ServeConfig
from scd.serving.uploads import Uploads
from scd.serving.worlds import Choice

Result = TypeVar("Result")

STALLED_S = 120.0
"""Silence of the model thread after which the server no longer counts as healthy."""

LOG = logging.getLogger("scd.serving")


class Service:
    """One host with what surrounds it; for one event loop."""

    def __init__(
        self,
        host: Host,
        config: ServeConfig,
        token: str | None = None,
        shared: Path | None = None,
    ) -> None:
        """Put the parts together; the host need not have started.

        Args:
            host: of the sessions.
            config: of the server.
            token: that clients must show; None: none.
            shared: folder in which several servers find each other's uploads; None: there is one.
        """
        self.host, self.config, self._token = host, config, token
        self.find: Callable[[str], Awaitable[None]] = _find_nowhere
        """Is awaited before a session is asked for: brings it here if another server has it."""
        self.metrics = Metrics(host.overview)
        card = host.world.card
        self.uploads = Uploads(
            card.height, card.width, card.fps, config.limits, shared, host.under_way
        )
        self.limits = _limits(config)
        self.choice: Choice | None = None
        """Worlds that the player may choose from; None: there is nothing to choose."""
        self.num_connections = 0

    def welcome(self, request: int | None = None) -> Welcome:
        info = self.host.info
        return Welcome(
            version=VERSION,
            server=f"scd {__version__}",
            world=info,
            limits=self.limits,
            codecs=get_args(Codec),
            h264=announced_codec(info.height, info.width, self.limits.max_fps),
            request=request,
        )

    def check_token(self, token: str | None) -> None:
        """Refuse a stranger (ServeError unauthorised)."""
        check_token(self._token, token)

    def fault(self) -> str:
        """Say why the server cannot be used; empty: it can."""
        overview = self.host.overview()
        if not overview.healthy:
            return overview.reason or "the model thread is not there"
        if overview.tick_age_s > STALLED_S:
            return f"the model thread has been silent for {overview.tick_age_s:.0f} s"
        return ""

    async def reach(self, session: str) -> None:
        """Make a session that another server has one of this server.

        Raises:
            ServeError: unknown_session: it cannot be the id of one; session_busy.
        """
        if not 1 <= len(session) <= 64 or not session.replace("-", "").replace("_", "").isalnum():
            raise ServeError("unknown_session", "there is no such session")
        await self.find(session)

    def ask(
        self,
        message: Command,
        session: str = "",
        sink: Sink | None = None,
        file: bytes | bytearray = b"",
    ) -> Future[Answer]:
        """Have the host obey a message, with the upload that it names.

        Raises:
            ServeError: unknown_upload.
        """
        identity = getattr(message, "upload", None)
        upload = None if identity is None else self.uploads.frames(identity)
        return self.host.ask(message, session, sink, upload, file)


def health_of(service: Service) -> dict[str, Any]:
    """Return what /health says: whether a server can be used, and how full it is."""
    reason, all = service.fault(), service.host.overview()
    return {
        "ok": not reason,
        "reason": reason,
        "sessions": all.num_sessions,
        "max_sessions": all.max_sessions,
        "attached": all.num_attached,
        "on_disk": all.num_evicted,
        "max_on_disk": all.max_evicted,
        "disk_bytes": all.evicted_bytes,
        "max_disk_bytes": all.max_evicted_bytes,
    }


def check_token(wanted: str | None, shown: str | None) -> None:
    """Refuse who shows another token than the one that is wanted (ServeError unauthorised)."""
    if wanted is None or secrets.compare_digest((shown or "").encode(), wanted.encode()):
        return
    raise ServeError("unauthorised", "this server wants its token", fatal=True)


async def answer(future: Future[Result]) -> Result:
    """Wait for the host without blocking the event loop; who gives up waiting cancels nothing."""
    waited = asyncio.wrap_future(future)
    # Who gives up does not look at an error that comes later, which asyncio would complain of.
    waited.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(waited)


def as_error(error: BaseException, request: int | None = None) -> ServeError:
    """Return what a client is told of any error; faults of ours are logged, and end there."""
    try:
        return _as_error(error, request)
    finally:
        forget_frames(error)


def _as_error(error: BaseException, request: int | None) -> ServeError:
    if isinstance(error, ServeError):
        number = error.request if request is None else request
        return ServeError(error.code, str(error), error.fatal, number)
    if isinstance(error, ValueError):
        return ServeError("bad_request", str(error), request=request)
    if isinstance(error, ClientDisconnect):
        return ServeError("client_left", "the client left before its request was whole")
    said = type(error).__name__
    if isinstance(error, OSError):
        # Its text names a path, which is for the log alone.
        said = error.strerror or said
    LOG.error("a request failed by a fault of the server", exc_info=error)
    return ServeError("fault", f"fault of the server: {said}", request=request)


async def _find_nowhere(session: str) -> None:
    """There is no other server."""


def _limits(config: ServeConfig) -> Limits:
    values: dict[str, Any] = {**vars(config), **vars(config.limits)}
    return Limits(**{name: values[name] for name in Limits.model_fields})
