"""The web server's side of slow and silent connections: each has its time, and they are few.

uvicorn waits for a request's head for ever, and counts a connection that says nothing among those
that are served. Here a connection that waits for a head ends after some seconds, and where very
many wait, the one that has waited longest makes room: who asks at once is always answered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from scd.serving.messages import ServeError
from scd.serving.protocol import error_json

WAITING = 4
"""Connections that may wait for a head, for each WebSocket that there may be; and requests that are
answered at once."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """What connections of one server are given."""

    head_s: float
    """Seconds for the head of a request, from the connection or the answer before on."""
    read_s: float
    """Seconds for which a client may read nothing of its answer."""
    most: int
    """Connections that may wait for a head."""
    waiting: OrderedDict[PatientProtocol, None] = field(default_factory=OrderedDict)
    """Those that do, the one that has waited longest first."""


class PatientProtocol(H11Protocol):
    """HTTP of one connection, each part of which has its time.

    A body has its time from the application, which says so when it is over.
    """

    def __init__(self, *words: Any, patience: Patience, **more: Any) -> None:
        super().__init__(*words, **more)
        self._patience = patience
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        # Of asyncio or of uvloop, whose transports are none of asyncio's by type.
        super().connection_made(transport)
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        patience = self._patience
        self._stop_waiting()
        late = f"a request's head did not come within {patience.head_s:g} s"
        error = ServeError("too_late", late)
        self._head_timer = self.loop.call_later(patience.head_s, self._give_up, error)
        patience.waiting[self] = None
        if len(patience.waiting) > patience.most:
            many = ServeError("overloaded", f"{patience.most} connections wait already")
            next(iter(patience.waiting))._give_up(many)

    def _stop_waiting(self) -> None:
        self._patience.waiting.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self, error: ServeError) -> None:
        """End a connection on which no whole head has come; who has begun one is told why."""
        self._stop_waiting()
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            status, body = error_json(error)
            headers = [("content-type", "application/json"), ("connection", "close")]
            answer = h11.Response(status_code=status, headers=headers)
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._end()

    def _end(self) -> None:
        # What is still to be written would keep a connection open that nobody reads.
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait_for_head()
        super().on_response_complete()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(self._patience.read_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_reading()
        super().resume_writing()

    def _stop_reading(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_reading()
        super().connection_lost(exc)
