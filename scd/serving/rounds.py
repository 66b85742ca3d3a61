"""Frames of all sessions: asked for when they are due, handed out when they are done."""

from __future__ import annotations

from scd.common.memory import OutOfMemory
from scd.serving.errors import SessionStopped
from scd.serving.history import as_action
from scd.serving.player import Player
from scd.serving.players import Players
from scd.streaming.session import Finished, Session


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
