"""Streams of one case in the steady state: windows are full, and every frame evicts another."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.bench.case import Case
from scd.common.runtime import STREAM_DTYPES, make_generator, synchronize
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.engine.open import open_engine
from scd.models.config import Guidance
from scd.models.separable import SeparableState
from scd.streaming.rollout import Rollout
from scd.streaming.sessions import Session, Streams

GUIDANCE_SCALE, CONTEXT_NOISE = 1.5, 0.05
"""Of guided cases; speed does not depend on them. Source: paper (sampling)."""


class Timed:
    """The world and the engine of one case, and rollouts of them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        """Build the engine; `cold_start_s` says how long that took, the weights being there."""
        self.case, self.device = case, device
        self.world = case.subject.load(device, STREAM_DTYPES[case.precision])
        self.world.sampling = case.sampling
        synchronize(device)
        began = time.perf_counter()
        self.engine = open_engine(self.world.model, case.engine, case.precision, release=True)
        synchronize(device)
        self.cold_start_s = time.perf_counter() - began
        self.generator = make_generator(0, "bench", device=device)

    def begun(self, batch: int = 1) -> Rollout:
        """Begin streams: from nothing, or from one random frame where the model needs one."""
        kind, spec = self.case.guidance, self.engine.config.conditions
        guidance = None
        if kind != "none":
            guidance = Guidance(kind=kind, scale=GUIDANCE_SCALE, context_noise=CONTEXT_NOISE)
        rollout = Rollout(
            self.world, guidance=guidance, window=self.case.context, engine=self.engine
        )
        labels = torch.zeros(batch, dtype=torch.long) if spec.num_labels else None
        text = self._noise(batch, spec.text_length, spec.text_dim) if spec.has_text else None
        steering, latents = Conditions(labels=labels, text=text, null_text=text), None
        if self.engine.needs_first_frame:
            latents = self._noise(batch, 1, *self.engine.shape.shape)
            actions = self.actions(batch)
            steering = replace(steering, actions=None if actions is None else actions[:, None])
        rollout.begin(
            conditions=steering,
            batch=batch,
            can_reset=False,
            latents=latents,
        )
        return rollout

    def actions(self, batch: int) -> Tensor | None:
        """Draw actions [b] or [b a], which come from the machine that the player sits at."""
        spec = self.engine.config.conditions
        if spec.num_actions:
            return torch.randint(spec.num_actions, (batch,))
        if spec.action_parts:
            return torch.tensor([spec.idle_action]).expand(batch, -1)
        return torch.rand(batch, spec.action_dim) * 2 - 1 if spec.action_dim else None

    def _noise(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.device)
        return drawn.to(self.engine.dtype)


class TimedStreams(Timed):
    """A rollout of one case: `begin` or `fill`, then `frame` or `latents` again and again."""

    rollout: Rollout

    def begin(self) -> None:
        """Start from nothing, or from one random frame where the model needs one."""
        self.rollout = self.begun(self.case.batch)

    def fill(self) -> None:
        """Fill the window with random keys and values, as if so many frames lay behind."""
        self.begin()
        fill_window(self.rollout.state, self.engine, self.generator)

    def frame(self) -> Float[Tensor, "b t c h w"]:
        """Make the next frame of all streams; on a GPU nothing waits between its parts."""
        actions = self.actions(self.case.batch)
        return self.rollout.generate(None if actions is None else actions[:, None], 1)

    def frame_in_parts(self) -> Float[Tensor, "b t c h w"]:
        """Make the next frame of all streams, whose parts `rollout.timing` tells."""
        return self.rollout.step_video(self.actions(self.case.batch))

    def latents(self) -> Tensor:
        """Make the latents of the next frame of all streams, and no pixels."""
        return self.rollout.step_latents(self.actions(self.case.batch))


@dataclass(kw_only=True)
class Played:
    """What happened while all sessions ran."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from the request for a frame to its pixels, of each frame."""
    seconds: float = 0.0
    """Wall-clock, of all."""
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of each part of each tick, where they were asked for."""


class TimedSessions(Timed):
    """Sessions of one case, each at its own step: `first_frame`, or `fill` and then `play`."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        rows = case.sessions * (1 if case.guidance == "none" else 2)
        self.streams = Streams(self.world, self.engine, max_rows=rows, window=case.context)
        self._asked: dict[Session, float] = {}

    def first_frame(self) -> float:
        """Return the seconds from a new session to its first pixels, all others closed."""
        for session in self.streams.sessions:
            self.streams.close(session)
        synchronize(self.device)
        began = time.perf_counter()
        session = self.streams.adopt(self.begun())
        self._ask(session)
        while not self.streams.tick():
            pass
        synchronize(self.device)
        seconds = time.perf_counter() - began
        self.streams.close(session)
        return seconds

    @torch.no_grad()
    def fill(self) -> None:
        """Open all sessions, their windows full, and let them start one after the other."""
        first = self.streams.adopt(self.begun())
        fill_window(first.rollout.state, self.engine, self.generator)
        sessions = [first]
        for seed in range(1, self.case.sessions):
            sessions.append(self.streams.fork(first, seed))
        ticks = 0
        for number, session in enumerate(sessions):
            # Spread over the calls of one frame.
            while ticks * self.case.sessions < number * first.num_calls:
                self._tick(None)
                ticks += 1
            self._ask(session)

    def play(self, num_frames: int, seconds: float, timed_parts: bool = False) -> Played:
        """Let the sessions run, each asking for its next frame when it has one.

        Args:
            num_frames: frames of all sessions together, after which to stop.
            seconds: after which to stop, once each session can have had one.
            timed_parts: wait for the device after each part of a tick, and say how long it took.
        """
        played = Played()
        synchronize(self.device)
        began = time.perf_counter()
        while len(played.latencies) < num_frames:
            enough = len(played.latencies) >= self.case.sessions
            if enough and time.perf_counter() - began > seconds:
                break
            played.latencies += self._tick(played if timed_parts else None)
        synchronize(self.device)
        played.seconds = time.perf_counter() - began
        return played

    def _tick(self, played: Played | None) -> list[float]:
        """Make a tick, ask again for whom it finished, and return their latencies."""
        last = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal last
            if played is not None:
                synchronize(self.device)
                now = time.perf_counter()
                played.parts[part].append(now - last)
                last = now

        ended = self.streams.tick(lap)
        if not ended:
            return []
        synchronize(self.device)
        now, latencies = time.perf_counter(), []
        for one in ended:
            assert one.error is None, one.error
            latencies.append(now - self._asked.pop(one.session))
            self._ask(one.session)
        return latencies

    def _ask(self, session: Session) -> None:
        self._asked[session] = time.perf_counter()
        actions = self.actions(1)
        self.streams.request(session, None if actions is None else actions[0])


@torch.no_grad()
def fill_window(state: Any, engine: Engine, generator: torch.Generator) -> None:
    """Give streams that just began a full window of random keys and values."""
    cache = state.cache
    num_layers, *shape = cache.keys.shape
    like = {"device": engine.device, "dtype": engine.dtype}
    k, v = (torch.empty(shape, **like).normal_(generator=generator) for _ in range(2))
    first = state.next_position
    cache.reset()
    for layer in range(num_layers):
        cache.write(layer, k, v)
    cache.advance(list(range(first, first + cache.config.window)))
    state.next_position = first + cache.config.window
    if isinstance(state, SeparableState):
        shape = (cache.batch, 1, *engine.shape.shape)
        state.newest = torch.randn(
            shape, generator=generator, device=engine.device, dtype=engine.dtype
        )
