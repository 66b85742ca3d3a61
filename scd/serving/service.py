"""What WebSocket and HTTP share: the host and what surrounds it, states, the token, health."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scd import __version__
from scd.models.separable import SeparableConfig
from scd.models.shipped import Clips
from scd.serving.checks import Checks
from scd.serving.errors import HostStopped, PlayError, UnknownSession
from scd.serving.events import Info
from scd.serving.host import Host
from scd.serving.messages import (
    VERSION,
    GuidanceChoice,
    Limits,
    ProtocolError,
    State,
    Welcome,
    WorldInfo,
)
from scd.serving.metrics import Statistics
from scd.serving.settings import ServeConfig
from scd.serving.uploads import Uploads

Result = TypeVar("Result")

STALLED_S = 120.0
"""Silence of the model thread after which the server no longer counts as healthy."""

CODECS = ("jpeg", "h264")
"""Codecs that every server has: both come with the package's own libraries."""

LOG = logging.getLogger("scd.serving")


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether the server can be used."""

    ok: bool
    """It can."""
    reason: str
    """Why not; empty if it can."""


class Service:
    """One host with what surrounds it; for one event loop."""

    def __init__(
        self,
        host: Host,
        config: ServeConfig,
        name: str = "world",
        clips: Clips | None = None,
        token: str | None = None,
        shared: Path | None = None,
    ) -> None:
        """Put the parts together; the host need not have started.

        Args:
            host: of the sessions.
            config: of the server.
            name: of the world, for people.
            clips: that streams may begin with.
            token: that clients must show; None: none.
            shared: folder in which several servers find each other's uploads; None: there is one.

        Raises:
            ValueError: clips that do not fit the world.
        """
        self.host, self.config = host, config
        card = host.world.card
        if clips is not None and clips.frames.shape[-2:] != (card.height, card.width):
            raise ValueError(
                f"clips must be {card.height}x{card.width}, as the world, "
                f"got {clips.frames.shape[-2]}x{clips.frames.shape[-1]}"
            )
        self._token = token
        self.find: Callable[[str], Awaitable[None]] = _find_nowhere
        """Is awaited before a session is asked for: brings it here if another server has it."""
        self.statistics = Statistics(host.overview)
        self.uploads = Uploads(card.height, card.width, card.fps, config.limits, shared)
        self.world = _world_info(host, name, clips)
        self.limits = _limits(config)
        self.checks = Checks(self.world, self.limits, clips, self.uploads)
        self.num_connections = 0

    def welcome(self, request: int | None = None) -> Welcome:
        """Say what is played and within which limits."""
        return Welcome(
            version=VERSION,
            server=f"scd {__version__}",
            world=self.world,
            limits=self.limits,
            codecs=CODECS,
            request=request,
        )

    def check_token(self, token: str | None) -> None:
        """Refuse a stranger (ProtocolError unauthorised)."""
        check_token(self._token, token)

    def health(self) -> Health:
        """Say whether the model thread is there and answers."""
        overview = self.host.overview()
        if not overview.healthy:
            return Health(ok=False, reason=overview.reason or "the model thread is not there")
        if overview.tick_age_s > STALLED_S:
            silence = f"the model thread has been silent for {overview.tick_age_s:.0f} s"
            return Health(ok=False, reason=silence)
        return Health(ok=True, reason="")

    def state(
        self, info: Info, request: int | None = None, forked_from: str | None = None
    ) -> State:
        """Return a session's state as a message."""
        return State(
            session=info.session_id,
            generation=info.generation,
            frame=info.index,
            num_given=info.num_given,
            running=info.running,
            fps=info.fps,
            action=info.action,
            steps=info.num_steps,
            guidance=GuidanceChoice(**vars(info.guidance)),
            seed=info.seed,
            history_from=info.history_from,
            forked_from=forked_from,
            request=request,
        )


def check_token(wanted: str | None, shown: str | None) -> None:
    """Refuse who shows another token than the one that is wanted (ProtocolError unauthorised)."""
    if wanted is None or secrets.compare_digest((shown or "").encode(), wanted.encode()):
        return
    raise ProtocolError("unauthorised", "this server wants its token", fatal=True)


async def answer(future: Future[Result]) -> Result:
    """Wait for the host without blocking the event loop; who gives up waiting cancels nothing."""
    return await asyncio.shield(asyncio.wrap_future(future))


def as_error(error: BaseException, request: int | None = None) -> ProtocolError:
    """Return what a client is told of any error; faults of ours are logged."""
    if isinstance(error, ProtocolError):
        number = error.request if request is None else request
        return ProtocolError(error.code, str(error), error.fatal, number)
    if isinstance(error, PlayError):
        fatal = isinstance(error, HostStopped)
        return ProtocolError(error.code, str(error), fatal, request)
    if isinstance(error, (ValueError, OSError)):
        return ProtocolError("bad_request", str(error), request=request)
    LOG.error("a request failed by a fault of the server", exc_info=error)
    return ProtocolError("fault", f"fault of the server: {type(error).__name__}", request=request)


def check_known(session: str) -> None:
    """Refuse what cannot be a session's id before anybody looks for it (UnknownSession)."""
    if not 1 <= len(session) <= 64 or not session.replace("-", "").replace("_", "").isalnum():
        raise UnknownSession("there is no such session")


async def _find_nowhere(session: str) -> None:
    """There is no other server."""


def _world_info(host: Host, name: str, clips: Clips | None) -> WorldInfo:
    card, config = host.world.card, host.engine.config
    spec = card.conditions
    kinds = ["none"]
    if spec.has_actions or spec.num_labels:
        kinds.append("conditions")
    is_separable = isinstance(config, SeparableConfig)
    if is_separable:
        kinds.append("context_noise")
    return WorldInfo(
        name=name,
        height=card.height,
        width=card.width,
        actions=card.action_names,
        action_dim=spec.action_dim,
        num_labels=spec.num_labels,
        separable=is_separable,
        default_steps=host.world.sampling.num_steps,
        fps=card.fps,
        clips=0 if clips is None else len(clips.frames),
        needs_start=host.engine.needs_first_frame,
        guidance=tuple(kinds),
    )


def _limits(config: ServeConfig) -> Limits:
    shown: dict[str, Any] = {
        name: getattr(config.limits, name)
        for name in Limits.__dataclass_fields__
        if hasattr(config.limits, name)
    }
    return Limits(
        **shown,
        max_fps=config.max_fps,
        queue_frames=config.queue_frames,
        history_frames=config.history_frames,
    )
