"""What the model thread does in turn: obey calls, make frames, see who is idle."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

from scd.common.memory import OutOfMemory
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.serving.admission import HostConfig
from scd.serving.commands import Commands
from scd.serving.errors import (
    BadRequest,
    HostStopped,
    Overloaded,
    PlayError,
    SessionStopped,
    TooManySessions,
    UnknownSession,
)
from scd.serving.events import HostOverview, Info
from scd.serving.session import Player, as_action
from scd.serving.sessions import Players
from scd.serving.snapshot import identity_of, parse, write
from scd.serving.store import Aside, Evictions, Shelf, lacks_room
from scd.streaming.sessions import Finished, Session, Streams


@dataclass(eq=False, kw_only=True)
class Call:
    """Something that the model thread shall do."""

    do: Callable[[Any], Any]
    """Is called with the stage."""
    wakes: str | None = None
    """Session that has to be in memory for it; None: none has to."""
    future: Future[Any] = field(default_factory=Future)
    """Gets what comes of it."""
    num_tries: int = 0
    """How often room was made for it."""

    def succeed(self, value: Any) -> None:
        """Fulfil the future; nothing happens where it is done."""
        try:
            self.future.set_result(value)
        except InvalidStateError:
            pass

    def fail(self, error: BaseException) -> None:
        """Refuse the future; nothing happens where it is done."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            pass


class Inbox:
    """Filled from any thread, emptied by one; once closed, whatever is put in is refused."""

    def __init__(self, max_calls: int) -> None:
        """Begin empty."""
        self.max_calls = max_calls
        self.reason = ""
        self._waiting: deque[Call] = deque()
        # Also those that were taken and are not answered yet.
        self._open: set[Call] = set()
        self._bell = Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, call: Call) -> Future[Any]:
        """Add a call and return its future, which may be refused at once."""
        # A future that waits could be cancelled from outside while it is answered here.
        call.future.set_running_or_notify_cancel()
        with self._bell:
            if self.reason:
                call.fail(HostStopped(self.reason))
            elif len(self._waiting) >= self.max_calls:
                call.fail(Overloaded(f"{self.max_calls} calls wait for the model already"))
            else:
                self._open.add(call)
                self._waiting.append(call)
                self._bell.notify()
                call.future.add_done_callback(lambda _: self._open.discard(call))
        return call.future

    def put_own(self, do: Callable[[], None]) -> None:
        """Add what the host itself wants done, beyond the limit and before all that waits."""
        with self._bell:
            if not self.reason:
                self._waiting.appendleft(Call(do=lambda _: do()))
                self._bell.notify()

    def ring(self) -> None:
        """Wake the thread that waits for a call."""
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
            waiting = [*self._waiting, *self._open]
            self._waiting.clear()
        for call in waiting:
            call.fail(HostStopped(reason))


