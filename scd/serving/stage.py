"""What the model thread does in turn: obey calls, make frames, see who is idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

from scd.common.memory import OutOfMemory
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.serving.admission import HostConfig
from scd.serving.commands import Commands
from scd.serving.errors import BadRequest, PlayError, TooManySessions, UnknownSession
from scd.serving.events import HostOverview, Info
from scd.serving.eviction import Evictions, lacks_room
from scd.serving.identity import identity_of
from scd.serving.inbox import Call, Inbox
from scd.serving.players import Players
from scd.serving.rounds import Rounds
from scd.serving.shelf import Aside, Shelf
from scd.serving.snapshot import parse, write
from scd.streaming.sessions import Streams

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
