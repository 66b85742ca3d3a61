"""An environment whose pictures tell all of it: what was done, in which step, of which episode."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

STEPS, ACTION, EPISODE = 0, 1, 2
"""Rows of the picture, and how bright each is."""


class Drawn(gymnasium.Env):
    """Ends after a number of steps that its seed says.

    Args:
        ends: "terminated", "truncated" or "never".
        grows: the picture becomes larger in every step.
        space: of the actions.
        observes: what an agent is given: "picture", "dictionary".
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}

    def __init__(
        self, render_mode=None, ends="terminated", grows=False, space=None, observes="picture"
    ):
        self.render_mode, self.ends, self.grows, self.observes = render_mode, ends, grows, observes
        self.action_space = Discrete(4, start=2) if space is None else space
        self.observation_space = Box(0, 255, (6, 8, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.num_steps, self.action = 0, 0
        self.episode = int(self.np_random.integers(1, 200))
        self.length = 5 + int(self.np_random.integers(10))
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.num_steps += 1
        self.action = int(np.sum(np.asarray(action) * 10)) if not isinstance(action, dict) else 0
        over = self.num_steps >= self.length
        ends = (over and self.ends == "terminated", over and self.ends == "truncated")
        return self.observation(), 0.5 * self.num_steps, *ends, {}

    def observation(self):
        picture = self.picture()
        return picture if self.observes == "picture" else {"picture": picture}

    def picture(self):
        size = (6 + self.num_steps if self.grows else 6, 8, 3)
        picture = np.zeros(size, np.uint8)
        picture[0], picture[1], picture[2:] = self.num_steps, self.action % 256, self.episode
        return picture

    def render(self):
        return self.picture()


class Blind(Drawn):
    """Draws nothing."""

    metadata = {"render_modes": []}

    def __init__(self):
        super().__init__()


class Shown(Drawn):
    """Draws on the screen alone."""

    metadata = {"render_modes": ["human"]}


def idle(observation, space, generator):
    return int(space.start)


def wild(observation, space, generator):
    return 99


for name, kind in (("Drawn-v0", Drawn), ("Blind-v0", Blind), ("Shown-v0", Shown)):
    if name not in gymnasium.registry:
        gymnasium.register(name, entry_point=kind)
