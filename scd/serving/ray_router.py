"""What clients of several replicas meet: one address that speaks the protocol of one server.

A WebSocket is tied to one replica, and messages pass through as they are. It is the replica that
plays the session which the client attaches first; for a new one the replica with fewest clients. A
request about a session goes to the replica that plays it. A replica that is asked for a session of
another one brings it over by itself, so what is known here need not be the newest.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastapi import Request, Response, WebSocket
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from scd.serving.access import Access
from scd.serving.messages import (
    Attach,
    Create,
    Fork,
    ServeError,
    State,
)
from scd.serving.metrics import Metrics, merged
from scd.serving.protocol import (
    CLOSE_CODES,
    error_json,
    read_client,
    read_server,
    refusal,
    write,
)
from scd.serving.ray_replica import LEASE_S, SECRET, Report
from scd.serving.service import LOG, as_error, check_token
from scd.serving.settings import ServeConfig

SESSION = re.compile(r"/v1/sessions/([A-Za-z0-9_-]{1,64})(?:/.*)?")
"""Path of a request about a session."""

POLL_S = 0.5
"""Seconds between two looks at the replicas."""

ENDED = "a replica has ended: attach the session again"

OF_ONE = ("sessions", "max_sessions", "attached")
SHARED = ("on_disk", "max_on_disk", "disk_bytes", "max_disk_bytes")
"""Numbers of a replica's health: those that it has for itself, and those that all have together."""

PASSING = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "upgrade", "te", "date", "authorization")
)
"""Headers that are about one connection, or not for replicas."""


class ReplicaRegistry:
    """The replicas that run, looked at again and again by a thread of its own."""

    def __init__(self, report: Callable[[], list[Report]], lease: Callable[[int], None]) -> None:
        """Prepare; `look` once before it is asked.

        Args:
            report: asks all replicas that take clients; an error leaves all as it was.
            lease: tells Ray Serve for `LEASE_S` seconds how many WebSockets there are.
        """
        self._report, self._lease = report, lease
        self._running: dict[str, Report] = {}
        self._owners: dict[str, Report] = {}
        self._num_clients: Counter[str] = Counter()
        self._looking, self._looked_at = threading.Lock(), float("-inf")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="scd-serve-registry", daemon=True)

    def start(self) -> None:
        self.look()
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(30.0)

    def look(self) -> None:
        """Ask the replicas; who waits for another's look is content with that one."""
        asked = time.monotonic()
        with self._looking:
            if self._looked_at > asked:
                return
            try:
                found = self._report()
            except Exception as error:
                LOG.warning("the replicas do not answer: %s: %s", type(error).__name__, error)
                return
            self._looked_at = time.monotonic()
            self._running = {one.name: one for one in found}
            # One that drains is still the owner of what it plays, until others have it.
            kept = {key: one for key, one in self._owners.items() if one.name not in self._running}
            self._owners = kept | {session: one for one in found for session in one.sessions}
            while len(self._owners) > 10_000:
                self._owners.pop(next(iter(self._owners)))

    def _watch(self) -> None:
        leased_at = float("-inf")
        while not self._over.wait(POLL_S):
            self.look()
            if time.monotonic() - leased_at >= LEASE_S:
                leased_at = time.monotonic()
                with suppress(Exception):
                    self._lease(sum(self._num_clients.values()))

    @property
    def running(self) -> list[Report]:
        """Those that take clients."""
        return list(self._running.values())

    def freest(self) -> Report:
        """Return the replica with fewest clients, and of these the one with fewest sessions.

        One that says of itself that it cannot be used is taken where there is no other: it tells
        clients why.

        Raises:
            ServeError: there is none.
        """
        if not self._running:
            raise ServeError("model_stopped", "no replica is there: try again", fatal=True)
        able = [one for one in self.running if one.health["ok"]]
        return min(
            able or self.running, key=lambda one: (self._num_clients[one.name], len(one.sessions))
        )

    async def owner(self, session: str) -> Report | None:
        """Return the replica that plays a session, as far as is known after a look."""
        if session not in self._owners:
            await asyncio.to_thread(self.look)
        return self._owners.get(session)

    def note(self, session: str, replica: Report) -> None:
        """Note which replica has just said something of a session."""
        self._owners[session] = replica

    def lost(self, replica: Report) -> None:
        self._running.pop(replica.name, None)
        self._owners = {key: one for key, one in self._owners.items() if one.name != replica.name}

    def count(self, replica: Report, change: int) -> None:
        """Note that a client has come (1) or gone (-1)."""
        self._num_clients[replica.name] += change


