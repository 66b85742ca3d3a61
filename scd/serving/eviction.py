"""Idle sessions leave memory for the disk, and come back when somebody wants them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from scd.common.memory import OutOfMemory
from scd.serving.errors import HostStopped, SessionBusy, TooManySessions, UnknownSession
from scd.serving.events import Evicted, Info
from scd.serving.player import Player
from scd.serving.players import Players
from scd.serving.shelf import Aside, Shelf
from scd.serving.snapshot import Parsed, rebuild
from scd.serving.starts import check_steps

Retry = Callable[[Exception | None], None]
"""Is called when what was waited for is done, or with why it will not be."""

YIELD_S = 5.0
"""After which a session without a client makes room for somebody who needs it."""


def lacks_room(error: Exception) -> bool:
    """Whether something was refused that could be had if another session left memory."""
    return isinstance(error, (TooManySessions, OutOfMemory))


class Evictions:
    """For the model thread; what is slow is done beside it, and a session used meanwhile stays."""

    def __init__(self, players: Players, shelf: Shelf | None, aside: Aside) -> None:
        """Begin with none under way; no shelf: sessions stay in memory."""
        self.players, self.shelf, self._aside = players, shelf, aside
        self.num_evictions = self.num_restores = self.num_failed = 0
        self._waking: dict[str, list[Retry]] = {}

    def lies_here(self, name: str) -> bool:
        """Whether a session is on disk."""
        return self.shelf is not None and name not in self.players.playing and name in self.shelf

    def sweep(self) -> None:
        """Let those go that were idle for long enough."""
        now, idle_s = self.players.clock(), self.players.config.idle_s
        if self.shelf is not None:
            self.shelf.tidy(self.players.playing)
        for player in list(self.players.playing.values()):
            if player.is_idle(now, idle_s):
                self._begin(player, lambda error: None)
            else:
                self._back_up(player, now)

    def _back_up(self, player: Player, now: float) -> None:
        """Write a session that stays in memory, as it is now and without its history."""
        every_s, shelf = self.players.config.backup_s, self.shelf
        is_due = every_s is not None and now - player.written_at >= every_s
        if shelf is None or not is_due or player.is_on_its_way or player.written == player.mark:
            return
        player.is_on_its_way, player.written_at, mark = True, now, player.mark
        image = self.players.image(player, history=False)

        def end(done: Future) -> None:
            player.is_on_its_way = False
            if (error := done.exception()) is None:
                player.written = mark
                return
            self.num_failed += 1
            self.players.report(f"a copy of a session could not be written: {error}")

        self._aside.do(lambda: shelf.put(image), end)

    def release(self, name: str) -> Future[bool]:
        """Put a session on disk now, for another host; False: it is busy for a moment.

        Raises:
            UnknownSession: it is not in memory here.
            SessionBusy: it has a client.
        """
        player = self.players.playing.get(name)
        if player is None:
            raise UnknownSession("there is no session of this name")
        if player.sink is not None:
            raise SessionBusy("another client is attached to this session")
        released: Future[bool] = Future()

        def end(_: Exception | None) -> None:
            released.set_result(name not in self.players.playing)

        if not player.is_idle(self.players.clock(), 0.0) or not self._begin(player, end):
            released.set_result(False)
        return released

    def make_room(self, retry: Retry) -> bool:
        """Let the session go that nobody has wanted for longest; False: there is none to go."""
        now, playing = self.players.clock(), self.players.playing.values()
        idle = [one for one in playing if one.sink is None and one.is_idle(now, YIELD_S)]
        if not idle:
            return False
        return self._begin(min(idle, key=lambda one: one.last_used), retry)

    def _begin(self, player: Player, retry: Retry) -> bool:
        shelf = self.shelf
        if shelf is None or shelf.is_full:
            return False
        player.is_on_its_way, uses = True, player.uses
        image = self.players.image(player)
        self._aside.do(lambda: shelf.put(image), lambda done: self._end(player, uses, done, retry))
        return True

    def _end(self, player: Player, uses: int, done: Future, retry: Retry) -> None:
        shelf, name = self.shelf, player.session_id
        assert shelf is not None
        player.is_on_its_way = False
        if (error := done.exception()) is not None:
            self.num_failed += 1
            # Not again before it has been idle as long once more.
            player.last_used = self.players.clock()
            self.players.report(
                f"an idle session stays in memory, it could not be written: {error}"
            )
            retry(error if isinstance(error, Exception) else None)
            return
        if self.players.playing.get(name) is player and player.uses == uses:
            self._let_go(player)
        retry(None)

    def _let_go(self, player: Player) -> None:
        assert self.shelf is not None
        name = player.session_id
        self.shelf.keep(name)
        self.num_evictions += 1
        event = Evicted(session_id=name, generation=player.generation)
        self.players.leave(player, UnknownSession("the session was put on disk"), event)

    def wake(self, name: str, retry: Retry) -> None:
        """Bring a session back from disk."""
        shelf = self.shelf
        assert shelf is not None
        if name in self._waking:
            self._waking[name].append(retry)
            return
        self._waking[name] = [retry]
        self._aside.do(lambda: shelf.read(name), lambda done: self._wake(name, done))

    def _wake(self, name: str, done: Future[Parsed]) -> None:
        shelf = self.shelf
        assert shelf is not None
        error = done.exception()
        try:
            if error is None:
                self.adopt(done.result(), name)
                shelf.claim(name)
        except Exception as found:
            error = found
            if name in self.players.playing:
                # Somebody else has it; here it was never used.
                self.players.forget(self.players.playing[name])
            elif lacks_room(found) and self.make_room(lambda _: self._wake(name, done)):
                return
        for retry in self._waking.pop(name):
            retry(error if isinstance(error, Exception) else None)

    def adopt(self, parsed: Parsed, name: str | None) -> Info:
        """Go on with a session that was read; under a new name if there is none.

        Raises:
            PlayError: it does not fit this world, or there is no room.
        """
        players, streams = self.players, self.players.streams
        check_steps(parsed.note.num_steps, players.config.max_steps)
        info = players.adopt(
            lambda: rebuild(
                parsed,
                (streams.world, streams.engine, streams.window),
                players.reach,
                players.every,
            ),
            parsed.note.guidance.guidance,
            name,
        )
        self.num_restores += 1
        return info

    def drain(self, reason: str, tell_evicted: bool) -> None:
        """Put all sessions on disk, whatever they do, or end them where that is impossible.

        Args:
            reason: for clients of those that end.
            tell_evicted: clients hear `Evicted`; False: they hear the reason in any case.
        """
        if self.shelf is not None:
            self.shelf.tidy(self.players.playing)
        for player in list(self.players.playing.values()):
            try:
                self.players.drop(player)
                if self.shelf is not None:
                    self.shelf.put(self.players.image(player))
                    if tell_evicted:
                        self._let_go(player)
                        continue
                    self.shelf.keep(player.session_id)
            except Exception as error:
                self.players.report(f"a session is lost, it could not be written: {error}")
            self.players.stop(player, HostStopped(reason))
        if self.shelf is not None:
            self.shelf.end()
