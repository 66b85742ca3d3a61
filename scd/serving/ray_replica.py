"""One replica of a world on Ray Serve: a host and its web server, for clients that a router sends.

Ray Serve starts, watches and ends it; frames do not pass through Ray. All replicas share a folder
of sessions. One that is asked for here and lies in the memory of another, without a client, is put
there by that one and goes on here; so does what a killed replica had written.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from scd.serving.http_api import make_inner_app
from scd.serving.messages import ServeError
from scd.serving.run import STOP_S, Server, open_service, uvicorn_config
from scd.serving.service import answer, health_of
from scd.serving.settings import ServeConfig
from scd.serving.store import OWN, SUFFIX

SECRET = "x-scd-secret"
"""Header by which a replica knows that a request comes from here."""

LEASE_S = 2.0
"""Seconds for which a call to Ray Serve stands for one WebSocket."""

FIND_S, RETRY_S = 0.6, 0.1
"""Seconds for which a session is looked for, and between two looks."""

LEAVING_S = 10.0
"""Seconds for which a session is waited for that lies in the folder of a replica: that one may be
ending, and is writing what it plays."""

ASK_S = 3.0
"""Seconds that other replicas have to answer."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a replica says of itself."""

    name: str
    """Machine and process."""
    url: str
    """Where it answers this process, which shows the secret."""
    sessions: tuple[str, ...]
    """In its memory."""
    health: Mapping[str, Any]
    """What its own /health says."""


class Replica:
    """What Ray Serve runs; its public methods are called by the router and by other replicas."""

    def __init__(self, config: ServeConfig, folder: str, secret: str, host: str) -> None:
        """Load the world and begin to answer.

        Args:
            config: of the server, with the token itself.
            folder: that all replicas share.
            secret: that requests must show.
            host: address to listen on; empty: that of this machine in the cluster.

        Raises:
            OSError, ValueError: as `scd.serving.run.open_service`.
        """
        import ray

        self._folder, self._leaving = Path(folder), False
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        host = host or ray.util.get_node_ip_address()
        self._service = open_service(config, self._folder, self._folder / "uploads")
        self._service.find = self._find
        self._service.host.start()
        app = SecretMiddleware(make_inner_app(self._service), secret, lambda: self._leaving)
        self._listener = socket.create_server((host, 0))
        self._url = f"http://{host}:{self._listener.getsockname()[1]}"
        self._server = Server(uvicorn_config(config, app), lambda: None)
        self._thread = threading.Thread(
            target=lambda: self._server.run(sockets=[self._listener]), daemon=True
        )
        self._thread.start()
        self._peers: Any = None

    async def report(self) -> dict[str, Any]:
        # Without waiting for the model thread, which may be the one that has a fault.
        sessions, health = self._service.host.playing(), health_of(self._service)
        return asdict(Report(name=self._name, url=self._url, sessions=sessions, health=health))

    async def release(self, session: str) -> str:
        """Put a session on disk for another replica; say what came of it."""
        released = self._service.host.call(lambda loop: loop.evictions.release(session))
        try:
            return "released" if await answer(released) else "later"
        except ServeError as error:
            return error.code

    async def lease(self, seconds: float) -> None:
        """Be an ongoing request for so long, for Ray Serve to count."""
        await asyncio.sleep(seconds)

    def check_health(self) -> None:
        """Raise if Ray Serve shall start another replica in place of this one."""
        fault = self._service.fault()
        if fault or not self._thread.is_alive():
            raise RuntimeError(fault or "its web server has ended")

    async def __del__(self) -> None:
        """Write all sessions, tell their clients, and end."""
        self._leaving = True
        await asyncio.to_thread(self._service.host.stop, STOP_S)
        self._server.should_exit = True
        await asyncio.to_thread(self._thread.join, STOP_S)

    async def _find(self, session: str) -> None:
        """Bring a session here, if it is in another replica's memory.

        Raises:
            ServeError: session_busy: it has a client there.
        """
        until = time.monotonic() + FIND_S
        latest = until + LEAVING_S
        host = self._service.host
        while not await answer(host.call(lambda loop: loop.evictions.has(session))):
            said = await self._ask_peers(session)
            if "session_busy" in said:
                raise ServeError("session_busy", "another client is attached to this session")
            now = time.monotonic()
            is_coming = "later" in said or "released" in said or self._is_being_played(session)
            if now > (latest if is_coming else until):
                return
            await asyncio.sleep(RETRY_S)

    async def _ask_peers(self, session: str) -> list[object]:
        if self._peers is None:
            from ray import serve

            here = serve.get_replica_context()
            self._peers = serve.get_deployment_handle(here.deployment, here.app_name)
        try:
            asked = self._peers.broadcast("release", session)
            return await asked.results_async(timeout_s=ASK_S, return_exceptions=True)
        except Exception:
            # Some do not answer, or have just gone: then the folder tells.
            return []

    def _is_being_played(self, session: str) -> bool:
        # Looked up in what is there: what a client says becomes no path.
        written = self._folder.glob(f"{OWN}*/*{SUFFIX}")
        return any(path.name == f"{session}{SUFFIX}" for path in written)


class SecretMiddleware:
    """Middleware that lets only the router in, and nobody once the replica is leaving."""

    def __init__(self, app: ASGIApp, secret: str, is_leaving: Any) -> None:
        self._app, self._secret, self._is_leaving = app, secret.encode(), is_leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        shown = dict(scope["headers"]).get(SECRET.encode(), b"")
        if not secrets.compare_digest(shown, self._secret):
            await Response(status_code=403)(scope, receive, send)
        elif self._is_leaving():
            await Response(status_code=503, headers={SECRET: "leaving"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)
