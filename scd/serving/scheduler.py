"""What the model thread does in turn: obey messages, make frames, see who is idle."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from threading import Condition
from typing import Any

from scd.common.memory import GIB, OutOfMemory, readable
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.models.shipped import Clips
from scd.serving.admission import HostConfig, UnderWay
from scd.serving.commands import Call, Commands
from scd.serving.evictions import Evictions, Seldom, lacks_room
from scd.serving.layout import Layout
from scd.serving.messages import Command, ServeError, WorldInfo
from scd.serving.metrics import HostOverview
from scd.serving.prompts import Prompts
from scd.serving.session import Session, as_action
from scd.serving.sessions import Sessions
from scd.serving.snapshot import fingerprint_of
from scd.serving.store import SessionStore, StoreLimits
from scd.streaming.sessions import Finished, Streams
from scd.streaming.sessions import Session as Stream
from scd.streaming.texts import WorldTexts


class RequestQueue:
    """Filled from any thread, emptied by one; once closed, whatever is put in is refused."""

    def __init__(self, max_calls: int) -> None:
        self.max_calls = max_calls
        self.reason = ""
        self._waiting: deque[Call] = deque()
        # Also those that were taken and are not answered yet.
        self._open: set[Future[Any]] = set()
        self._bell = Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, call: Call) -> Future[Any]:
        """Add a call and return its future, which may be refused at once."""
        # A future that waits could be cancelled from outside while it is answered here.
        call.future.set_running_or_notify_cancel()
        with self._bell:
            if self.reason:
                call.settle(error=_stopped(self.reason))
            elif len(self._waiting) >= self.max_calls:
                many = f"{self.max_calls} calls wait for the model already"
                call.settle(error=ServeError("overloaded", many))
            else:
                self._open.add(call.future)
                self._waiting.append(call)
                self._bell.notify()
                # Not the call, which has the future: one would keep the other, and its file.
                call.future.add_done_callback(self._open.discard)
        return call.future

    def put_own(self, do: Callable[[], None]) -> None:
        """Add what the host itself wants done, beyond the limit and before all that waits."""
        with self._bell:
            if not self.reason:
                self._waiting.appendleft(Call(message=lambda _: do()))
                self._bell.notify()

    def ring(self) -> None:
        with self._bell:
            self._bell.notify()

    def take(self, wait_s: float) -> Call | None:
        """Return the next call, for which to wait at most so long; None: there is none."""
        with self._bell:
            if not self._waiting and wait_s > 0:
                self._bell.wait(wait_s)
            return self._waiting.popleft() if self._waiting else None

    def close(self, reason: str) -> None:
        """Let nothing in any more."""
        with self._bell:
            self.reason = self.reason or reason

    def refuse_all(self, reason: str) -> None:
        """Refuse all that was not answered."""
        with self._bell:
            self._waiting.clear()
            unanswered = list(self._open)
        for future in unanswered:
            with suppress(InvalidStateError):
                future.set_exception(_stopped(reason))


class Scheduler:
    """`ask`, then `tick`, again and again; `next_at` says when, if nothing happens until then."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.num_frames = self._num_begun = 0
        # Asked for, not begun.
        self._asked: dict[Stream, Session] = {}

    def next_at(self) -> float:
        """Return when the next frame may begin; infinity: none, unless something is said."""
        queue = self.sessions.config.queue_frames
        whens = [session.could_begin_at(queue) for session in self.sessions.playing.values()]
        return min(whens, default=float("inf"))

    def ask(self) -> None:
        """Ask for the frames that are due, first for those whose last one began first."""
        now, queue = self.sessions.clock(), self.sessions.config.queue_frames
        playing = self.sessions.playing.values()
        due = [session for session in playing if session.could_begin_at(queue) <= now]
        # In the order in which they joined, the first would always be ahead of whom they end with.
        for session in sorted(due, key=lambda session: session.num_turn):
            self.sessions.streams.request(session.stream, as_action(session.action))
            self._asked[session.stream] = session

    def tick(self) -> None:
        """Bring all frames under way a call of the network further; hand out those that are done.

        Where the device is full in a call that all share, the session that joined last is ended.
        """
        sessions = self.sessions
        began = sessions.clock()
        ends: dict[str, float] = {}

        def lap(part: str) -> None:
            ends[part] = sessions.clock()
            if part == "encoder":
                self._note_begun(began, ends[part])

        try:
            ended = sessions.streams.tick(lap)
        except OutOfMemory as error:
            # Those whose own pass failed before are told now: the end of the tick is not reached.
            for one in list(sessions.playing.values()):
                if one.stream.status == "stopped":
                    self._stop(one, one.stream.reason)
            under_way = [one for one in sessions.playing.values() if one.stream.status != "idle"]
            if not under_way:
                raise
            sessions.stop(under_way[-1], ServeError("session_stopped", str(error)))
            return
        denoised = ends["decoder"]
        for one in ended:
            self._hand_out(one, denoised, ends.get("autoencoder", denoised))

    def _note_begun(self, began: float, encoded: float) -> None:
        for stream, session in list(self._asked.items()):
            if stream.status == "waiting":
                continue
            del self._asked[stream]
            if stream.status == "denoising" and session.stream is stream:
                self._num_begun += 1
                session.num_turn = self._num_begun
                session.begin(began, encoded, self.sessions.config.max_fps)

    def _hand_out(self, ended: Finished, denoised: float, decoded: float) -> None:
        sessions = self.sessions
        found = [one for one in sessions.playing.values() if one.stream is ended.session]
        if not found:
            # It was told after a tick that was broken off; see there.
            return
        (session,) = found
        if ended.error is not None:
            self._stop(session, ended.error)
            return
        self.num_frames += 1
        for frame in session.finish(ended, denoised, decoded):
            sessions.note_fault(session.hand_out(frame, sessions.clock()))

    def _stop(self, session: Session, fault: str) -> None:
        self.sessions.report(fault)
        self.sessions.stop(session, ServeError("session_stopped", fault))


