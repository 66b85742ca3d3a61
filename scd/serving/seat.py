"""One client's place at the host: what it asks, and what the host says to it.

Messages are obeyed in their order. Only those that change which session the client has wait for
the host; of all others the answer comes by itself, so that acknowledgements are read meanwhile.
What the model thread says joins the client's outlet in the order in which it was said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from scd.serving.client_messages import (
    Acknowledge,
    Action,
    Attach,
    Close,
    Create,
    Detach,
    Fork,
    FromClient,
    Hello,
    Pause,
    Reset,
    Restart,
    Rewind,
    Run,
    Set,
    Snapshot,
    Step,
)
from scd.serving.errors import HostStopped
from scd.serving.events import Event, Evicted, Frame, Info, Stopped
from scd.serving.outlet import Outlet
from scd.serving.protocol import ProtocolError, pack
from scd.serving.server_messages import Detached, SnapshotHeader
from scd.serving.server_messages import Evicted as EvictedMessage
from scd.serving.server_messages import Stopped as StoppedMessage
from scd.serving.service import Service, answer, as_error, check_known

MOST_PENDING = 64
"""Calls of one connection that wait for the host; more are refused."""


class Seat:
    """One client's place; see the module."""

    def __init__(self, service: Service, outlet: Outlet) -> None:
        """Begin without a session."""
        self._service, self._host, self._outlet = service, service.host, outlet
        self._checks = service.checks
        self._loop = asyncio.get_running_loop()
        self._num_pending = 0
        self._sink = self._hear

    async def obey(self, message: FromClient) -> None:
        """Ask the host for what a message says.

        Raises:
            ProtocolError, PlayError: it cannot be obeyed; all is as it was.
        """
        # Acknowledgements are let through: they are what others may wait for.
        if self._num_pending >= MOST_PENDING and not isinstance(message, Acknowledge):
            raise ProtocolError("overloaded", f"{MOST_PENDING} messages wait: send fewer")
        match message:
            case Action() | Acknowledge() | Step() | Snapshot():
                self._obey_often(message, self._mine())
            case Create():
                self._check_free()
                asked = self._host.create(self._checks.beginning(message))
                await self._join_new(asked, message.request)
            case Attach():
                self._check_free()
                check_known(message.session)
                await self._service.find(message.session)
                await self._join(message.session, message.request)
            case Fork():
                mine = self._mine()
                asked = self._host.fork(mine, message.frame, message.seed)
                await self._join_new(asked, message.request, forked_from=mine)
                await answer(self._host.detach(mine, self._sink))
            case Detach() | Close():
                await self._end(message)
            case Hello():
                raise ProtocolError("bad_message", "hello was said already")
            case _:
                self._obey_change(message, self._mine())

    def _obey_often(self, message: Action | Acknowledge | Step | Snapshot, session: str) -> None:
        match message:
            case Action(action=action, sequence=sequence):
                action = self._checks.action(action)
                self._outlet.note_action(sequence)
                self._ask(self._host.act(session, action, sequence), message)
            case Acknowledge(generation=generation, frame=frame):
                self._ask(self._host.acknowledge(session, generation, frame), message)
            case Step(action=action, count=count):
                action, count = (
                    self._checks.action(action),
                    self._checks.count(count),
                )
                asked = self._host.step(session, action, count)
                self._ask(asked, message, lambda _: self._tell_state(session, message.request))
            case Snapshot():
                if self._outlet.is_file_waiting:
                    raise ProtocolError("overloaded", "a snapshot is on its way")
                self._outlet.is_file_waiting = True
                header = SnapshotHeader(session=session, request=message.request)
                asked = self._host.snapshot(session)
                asked.add_done_callback(lambda done: self._call(self._note_file, done))
                self._ask(asked, message, lambda data: self._outlet.put(pack(header, data)))

    def _obey_change(self, message: FromClient, session: str) -> None:
        host, request = self._host, message.request

        def state(info: Info) -> None:
            self._put_state(info, request)

        def state_and_newest(info: Info) -> None:
            self._put_state(info, request)
            self._show_newest(info)

        match message:
            case Run(fps=fps):
                self._ask(host.run(session, fps), message, state)
            case Pause():
                self._ask(host.pause(session), message, state)
            case Set(steps=steps, guidance=guidance, seed=seed):
                steps = self._checks.steps(steps)
                asked = host.change(session, steps, self._checks.guidance(guidance), seed)
                self._ask(asked, message, state)
            case Reset():
                asked = host.reset(session, self._checks.beginning(message))
                self._ask(asked, message, state_and_newest)
            case Restart():
                self._ask(host.reset(session), message, state_and_newest)
            case Rewind(frame=frame):
                self._ask(host.rewind(session, frame), message, state_and_newest)
            case _:
                raise AssertionError(f"nothing obeys {message.type}")

    def _mine(self) -> str:
        if self._outlet.session is None:
            raise ProtocolError("no_session", "create or attach a session first")
        return self._outlet.session

    def _check_free(self) -> None:
        if self._outlet.session is not None:
            raise ProtocolError(
                "has_session", "this connection has a session: detach or close it first"
            )

    # The session of this connection

    async def _join_new(
        self, made: Future[Info], request: int | None, forked_from: str | None = None
    ) -> None:
        """Attach to a session that is being made, or delete it."""
        try:
            info = await answer(made)
            await self._join(info.session_id, request, forked_from)
        except BaseException:
            made.add_done_callback(self._delete_made)
            raise

    def _delete_made(self, made: Future[Info]) -> None:
        if not made.cancelled() and made.exception() is None:
            self._host.delete(made.result().session_id)

    async def _join(
        self, session: str, request: int | None, forked_from: str | None = None
    ) -> None:
        before = self._outlet.session, self._outlet.generation
        # Before the host is asked: the first frame may be here before its answer.
        self._outlet.enter(session)
        try:
            info = await answer(self._host.attach(session, self._sink))
        except BaseException:
            self._outlet.enter(*before)
            self._host.detach(session, self._sink)
            raise
        self._put_state(info, request, forked_from)
        self._show_newest(info)

    async def _end(self, message: Detach | Close) -> None:
        mine = self._mine()
        self._outlet.enter(None)
        await answer(self._host.detach(mine, self._sink))
        if isinstance(message, Close):
            await answer(self._host.delete(mine))
        self._outlet.put(Detached(session=mine, request=message.request))

    def leave(self) -> None:
        """Let go of the session, which stays."""
        if self._outlet.session is not None:
            self._host.detach(self._outlet.session, self._sink)
            self._outlet.enter(None)

    # What the host says

    def _ask(
        self,
        future: Future[Any],
        message: FromClient,
        then: Callable[[Any], None] = lambda result: None,
    ) -> None:
        """Go on when the host has answered, in the order of its answers."""
        self._num_pending += 1

        def done(settled: Future[Any]) -> None:
            self._call(self._settle, settled, message.request, then)

        future.add_done_callback(done)

    def _call(self, function: Callable[..., None], *words: Any) -> None:
        # The loop is closed once the server has stopped: then nobody is there to be told.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *words)

    def _settle(
        self, future: Future[Any], request: int | None, then: Callable[[Any], None]
    ) -> None:
        self._num_pending -= 1
        error = ProtocolError("superseded", "given up") if future.cancelled() else None
        error = error or future.exception()
        if error is None:
            then(future.result())
        else:
            self._outlet.refuse(error, request)

    def _hear(self, event: Event) -> None:
        """Be told by the model thread."""
        self._call(self._on_event, event)

    def _on_event(self, event: Event) -> None:
        if event.session_id != self._outlet.session:
            return
        match event:
            case Frame():
                self._service.statistics.note_frame(event)
                self._outlet.put_frame(event, is_shown=False)
            case Stopped():
                self._outlet.enter(None)
                self._outlet.put(StoppedMessage(session=event.session_id, reason=event.reason))
                if not self._host.overview().healthy:
                    self._outlet.fail(as_error(HostStopped(event.reason)))
            case Evicted():
                self._outlet.enter(None)
                self._outlet.put(EvictedMessage(session=event.session_id))

    def _note_file(self, done: Future[bytes]) -> None:
        """Expect no file any more, where there will be none."""
        if done.cancelled() or done.exception() is not None:
            self._outlet.is_file_waiting = False

    def _tell_state(self, session: str, request: int | None) -> None:
        asked = self._host.info(session)
        asked.add_done_callback(lambda done: self._call(self._settle_state, done, request))

    def _settle_state(self, done: Future[Info], request: int | None) -> None:
        self._num_pending += 1
        self._settle(done, request, lambda info: self._put_state(info, request))

    def _put_state(self, info: Info, request: int | None, forked_from: str | None = None) -> None:
        if info.session_id == self._outlet.session:
            self._outlet.generation = info.generation
        self._outlet.put(self._service.state(info, request, forked_from))

    def _show_newest(self, info: Info) -> None:
        """Send the newest frame again, for a picture to be there before the next one is made."""
        if info.index < max(0, info.kept_from):
            return

        def show(done: Future[list[Frame]]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._call(self._show, done.result())

        self._host.frames(info.session_id, info.index).add_done_callback(show)

    def _show(self, frames: list[Frame]) -> None:
        for frame in frames:
            if frame.session_id == self._outlet.session:
                self._outlet.put_frame(frame, is_shown=True)