class Rounds:
    """`ask`, then `tick`, again and again; `next_at` says when, if nothing happens until then."""

    def __init__(self, players: Players) -> None:
        """Make frames for these sessions."""
        self.players = players
        self.num_frames = self._num_begun = 0
        # Asked for, not begun.
        self._asked: dict[Session, Player] = {}

    def next_at(self) -> float:
        """Return when the next frame may begin; infinity: none, unless something is said."""
        queue = self.players.config.queue_frames
        whens = [player.could_begin_at(queue) for player in self.players.playing.values()]
        return min(whens, default=float("inf"))

    def ask(self) -> None:
        """Ask for the frames that are due, first for those whose last one began first."""
        now, queue = self.players.clock(), self.players.config.queue_frames
        playing = self.players.playing.values()
        due = [player for player in playing if player.could_begin_at(queue) <= now]
        # In the order in which they joined, the first would always be ahead of whom they end with.
        for player in sorted(due, key=lambda player: player.num_turn):
            self.players.streams.request(player.session, as_action(player.action))
            self._asked[player.session] = player

    def tick(self) -> None:
        """Bring all frames under way a call of the network further; hand out those that are done.

        Where the device is full in a call that all share, the session that joined last is ended.
        """
        players = self.players
        began = players.clock()
        ends: dict[str, float] = {}

        def lap(part: str) -> None:
            ends[part] = players.clock()
            if part == "encoder":
                self._note_begun(began, ends[part])

        try:
            ended = players.streams.tick(lap)
        except OutOfMemory as error:
            # Those whose own pass failed before are told now: the end of the tick is not reached.
            for one in list(players.playing.values()):
                if one.session.status == "stopped":
                    self._stop(one, one.session.reason)
            under_way = [one for one in players.playing.values() if one.session.status != "idle"]
            if not under_way:
                raise
            players.stop(under_way[-1], SessionStopped(str(error)))
            return
        denoised = ends["decoder"]
        for one in ended:
            self._hand_out(one, denoised, ends.get("autoencoder", denoised))

    def _note_begun(self, began: float, encoded: float) -> None:
        for session, player in list(self._asked.items()):
            if session.status == "waiting":
                continue
            del self._asked[session]
            if session.status == "denoising" and player.session is session:
                self._num_begun += 1
                player.num_turn = self._num_begun
                player.begin(began, encoded, self.players.config.max_fps)

    def _hand_out(self, ended: Finished, denoised: float, decoded: float) -> None:
        players = self.players
        found = [one for one in players.playing.values() if one.session is ended.session]
        if not found:
            # It was told after a tick that was broken off; see there.
            return
        (player,) = found
        if ended.error is not None:
            self._stop(player, ended.error)
            return
        frame = player.finish(ended, denoised, decoded)
        self.num_frames += 1
        fault = player.hand_out(frame, players.clock())
        if fault is not None:
            players.report(f"a client was detached, it raised {type(fault).__name__}: {fault}")

    def _stop(self, player: Player, fault: str) -> None:
        self.players.report(fault)
        self.players.stop(player, SessionStopped(fault))


SLICE_S = 0.005
"""Of a turn for calls, while frames are under way."""
NAP_S = 0.5
"""Longest wait for a call."""
SWEEP_S = 1.0
"""Between two looks for idle sessions."""
MOST_TRIES = 3
"""Sessions that make room for one call."""