SLICE_S = 0.005
"""Of a turn for calls, while frames are under way."""
NAP_S = 0.5
"""Longest wait for a call."""
SWEEP_S = 1.0
"""Between two looks for idle sessions."""
TRIM_BYTES = 16 * 2**20
"""Of sessions and files that have gone, after which memory is returned, which takes a while."""
KEPT_GIB = 8.0
"""Of sessions on disk, unless told, and more is needed."""
MOST_TRIES = 3
"""Sessions that make room for one call."""


class EngineLoop:
    """Everything that one thread alone may touch: `turn` again and again, then `end`."""

    def __init__(
        self,
        world: World,
        engine: Engine,
        config: HostConfig,
        clips: Clips | None,
        info: WorldInfo,
        requests: RequestQueue,
        report: Callable[[str], None],
        under_way: UnderWay,
        texts: WorldTexts | None = None,
    ) -> None:
        """Allocate.

        Raises:
            ValueError: there is not enough memory.
            OSError: the folder for idle sessions cannot be made.
        """
        self.config, self._requests = config, requests
        fingerprint = fingerprint_of(world, engine)
        streams = Streams(world, engine, max_rows=config.max_rows)
        self.prompts = Prompts(texts, info.prompt, requests.put_own)
        self.sessions = Sessions(streams, config, time.monotonic, report, under_way, self.prompts)
        self.scheduler = Scheduler(self.sessions)
        store = None
        if config.evict_dir is not None:
            store = SessionStore(config.evict_dir, fingerprint, self._store_limits())
        layout = Layout.of((world, engine, streams.window), config.max_start_frames)
        self.evictions = Evictions(self.sessions, store, fingerprint, layout, requests.put_own)
        self.commands = Commands(self.sessions, self.evictions, clips, info)
        self._refused = Seldom(report, time.monotonic)
        self._sweep_at = time.monotonic() + SWEEP_S
        self._num_trimmed = 0

    def _store_limits(self) -> StoreLimits:
        """Return what may lie on disk (ValueError: less than sessions in memory may need)."""
        config, each = self.config, self.sessions.file_bytes()
        # Those in memory may have files too, and one more is written while its old one is there.
        least = min(config.max_sessions * each, self.sessions.admission.budget + each) + each
        if config.kept_gib is None:
            most = max(int(KEPT_GIB * GIB), 2 * least)
        else:
            most = int(config.kept_gib * GIB)
        if most < least:
            raise ValueError(
                f"{readable(least)} on disk may be needed for {config.max_sessions} sessions in "
                f"memory, got kept_gib {config.kept_gib:g}: raise it, or lower the sessions or "
                "history_frames"
            )
        return StoreLimits(
            max_sessions=config.kept_sessions, max_bytes=most, max_age_s=config.kept_s
        )

    def turn(self) -> None:
        """Obey what was said meanwhile, begin what is due, and make one call of the network."""
        streams = self.sessions.streams
        now = time.monotonic()
        wait_s = 0.0 if streams.is_busy else min(self.scheduler.next_at() - now, NAP_S)
        self._obey_for(wait_s)
        self.scheduler.ask()
        if streams.is_busy:
            self.scheduler.tick()
        if time.monotonic() >= self._sweep_at:
            often_s = self.config.backup_s or SWEEP_S
            self._sweep_at = time.monotonic() + min(SWEEP_S, self.config.idle_s, often_s)
            self.evictions.sweep()
            self._trim()

    def _trim(self) -> None:
        """Return memory to the machine once much of it is free."""
        num_freed = self.sessions.admission.num_freed + self.sessions.under_way.num_freed
        if num_freed - self._num_trimmed >= TRIM_BYTES:
            self._num_trimmed = num_freed
            self.evictions.trim()

    def _obey_for(self, wait_s: float) -> None:
        call = self._requests.take(wait_s)
        until = time.monotonic() + SLICE_S
        while call is not None:
            self._obey(call)
            call = self._requests.take(0.0) if time.monotonic() < until else None

    def _obey(self, call: Call) -> None:
        message = call.message
        wakes = isinstance(message, Command) and message.wakes and bool(call.name)
        if wakes and self.evictions.can_wake(call.name):
            self.evictions.wake(call.name, lambda error: self._again(call, error))
            return
        if prompts := self.prompts.missing(message, self.sessions.playing.get(call.name)):
            self.prompts.fetch(prompts, lambda error: self._again(call, error))
            return
        try:
            result = self._done(message, call)
        except Exception as error:
            self._refuse(call, error)
            return
        if isinstance(result, Future):
            result.add_done_callback(lambda done: self._pass_on(done, call))
        else:
            call.settle(result)

    def _done(self, message: Command | Callable[[Any], Any], call: Call) -> Any:
        if not isinstance(message, Command):
            return message(self)
        is_here = call.name in self.sessions.playing
        session = self.sessions.get(call.name) if is_here else None
        return self.commands.handle(session, message, call)

    def _refuse(self, call: Call, error: Exception) -> None:
        """Refuse a call, unless a session makes room for it."""
        if lacks_room(error) and call.num_tries < MOST_TRIES:
            call.num_tries += 1
            if self.evictions.make_room(lambda _: self._obey(call)):
                return
        if lacks_room(error):
            self._refused.note(1, lambda: f"calls were refused for lack of room, the last: {error}")
        call.settle(error=_named(error))

    def _again(self, call: Call, error: Exception | None) -> None:
        if error is not None:
            call.settle(error=_named(error))
        else:
            self._obey(call)

    def _pass_on(self, done: Future[Any], call: Call) -> None:
        error = done.exception()
        if error is None:
            call.settle(done.result())
        else:
            call.settle(error=_named(error) if isinstance(error, Exception) else error)

    def overview(self) -> HostOverview:
        """Say how all stands; from any thread, since it only reads, and copies what may grow."""
        sessions, evictions = self.sessions, self.evictions
        playing, store = list(sessions.playing.values()), evictions.store
        kept: dict[str, Any] = {}
        if store is not None:
            kept = {
                "num_evicted": len(store),
                "max_evicted": store.limits.max_sessions,
                "evicted_bytes": store.num_bytes,
                "max_evicted_bytes": store.limits.max_bytes,
                "num_expired": store.num_expired,
            }
        return HostOverview(
            healthy=True,
            num_sessions=len(playing),
            num_running=sum(session.running for session in playing),
            num_attached=sum(session.sink is not None for session in playing),
            max_sessions=self.config.max_sessions,
            reserved_bytes=sessions.admission.reserved,
            budget_bytes=sessions.admission.budget,
            under_way_bytes=sessions.under_way.held,
            under_way_budget_bytes=sessions.under_way.budget,
            num_frames=self.scheduler.num_frames,
            num_dropped=sessions.num_dropped,
            num_faults=sessions.num_faults,
            num_evictions=evictions.num_evictions,
            num_restores=evictions.num_restores,
            num_failed_evictions=evictions.num_failed,
            **kept,
        )


def _stopped(reason: str) -> ServeError:
    return ServeError("model_stopped", reason, fatal=True)


def _named(error: Exception) -> Exception:
    """Return an error with a code where it is somebody's request that does not fit."""
    if isinstance(error, ValueError):
        # Nobody reads where it came from, which holds what is under way, and often itself.
        error = error.with_traceback(None)
        error.__cause__ = error.__context__ = None
    if isinstance(error, OutOfMemory):
        return ServeError("too_many_sessions", str(error))
    if isinstance(error, ValueError) and not isinstance(error, ServeError):
        return ServeError("bad_request", str(error))
    return error
