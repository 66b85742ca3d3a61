"""Sessions of one case in the steady state: windows full, each at its own step, asking at once."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scd.autoencoders.base import PixelAutoencoder, PixelConfig
from scd.bench.case import Case
from scd.bench.limits import synchronize
from scd.bench.stream import CONTEXT_NOISE, GUIDANCE_SCALE, fill_window
from scd.common.runtime import DTYPES, make_generator
from scd.data.clip import Conditions
from scd.data.source import DataCard
from scd.engine.open import open_engine
from scd.models.checkpoint import World
from scd.streaming.rollout import Guidance
from scd.streaming.sessions import Session, Streams


class NoAutoencoder(PixelAutoencoder):
    """For latents that nothing here can decode: they stay as they are."""

    def __init__(self) -> None:
        super().__init__(PixelConfig())

    def encode(self, frames: Tensor) -> Tensor:
        """Return the frames."""
        return frames

    def decode(self, latents: Tensor) -> Tensor:
        """Return the latents."""
        return latents


@dataclass(kw_only=True)
class Played:
    """What happened while all sessions ran."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from the request for a frame to its pixels, of each frame."""
    seconds: float = 0.0
    """Wall-clock, of all."""
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of each part of each tick, where they were asked for."""


class TimedSessions:
    """The sessions of one case: `first_frame`, or `fill` and then `play` again and again."""

    def __init__(self, case: Case, device: torch.device) -> None:
        """Build the engine; `cold_start_s` says how long that took, the weights being there."""
        self.case, self.device = case, device
        model, autoencoder = case.subject.load(device, DTYPES[case.precision])
        config = model.config
        synchronize(device)
        began = time.perf_counter()
        engine = open_engine(model, case.engine, case.precision, release=True)
        synchronize(device)
        self.cold_start_s = time.perf_counter() - began
        spec = config.conditions
        card = DataCard(
            height=config.shape.height,
            width=config.shape.width,
            fps=10.0,
            conditions=spec,
            action_names=tuple(map(str, range(spec.num_actions or spec.action_dim))),
        )
        world = World(model, autoencoder or NoAutoencoder(), card, case.sampling)
        rows = case.sessions * (1 if case.guidance == "none" else 2)
        self.streams = Streams(world, engine, max_rows=rows, window=case.context)
        self.generator = make_generator(0, "bench", device=device)
        self._asked: dict[Session, float] = {}

    def first_frame(self) -> float:
        """Return the seconds from a new session to its first pixels, all others closed."""
        for session in self.streams.sessions:
            self.streams.close(session)
        synchronize(self.device)
        began = time.perf_counter()
        session = self._open()
        self.streams.request(session, self._action())
        while not self.streams.tick():
            pass
        synchronize(self.device)
        seconds = time.perf_counter() - began
        self.streams.close(session)
        return seconds

    @torch.no_grad()
    def fill(self) -> None:
        """Open all sessions, their windows full, and let them start one after the other."""
        first = self._open()
        fill_window(first.rollout.state, self.streams.engine, self.generator)
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
        self.streams.request(session, self._action())

    def _open(self) -> Session:
        engine = self.streams.engine
        spec, shape = engine.config.conditions, engine.shape
        labels = torch.zeros(1, dtype=torch.long) if spec.num_labels else None
        conditions, frames = Conditions(labels=labels), None
        if engine.needs_first_frame:
            action = self._action()
            actions = None if action is None else action[None, None]
            conditions = Conditions(actions=actions, labels=labels)
            frames = torch.rand(1, *shape.shape) * 2 - 1
        kind = self.case.guidance
        guidance = None
        if kind != "none":
            guidance = Guidance(kind=kind, scale=GUIDANCE_SCALE, context_noise=CONTEXT_NOISE)
        return self.streams.open(frames, conditions, guidance=guidance)

    def _action(self) -> Tensor | None:
        """Return an action, which comes from the machine that the player sits at."""
        spec = self.streams.engine.config.conditions
        if spec.num_actions:
            return torch.randint(spec.num_actions, ())
        return torch.rand(spec.action_dim) * 2 - 1 if spec.action_dim else None
