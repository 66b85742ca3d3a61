"""Who may ask: the middleware that every request and handshake passes first.

Pages of other origins are refused, and so are names that do not stand for this server: a stranger's
page could otherwise give its own name the address of this machine and be of "the same origin".
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scd.serving.messages import ServeError
from scd.serving.metrics import Metrics
from scd.serving.protocol import error_json
from scd.serving.settings import ServeConfig, is_loopback
from scd.serving.web_server import WAITING

MOST_CALLERS = 4096
"""Callers whose buckets are remembered; beyond, the one that was quiet longest starts afresh."""


class Bucket:
    """Allows `rate` events a second on average, and `burst` at once."""

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin full.

        Args:
            rate: events per second.
            burst: events at once.
            clock: seconds, from any point on.
        """
        self._rate, self._burst, self._clock = rate, max(1.0, burst), clock
        self._level, self._time = self._burst, clock()

    def take(self) -> bool:
        """Return whether one more event is allowed now, and count it if so."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._time) * self._rate)
        self._time = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class Buckets:
    """One bucket for each caller."""

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = lambda: Bucket(rate, burst, clock)
        self._of: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, caller: str) -> bool:
        """Return whether this caller is allowed one more now."""
        bucket = self._of.pop(caller, None) or self._make()
        self._of[caller] = bucket
        if len(self._of) > MOST_CALLERS:
            self._of.popitem(last=False)
        return bucket.take()


GOODBYE = re.compile(r"/v1/sessions/[A-Za-z0-9_-]{16,64}/leave")
"""Path of what a page sends while it is left, when a browser lets it show no token; the id in it is
a secret too."""

HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(:\d{1,5})?")
"""A Host header."""


class Access:
    """Middleware: names, origins, token and rate; and headers that shut the page in."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        metrics: Metrics,
        check_token: Callable[[str | None], None],
    ) -> None:
        """Stand before an application.

        Args:
            app: for those who are let through.
            config: of the server.
            metrics: where requests and refusals are counted.
            check_token: raises where a request shows another token than the server's.
        """
        self._app, self._metrics, self._check_token = app, metrics, check_token
        self._origins = {origin.lower() for origin in config.origins}
        self._hosts = {urlsplit(origin).netloc for origin in self._origins}
        self._local = config.is_local
        self._body_s = config.limits.body_s
        # Sockets beyond those that are served hear why, which takes a moment.
        self._most = {
            "http": WAITING * config.limits.max_connections,
            "websocket": 2 * config.limits.max_connections,
        }
        self._num_open = Counter[str]()
        rate = config.limits.requests_per_s
        self._buckets = Buckets(rate, 4 * rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        try:
            self._check(scope, headers)
        except ServeError as error:
            self._metrics.errors.labels(error.code).inc()
            await _refuse(scope, send, error)
            return
        self._num_open[scope["type"]] += 1
        try:
            if scope["type"] == "websocket":
                await self._app(scope, receive, send)
            else:
                await self._answer(scope, receive, send, headers["host"])
        finally:
            self._num_open[scope["type"]] -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send, host: str) -> None:
        async def send_shut_in(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(str(message["status"])).inc()
                message["headers"] = [*message["headers"], *_shutting_in(host)]
            await send(message)

        await self._app(scope, self._in_time(receive), send_shut_in)

    def _in_time(self, receive: Receive) -> Receive:
        """Return what receives a body as long as that takes no longer than it may."""
        until, is_whole = asyncio.get_running_loop().time() + self._body_s, False

        async def receive_in_time() -> Message:
            nonlocal is_whole
            if is_whole:
                # Who waits for the client to leave may wait.
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                late = f"the body did not come within {self._body_s:g} s"
                raise ServeError("too_late", late) from None
            is_whole = not message.get("more_body", False)
            return message

        return receive_in_time

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "").lower()
        if not HOST.fullmatch(host) or not self._is_ours(host):
            raise ServeError("wrong_host", "this server does not go by the name asked for")
        is_socket = scope["type"] == "websocket"
        changes = is_socket or scope["method"] not in ("GET", "HEAD")
        origin = headers.get("origin", "").lower()
        # Programs send no origin, browsers always do with these.
        if changes and origin and not self._is_same(origin, host):
            raise ServeError("forbidden_origin", "pages of another origin may not use this")
        path = scope["path"]
        # Health is told in any case, and takes no time.
        if path != "/health" and self._num_open[scope["type"]] >= self._most[scope["type"]]:
            raise ServeError("overloaded", "this server is full: try again shortly")
        if not (path.startswith("/v1/") or path == "/metrics"):
            return
        # Handshakes too: each of them is worth a guess of the token.
        if not self._buckets.take(str((scope.get("client") or ("",))[0])):
            raise ServeError("too_many_requests", "too many requests: wait a second")
        if is_socket or GOODBYE.fullmatch(path):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        self._check_token(token if scheme.lower() == "bearer" else None)

    def _is_ours(self, host: str) -> bool:
        if host in self._hosts or not self._local:
            return True
        return is_loopback(host.rpartition(":")[0] if re.search(r":\d+$", host) else host)

    def _is_same(self, origin: str, host: str) -> bool:
        if origin in self._origins:
            return True
        # Compared whole, since an origin that is no URL cannot be taken apart.
        return origin in (f"http://{host}", f"https://{host}")


def _headers(scope: Scope) -> dict[str, str]:
    # The last one of several stands; a Host of several is refused by the server before.
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _shutting_in(host: str) -> list[tuple[bytes, bytes]]:
    """Return headers by which a browser keeps the page to itself and this server."""
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "media-src 'self' blob:; worker-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; connect-src 'self' ws://{host} wss://{host}"
    )
    return [
        (b"content-security-policy", policy.encode("ascii")),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cache-control", b"no-store"),
    ]


async def _refuse(scope: Scope, send: Send, error: ServeError) -> None:
    status, body = error_json(error)
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
