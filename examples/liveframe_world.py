"""A world of ours before the instruments of LiveFrame, which measures interactive worlds.

    pip install "liveframe[world]==0.3.1"
    liveframe world run examples/liveframe_world.py:ShippedWorld --suite quick
    liveframe world run examples/liveframe_world.py:ShippedWorld --suite soak

SCD_WORLD in the environment names another world, folder or run that carries clips. Streams begin
with the world's first clip: a picture of LiveFrame's own scenes shows nothing that it knows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from liveframe.engine import NativeFrame  # type: ignore
from liveframe.world.backend import WorldBackendError, WorldCapabilities  # type: ignore

import scd
from scd.common.runtime import cpu_threads
from scd.data.clip import frames_to_pixels
from scd.engine.open import open_engine, stream_threads

TOKENS = {
    "W": ("gas", "forward", "up"),
    "S": ("brake", "down"),
    "A": ("left",),
    "D": ("right",),
    "L": ("left",),
    "R": ("right",),
    "U": (),
    "N": (),
    "0": (),
}
"""LiveFrame's actions, and names of which a world may have one for it; else it does nothing."""

IDLE = ("nothing", "none", "noop")
"""Names of the action that does nothing."""


FASTEST = 60
"""Frames per second at most, as a screen shows them: a stream that is over sooner than it could be
seen has no real time to be judged by."""


class ShippedWorld:
    """A world as LiveFrame's backend: one frame of it is one chunk."""

    def __init__(self) -> None:
        self.world = scd.load(os.environ.get("SCD_WORLD", "cars"))
        if not self.world.clips:
            raise WorldBackendError("the world carries no clip to begin from")
        names = list(self.world.card.action_names)
        idle = next((names.index(name) for name in IDLE if name in names), 0)
        self.ids = {
            token: next((names.index(word) for word in words if word in names), idle)
            for token, words in TOKENS.items()
        }
        self.rollout: Any = None
        self.index = 0

    @property
    def capabilities(self) -> WorldCapabilities:
        card = self.world.card
        return WorldCapabilities(
            name=f"scd-{self.world.folder.name if self.world.folder else 'world'}",
            interaction_mode="interactive",
            native_fps=card.fps,
            chunk_frames=1,
            resolution=(card.height, card.width),
            actions=frozenset(TOKENS),
            supports_seed=True,
        )

    def load(self) -> None:
        """Lay the model out for this machine."""
        self.engine = open_engine(self.world.model, "fast")

    def reset(self, image: Any, prompt: str | None, seed: int) -> None:
        """Begin with the world's own clip; the picture and the prompt are not used."""
        self.rollout = scd.Rollout(self.world, seed=seed, engine=self.engine)
        self.rollout.begin(self.world.clips[0])
        self.index = 0
        self.due = time.perf_counter()

    def step(self, actions: Sequence[str]) -> Iterator[NativeFrame]:
        """Make the next frame; of several keys the first one that means something counts."""
        if self.rollout is None:
            raise WorldBackendError("step before reset")
        idle = self.ids["0"]
        time.sleep(max(0.0, self.due - time.perf_counter()))
        self.due = max(self.due, time.perf_counter()) + 1 / FASTEST
        held = next((self.ids[one] for one in actions if self.ids[one] != idle), idle)
        with cpu_threads(stream_threads("auto", self.world.model.config)):
            frame = self.rollout.step(torch.tensor([held]))
        pixels = np.ascontiguousarray(frames_to_pixels(frame).numpy())
        yield NativeFrame(index=self.index, payload=pixels, native_frame_count=1, metadata={})
        self.index += 1

    def run_script(self, script: Any) -> Iterator[NativeFrame]:
        raise WorldBackendError("this world is interactive: it has step alone")

    def close(self) -> None:
        self.rollout = None
