"""A host of a tiny world, clients that listen, and the frames that a session has alone."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.data.clip import Conditions, frames_to_pixels, pixels_to_frames
from scd.data.source import DataCard
from scd.engine.open import open_engine
from scd.models.checkpoint import World
from scd.models.config import CacheConfig, SamplingConfig
from scd.models.shipped import Clips
from scd.serving import messages as said
from scd.serving.admission import HostConfig
from scd.serving.host import Host
from scd.serving.messages import Answer, Frame, ServeError
from scd.serving.session import as_action, as_guidance
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
    names = spec.action_names or tuple("abcd"[: spec.num_actions or spec.action_dim])
    card = DataCard(
        height=SHAPE.height, width=SHAPE.width, fps=10.0, conditions=spec, action_names=names
    )
    pixels = PixelAutoencoder(PixelConfig(mean=0.1, std=0.5))
    return World(model, pixels, card, SamplingConfig(num_steps=3))


def make_engine(world, kind="fast", precision="fp32"):
    """A new one each time: an engine is for one thread."""
    return open_engine(world.model, kind, precision)


class Talk(Host):
    """A host with a method for each message; what it returns is for `done`."""

    def say(self, kind, name="", sink=None, pictures=None, file=b"", **fields):
        """Have the host obey a message; `pictures`: the upload that it names."""
        if pictures is not None:
            fields |= {"upload": "some"}
        return self.ask(kind(**fields), name, sink, pictures, file)

    def create(self, pictures=None, sink=None, **beginning):
        """Without a client, unless there is a sink."""
        return self.say(said.Create, "", sink, **given(pictures), **beginning)

    def reset(self, name, pictures=None, **beginning):
        """As `create`."""
        return self.say(said.Reset, name, **given(pictures), **beginning)

    def attach(self, name, sink):
        """Hear a session."""
        return self.say(said.Attach, name, sink, session=name)

    def detach(self, name, sink):
        """Hear it no more."""
        return self.say(said.Detach, name, sink)

    def act(self, name, action, sequence=0):
        """Hold an action."""
        return self.say(said.Action, name, action=action, sequence=sequence)

    def run(self, name, fps=None):
        """Make frames."""
        return self.say(said.Run, name, fps=fps)

    def step(self, name, action=None, count=1):
        """Make some frames."""
        return self.say(said.Step, name, action=action, count=count)

    def acknowledge(self, name, generation, frame):
        """Say that a frame was drawn."""
        return self.say(said.Acknowledge, name, generation=generation, frame=frame)

    def rewind(self, name, frame):
        """Go back."""
        return self.say(said.Rewind, name, frame=frame)

    def fork(self, name, frame=None, seed=None):
        """Copy."""
        return self.say(said.Fork, name, frame=frame, seed=seed)

    def observe(self, name, picture, action=None):
        """Put in a frame."""
        return self.say(said.Observe, name, pictures=picture[None], action=action)

    def frames(self, name, first, count=1):
        """Show the history."""
        return self.say(said.Show, name, frame=first, count=count)

    def restore(self, file):
        """Open a session from a file."""
        return self.say(said.Restore, file=file)

    def set(self, name, **changes):
        """Change how frames are made."""
        return self.say(said.Set, name, **changes)

    def pause(self, name):
        """Make no more frames."""
        return self.say(said.Pause, name)

    def restart(self, name):
        """Begin anew as before."""
        return self.say(said.Restart, name)

    def snapshot(self, name):
        """Return a session as a file."""
        return self.say(said.Snapshot, name)

    def close(self, name):
        """Delete a session."""
        return self.say(said.Close, name)

    def look(self, name):
        """Return how a session stands."""
        return self.say(said.Look, name)

    def is_here(self, name):
        """Say whether a session is in memory or on disk."""
        return self.call(lambda loop: loop.evictions.has(name))

    def release(self, name):
        """Put a session on disk for another host."""
        return self.call(lambda loop: loop.evictions.release(name))


def given(pictures):
    """Fields of a beginning from pictures; none: from nothing."""
    return {} if pictures is None else {"pictures": pictures, "start": "upload"}


def clip_of(pictures, actions):
    """The clips of a world that has one."""
    frames = torch.from_numpy(pictures).movedim(-1, 1)[None]
    return Clips(frames=frames, actions=torch.tensor(actions)[None])


@contextmanager
def hosting(world=None, engine=None, said=None, clips=None, **limits):
    """A host that runs, and is stopped in the end."""
    world = world or make_world()
    report = print if said is None else said.append
    host = Talk(world, engine or make_engine(world), replace(QUICK, **limits), report, clips)
    host.start()
    try:
        yield host
    finally:
        host.stop(WAIT_S)


def done(future):
    """The file, the frames, or the message that comes of a message to a host."""
    answer = future.result(WAIT_S)
    if not isinstance(answer, Answer):
        return answer
    if answer.file is not None:
        return answer.file
    # What is shown again goes with a state.
    new = [frame for frame in answer.frames if not frame.header.shown or answer.message is None]
    return new or answer.message


def refused(future, code, words=None):
    """See that a message is refused with a code, in words."""
    with pytest.raises(ServeError, match=words) as caught:
        done(future)
    assert caught.value.code == code


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
            header = event.header
            self.host.acknowledge(header.session, header.generation, header.frame)

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


def alone(world, engine, actions, given=None, seed=0, num_steps=None, guidance=None):
    """The pixels of a rollout of its own, [t h w 3], after given frames and their actions."""
    sampling = world.sampling if num_steps is None else replace(world.sampling, num_steps=num_steps)
    rollout = Rollout(world, sampling, as_guidance(guidance), seed, None, engine)
    frames, conditions = None, Conditions()
    if given is not None:
        frames = pixels_to_frames(torch.from_numpy(given[0]))[None]
        conditions = Conditions(actions=torch.tensor(given[1])[None])
    rollout.begin(frames, conditions)
    made = [rollout.step(as_action(action, batch=True))[0] for action in actions]
    return frames_to_pixels(torch.stack(made)).numpy()


def equal(frames, pixels):
    """Compare frames of events with pixels, bit for bit."""
    assert len(frames) == len(pixels)
    for frame, wanted in zip(frames, pixels, strict=True):
        np.testing.assert_array_equal(frame.pixels, wanted)