class Router:
    """The application; one event loop."""

    def __init__(self, registry: ReplicaRegistry, secret: str) -> None:
        self._registry, self._headers = registry, {SECRET: secret}
        self._http: Any = None

    def with_access(self, config: ServeConfig, token: str | None) -> ASGIApp:
        """Return the application behind the check of who may ask, as for one server."""
        self.metrics = Metrics(None)
        return Access(self, config, self.metrics, lambda shown: check_token(token, shown))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or serve a WebSocket until it ends."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] == "websocket":
            if scope["path"] != "/v1/stream":
                await send({"type": "websocket.close", "code": 1000})
                return
            await Pipe(
                self._http, self._headers, self._registry, WebSocket(scope, receive, send)
            ).run()
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except ServeError as error:
            status, body = error_json(error)
            response = Response(body, status, media_type="application/json")
        await response(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Keep connections to replicas from the start of the web server to its end."""
        import aiohttp

        await receive()
        # How many there are in all is bounded by the web server.
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as self._http:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if request.method == "GET" and path == "/health":
            return self._health()
        if request.method == "GET" and path == "/metrics":
            kind = "text/plain; version=0.0.4; charset=utf-8"
            return Response(await self._metrics(), media_type=kind)
        found = SESSION.fullmatch(path)
        session = found.group(1) if found and path != "/v1/sessions/restore" else None
        replica = None if session is None else await self._registry.owner(session)
        try:
            return await self._pass_on(request, replica or self._registry.freest())
        except Unreachable:
            # Nothing was sent yet, so it may be sent to another one.
            try:
                return await self._pass_on(request, self._registry.freest())
            except Unreachable:
                raise ServeError("overloaded", "replicas change: try again") from None

    async def _pass_on(self, request: Request, replica: Report) -> Response:
        import aiohttp
        from yarl import URL

        headers = {name: text for name, text in request.headers.items() if name not in PASSING}
        has_body = "content-length" in headers or "transfer-encoding" in request.headers
        broken_off: list[ServeError] = []

        async def sent() -> AsyncIterator[bytes]:
            try:
                async for part in request.stream():
                    yield part
            except (ServeError, ClientDisconnect) as error:
                # Else it would be told as a fault of the connection to the replica.
                broken_off.append(as_error(error))
                raise

        url = replica.url + request.scope["raw_path"].decode("latin-1")
        if request.url.query:
            url += f"?{request.url.query}"
        try:
            answer = await self._http.request(
                request.method,
                URL(url, encoded=True),
                headers=headers | self._headers,
                data=sent() if has_body else None,
                allow_redirects=False,
            )
        except aiohttp.ClientConnectorError as error:
            self._registry.lost(replica)
            raise Unreachable from error
        except aiohttp.ClientError as error:
            if broken_off:
                raise broken_off[0] from error
            raise ServeError("model_stopped", f"{ENDED} ({type(error).__name__})") from error
        if answer.status == 503 and answer.headers.get(SECRET) == "leaving":
            answer.release()
            self._registry.lost(replica)
            if has_body:
                raise ServeError("overloaded", "replicas change: try again")
            raise Unreachable

        async def body() -> AsyncIterator[bytes]:
            async with answer:
                async for part in answer.content.iter_any():
                    yield part

        kept = {name: text for name, text in answer.headers.items() if name.lower() not in PASSING}
        return StreamingResponse(body(), answer.status, kept)

    def _health(self) -> Response:
        told = [one.health for one in self._registry.running]
        able = [one for one in told if one["ok"]]
        reasons = [one["reason"] for one in told if not one["ok"]]
        values = {
            "ok": bool(able),
            "reason": "" if able else "; ".join(reasons) or "no replica is there",
            "replicas": len(told),
            "failing": len(reasons),
        }
        values |= {name: sum(one[name] for one in told) for name in OF_ONE}
        # Of a folder that they share, in which one may not have seen yet what another has put.
        values |= {name: max((one[name] for one in told), default=0) for name in SHARED}
        return Response(json.dumps(values), 200 if able else 503, media_type="application/json")

    async def _metrics(self) -> bytes:
        async def ask(replica: Report) -> tuple[str, str]:
            async with self._http.get(f"{replica.url}/metrics", headers=self._headers) as answer:
                return replica.name, await answer.text()

        asked = await asyncio.gather(*map(ask, self._registry.running), return_exceptions=True)
        told = [one for one in asked if not isinstance(one, BaseException)]
        return merged([*told, ("router", self.metrics.text().decode())])


class Unreachable(ConnectionError):
    """A replica that has not got the request."""


class Pipe:
    """One client's WebSocket and the one to its replica."""

    def __init__(
        self, http: Any, headers: dict[str, str], registry: ReplicaRegistry, socket: WebSocket
    ) -> None:
        self._http, self._headers, self._registry, self._socket = http, headers, registry, socket
        self._replica: Report | None = None
        self._upstream: Any = None
        self._down: asyncio.Task[tuple[int, str]] | None = None
        self._hello = ""
        self._is_fresh = True

    async def run(self) -> None:
        """Pass messages on until one side ends it."""
        await self._socket.accept()
        with suppress(WebSocketDisconnect, RuntimeError):
            try:
                await self._tie(None)
                await self._pass()
            except ServeError as error:
                await self._socket.send_text(write(refusal(error)))
                await self._socket.close(CLOSE_CODES[error.code], f"{error.code}: {error}"[:120])
            finally:
                await self._untie()

    async def _pass(self) -> None:
        while True:
            incoming = asyncio.ensure_future(self._socket.receive())
            assert self._down is not None
            await asyncio.wait({incoming, self._down}, return_when=asyncio.FIRST_COMPLETED)
            if not incoming.done():
                incoming.cancel()
                await self._socket.close(*self._down.result())
                return
            message = incoming.result()
            if message["type"] == "websocket.disconnect":
                return
            text, data = message.get("text"), message.get("bytes")
            with suppress(ConnectionError):
                # One that has closed says why, which `_down` tells.
                if text is None:
                    await self._upstream.send_bytes(data or b"")
                else:
                    await self._look_at(text)
                    await self._upstream.send_str(text)

    async def _look_at(self, text: str) -> None:
        """Change to the replica of the first session that is attached."""
        if not self._hello:
            self._hello = text
            return
        if not self._is_fresh or not re.search("attach|create|fork", text):
            return
        try:
            message = read_client(text)
        except ServeError:
            return
        self._is_fresh = not isinstance(message, (Attach, Create, Fork))
        if isinstance(message, Attach):
            owner = await self._registry.owner(message.session)
            if owner is not None and self._replica is not None and owner.name != self._replica.name:
                await self._untie()
                await self._tie(owner)

    async def _tie(self, wanted: Report | None) -> None:
        """Connect to a replica, or where it cannot be reached to another; None: any."""
        import aiohttp

        for _ in range(3):
            replica = wanted or self._registry.freest()
            try:
                self._upstream = await self._http.ws_connect(
                    f"{replica.url}/v1/stream",
                    headers=self._headers,
                    max_msg_size=0,
                    autoclose=True,
                )
            except (aiohttp.ClientError, OSError):
                self._registry.lost(replica)
                wanted = None
                continue
            self._replica = replica
            self._registry.count(replica, 1)
            if self._hello:
                await self._upstream.send_str(self._hello)
                # The client has been welcomed already.
                await self._upstream.receive()
            self._down = asyncio.create_task(self._pass_down(self._upstream, replica))
            return
        raise ServeError("model_stopped", "no replica answers: try again", fatal=True)

    async def _untie(self) -> None:
        if self._down is not None:
            self._down.cancel()
            await asyncio.gather(self._down, return_exceptions=True)
            self._down = None
        if self._replica is not None:
            self._registry.count(self._replica, -1)
            self._replica = None
            with suppress(Exception):
                await self._upstream.close()

    async def _pass_down(self, upstream: Any, replica: Report) -> tuple[int, str]:
        """Pass on what the replica says; return the code and reason with which it closes."""
        from aiohttp import WSMsgType

        reason = ""
        while True:
            message = await upstream.receive()
            if message.type is WSMsgType.TEXT:
                said = read_server(message.data)
                if isinstance(said, State):
                    self._registry.note(said.session, replica)
                await self._socket.send_text(message.data)
            elif message.type is WSMsgType.BINARY:
                await self._socket.send_bytes(message.data)
            else:
                if message.type is WSMsgType.CLOSE:
                    reason = message.extra or ""
                code = upstream.close_code
                # Without a word: it was killed. A client comes back as to a server that restarts.
                return (1012, ENDED) if code in (None, 1005, 1006) else (code, reason)
