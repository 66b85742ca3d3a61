"""A host of a tiny world, clients that listen, and the frames that a session has alone."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from scd.autoencoders.base import PixelAutoencoder, PixelConfig
from scd.data.clip import Conditions, frames_to_pixels, pixels_to_frames
from scd.data.source import DataCard
from scd.engine.open import open_engine
from scd.models.checkpoint import World
from scd.models.flow import SamplingConfig
from scd.models.kv_cache import CacheConfig
from scd.serving.admission import HostConfig
from scd.serving.events import Frame
from scd.serving.host import Host
from scd.serving.session import as_action
from scd.streaming.rollout import Rollout
from tests.tiny import SHAPE, tiny_separable

WAIT_S = 30.0
"""For what comes at once unless something is broken."""
QUICK = HostConfig(max_fps=10_000.0, memory_gib=0.5, idle_s=1000.0, history_frames=12,
                   keyframe_every=4, max_steps=8)  # fmt: skip


@cache
def make_world(make=tiny_separable, **options) -> World:
    model = make(cache=CacheConfig(window=6, num_sinks=1), **options)
    spec = model.config.conditions
    names = tuple("abcd"[: spec.num_actions or spec.action_dim])
    card = DataCard(
        height=SHAPE.height, width=SHAPE.width, fps=10.0, conditions=spec, action_names=names
    )
    pixels = PixelAutoencoder(PixelConfig(mean=0.1, std=0.5))
    return World(model, pixels, card, SamplingConfig(num_steps=3))


def make_engine(world, kind="fast", precision="fp32"):
    """A new one each time: an engine is for one thread."""
    return open_engine(world.model, kind, precision)


@contextmanager
def hosting(world=None, engine=None, said=None, **limits):
    """A host that runs, and is stopped in the end."""
    world = world or make_world()
    report = print if said is None else said.append
    host = Host(world, engine or make_engine(world), replace(QUICK, **limits), report)
    host.start()
    try:
        yield host
    finally:
        host.stop(WAIT_S)


def done(future):
    return future.result(WAIT_S)


class Client:
    """Hears a session, and acknowledges as long as it is told to."""

    def __init__(self, host, acknowledges=True):
        self.host, self.acknowledges = host, acknowledges
        self.events, self._bell = [], threading.Condition()

    def __call__(self, event):
        with self._bell:
            self.events.append(event)
            self._bell.notify_all()
        if self.acknowledges and isinstance(event, Frame):
            self.host.acknowledge(event.session_id, event.generation, event.index)

    @property
    def frames(self):
        return [event for event in list(self.events) if isinstance(event, Frame)]

    def wait(self, is_enough):
        """Return once the client's events are enough."""
        with self._bell:
            assert self._bell.wait_for(lambda: is_enough(self), WAIT_S), self.events

    def wait_frames(self, number):
        self.wait(lambda client: len(client.frames) >= number)
        return self.frames[:number]


def until(condition):
    """Wait for something that happens on another thread."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def alone(world, engine, actions, start=None, seed=0, num_steps=None, guidance=None):
    """The pixels of a rollout of its own, [t h w 3], after the given frames of a start."""
    sampling = world.sampling if num_steps is None else replace(world.sampling, num_steps=num_steps)
    rollout = Rollout(world, sampling, guidance, seed, None, engine)
    frames, conditions = None, Conditions()
    if start is not None:
        frames = pixels_to_frames(torch.from_numpy(start.frames))[None]
        conditions = Conditions(actions=torch.tensor(start.actions)[None])
    rollout.begin(frames, conditions)
    made = [rollout.step(as_action(action, batch=True))[0] for action in actions]
    return frames_to_pixels(torch.stack(made)).numpy()


def equal(frames, pixels):
    """Compare frames of events with pixels, bit for bit."""
    assert len(frames) == len(pixels)
    for frame, wanted in zip(frames, pixels, strict=True):
        np.testing.assert_array_equal(frame.frame, wanted)