class Stage:
    """Everything that one thread alone may touch: `turn` again and again, then `end`."""

    def __init__(
        self,
        world: World,
        engine: Engine,
        config: HostConfig,
        inbox: Inbox,
        report: Callable[[str], None],
    ) -> None:
        """Allocate.

        Raises:
            ValueError: there is not enough memory.
            OSError: the folder for idle sessions cannot be made.
        """
        self.config, self._inbox = config, inbox
        self.identity = identity_of(world, engine)
        streams = Streams(world, engine, max_rows=config.max_rows)
        self.players = Players(streams, config, time.monotonic, report)
        self.commands, self.rounds = Commands(self.players), Rounds(self.players)
        self.aside = Aside(inbox.put_own)
        shelf = None
        if config.evict_dir is not None:
            shelf = Shelf(config.evict_dir, self.identity, config.max_evicted)
        self.evictions = Evictions(self.players, shelf, self.aside)
        self._sweep_at = time.monotonic() + SWEEP_S

    def turn(self) -> None:
        """Obey what was asked meanwhile, begin what is due, and make one call of the network."""
        streams = self.players.streams
        now = time.monotonic()
        wait_s = 0.0 if streams.is_busy else min(self.rounds.next_at() - now, NAP_S)
        self._obey_for(wait_s)
        self.rounds.ask()
        if streams.is_busy:
            self.rounds.tick()
        if time.monotonic() >= self._sweep_at:
            often_s = self.config.backup_s or SWEEP_S
            self._sweep_at = time.monotonic() + min(SWEEP_S, self.config.idle_s, often_s)
            self.evictions.sweep()

    def _obey_for(self, wait_s: float) -> None:
        call = self._inbox.take(wait_s)
        until = time.monotonic() + SLICE_S
        while call is not None:
            self._obey(call)
            call = self._inbox.take(0.0) if time.monotonic() < until else None

    def _obey(self, call: Call) -> None:
        name = call.wakes
        if name is not None and self.evictions.lies_here(name):
            self.evictions.wake(name, lambda error: self._again(call, error))
            return
        try:
            result = call.do(self)
        except Exception as error:
            if lacks_room(error) and call.num_tries < MOST_TRIES:
                call.num_tries += 1
                if self.evictions.make_room(lambda _: self._obey(call)):
                    return
            call.fail(_named(error))
            return
        if isinstance(result, Future):
            result.add_done_callback(lambda done: _pass_on(done, call))
        else:
            call.succeed(result)

    def _again(self, call: Call, error: Exception | None) -> None:
        if error is not None:
            call.fail(_named(error))
        else:
            self._obey(call)

    def snapshot(self, session_id: str, history: bool) -> Future[bytes]:
        """Write a session as a file, beside this thread."""
        image = self.players.image(self.players.player(session_id), history)
        answer: Future[bytes] = Future()
        self.aside.do(lambda: write(image, self.identity), lambda done: _pass_on(done, answer))
        return answer

    def restore(self, data: bytes) -> Future[Info]:
        """Open a session from a file, which is read beside this thread."""
        answer: Future[Info] = Future()

        def adopt(done: Future) -> None:
            try:
                parsed = done.result()
                self.identity.refuse(parsed.identity)
                answer.set_result(self.evictions.adopt(parsed, None))
            except Exception as error:
                if not lacks_room(error) or not self.evictions.make_room(lambda _: adopt(done)):
                    answer.set_exception(_named(error))

        self.aside.do(lambda: parse(data), adopt)
        return answer

    def delete(self, session_id: str) -> None:
        """End a session, in memory or on disk."""
        shelf = self.evictions.shelf
        if shelf is not None and self.evictions.lies_here(session_id):
            shelf.discard(session_id)
            return
        player = self.players.player(session_id)
        self.players.stop(player, UnknownSession("the session was deleted"))
        if shelf is not None:
            shelf.discard(session_id)

    def is_here(self, session_id: str) -> bool:
        """Whether a session is in memory or on disk."""
        return session_id in self.players.playing or self.evictions.lies_here(session_id)

    def overview(self) -> HostOverview:
        """Say how all stands; from any thread, since it only reads, and copies what may grow."""
        players, evictions = self.players, self.evictions
        playing = list(players.playing.values())
        return HostOverview(
            healthy=True,
            reason="",
            num_sessions=len(playing),
            num_running=sum(player.running for player in playing),
            num_attached=sum(player.sink is not None for player in playing),
            num_evicted=0 if evictions.shelf is None else len(evictions.shelf),
            max_sessions=self.config.max_sessions,
            reserved_bytes=players.admission.reserved,
            budget_bytes=players.admission.budget,
            num_frames=self.rounds.num_frames,
            num_dropped=players.num_dropped,
            num_faults=players.num_faults,
            num_evictions=evictions.num_evictions,
            num_restores=evictions.num_restores,
            num_failed_evictions=evictions.num_failed,
        )

    def end(self, reason: str, tell_evicted: bool) -> None:
        """Put all sessions on disk, or end them; see `Evictions.drain`."""
        # Before, since both would write a session that is on its way out.
        self.aside.end()
        self.evictions.drain(reason, tell_evicted)


def _named(error: Exception) -> Exception:
    """Return an error with a code where it is somebody's request that does not fit."""
    if isinstance(error, PlayError):
        return error
    if isinstance(error, OutOfMemory):
        return TooManySessions(str(error))
    return BadRequest(str(error)) if isinstance(error, ValueError) else error


def _pass_on(done: Future, to: Call | Future) -> None:
    error = done.exception()
    if isinstance(to, Future):
        to.set_result(done.result()) if error is None else to.set_exception(error)
    else:
        to.succeed(done.result()) if error is None else to.fail(error)
