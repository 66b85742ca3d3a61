"""What a client may ask of a session that is there; on the thread that owns the model."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch
from jaxtyping import UInt8

from scd.data.clip import frames_to_pixels, pixels_to_frames
from scd.models.flow import with_num_steps
from scd.serving.errors import BadRequest, SessionBusy
from scd.serving.events import Action, Frame, Info, Sink
from scd.serving.session import Kept, Order, Player, as_action
from scd.serving.sessions import Players, check_picture, check_seed, check_steps
from scd.streaming.rollout import Guidance, Rollout


class Commands:
    """Calls on one session each; they raise ValueError and leave the session as it was then."""

    def __init__(self, players: Players) -> None:
        """Obey for these sessions."""
        self.players = players

    def info(self, session_id: str) -> Info:
        """Say how a session stands."""
        return self.players.player(session_id).info()

    def attach(self, session_id: str, sink: Sink) -> Info:
        """Let a client hear a session."""
        player = self.players.player(session_id)
        if player.sink not in (None, sink):
            raise SessionBusy("another client is attached to this session")
        player.sink = sink
        player.go_on_from(self.players.clock())
        return player.info()

    def detach(self, session_id: str, sink: Sink) -> None:
        """Let a client go; nothing happens if it is not there."""
        player = self.players.playing.get(session_id)
        if player is not None and player.sink == sink:
            player.use(self.players.clock())
            player.let_go()

    def act(self, session_id: str, action: Action, sequence: int) -> None:
        """Hold an action."""
        player = self.players.player(session_id)
        self._hold(player, action, sequence)

    def _hold(self, player: Player, action: Action, sequence: int) -> None:
        session, steering = player.session, as_action(action)
        session.rollout.check(session.as_batch(steering))
        player.action, player.sequence = action, sequence
        if session.status == "waiting":
            self.players.streams.steer(session, steering)

    def run(self, session_id: str, fps: float | None) -> Info:
        """Make frames until paused."""
        player = self.players.player(session_id)
        if player.sink is None:
            raise BadRequest("only a session with a client runs: attach first, or step it")
        if fps is not None and not 0 < fps < float("inf"):
            raise BadRequest(f"fps must be a finite number above 0, got {fps}")
        if not player.running:
            player.free(self.players.clock())
        player.running, player.fps = True, fps
        return player.info()

    def pause(self, session_id: str) -> Info:
        """Begin no more frames."""
        player = self.players.player(session_id)
        player.running = False
        return player.info()

    def step(
        self, session_id: str, action: Action, count: int, sequence: int
    ) -> Future[list[Frame]]:
        """Pause, and make some frames."""
        player, config = self.players.player(session_id), self.players.config
        if not 1 <= count <= config.max_step_count:
            raise BadRequest(f"count must lie in 1 .. {config.max_step_count}, got {count}")
        if len(player.orders) >= config.max_orders:
            raise BadRequest(f"{len(player.orders)} steps of this session wait already")
        if action is not None:
            self._hold(player, action, sequence)
        player.running = False
        if not player.orders:
            player.free(self.players.clock())
        order = Order(future=Future(), count=count)
        player.orders.append(order)
        return order.future

    def acknowledge(self, session_id: str, generation: int, index: int) -> None:
        """Note what a client has drawn; of an older generation nothing."""
        player = self.players.player(session_id)
        if generation == player.generation:
            was_full = not player.is_heard(self.players.config.queue_frames)
            player.acknowledge(index)
            if was_full:
                player.free(self.players.clock())

    def change(
        self, session_id: str, num_steps: int | None, guidance: Guidance | None, seed: int | None
    ) -> Info:
        """Change how frames are made."""
        player = self.players.player(session_id)
        rollout, sampling = player.session.rollout, None
        if num_steps is not None:
            check_steps(num_steps, self.players.config.max_steps)
            # Of those of the world, as after a reset or an eviction: listed times there and back
            # would be others.
            sampling = with_num_steps(rollout.world.sampling, num_steps)
        if seed is not None:
            check_seed(seed)
        if guidance is not None:
            self._check_guidance(rollout, guidance)
            rollout.guidance = guidance
        rollout.sampling = sampling or rollout.sampling
        rollout.seed = rollout.seed if seed is None else seed
        return player.info()

    def _check_guidance(self, rollout: Rollout, guidance: Guidance) -> None:
        # Made only to see whether this model can give it.
        Rollout(rollout.world, None, guidance, 0, None, rollout.engine)
        if (guidance.kind == "conditions") != (rollout.guidance.kind == "conditions"):
            raise BadRequest("guidance by conditions has a memory of its own: reset with it")
        if guidance.kind != "none" and self.players.config.max_rows < 2:
            raise BadRequest("a guided frame takes 2 rows, max_rows is 1")

    def observe(self, session_id: str, frame: UInt8[np.ndarray, "h w 3"], action: Action) -> Info:
        """Put in a frame from outside."""
        player, card = self.players.player(session_id), self.players.streams.world.card
        if player.running or player.orders:
            raise BadRequest("pause the session before a frame is put in")
        check_picture(frame, (card.height, card.width, 3))
        if action is None:
            action = player.action
        steering = as_action(action)
        player.session.rollout.check(player.session.as_batch(steering))
        self.players.drop(player)
        self.players.streams.observe(
            player.session, pixels_to_frames(torch.from_numpy(frame.copy())), steering
        )
        rollout = player.session.rollout
        assert rollout.newest is not None
        player.history.add(rollout, Kept(latent=rollout.newest, action=action))
        player.go_on_from(self.players.clock())
        return player.info()

    def frames(self, session_id: str, first: int, count: int) -> list[Frame]:
        """Show frames of the history."""
        player = self.players.player(session_id)
        if not 1 <= count <= self.players.config.max_step_count:
            raise BadRequest(
                f"count must lie in 1 .. {self.players.config.max_step_count}, got {count}"
            )
        kept = [player.history.frame(index) for index in range(first, first + count)]
        latents = torch.cat([frame.latent for frame in kept])
        decoded = self.players.streams.world.autoencoder.decode(latents[:, None])[:, 0].float()
        return [
            Frame(
                session_id=session_id,
                generation=player.generation,
                index=first + place,
                action=frame.action,
                sequence=frame.sequence,
                frame=pixels,
                num_steps=frame.num_steps,
            )
            for place, (frame, pixels) in enumerate(
                zip(kept, frames_to_pixels(decoded).cpu().numpy(), strict=True)
            )
        ]
