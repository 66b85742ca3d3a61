"""Crafter, which speaks the interface of before Gymnasium, under its own names in Gymnasium."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import crafter
import gymnasium
import numpy as np
from crafter import constants
from gymnasium.spaces import Box, Discrete

STEPS_PER_S = 5
"""Speed at which its own recorder's videos are watched by a person; the game knows no seconds."""


class CrafterEnv(gymnasium.Env[np.ndarray, Any]):
    """Crafter as a Gymnasium environment.

    Args:
        render_mode: "rgb_array" or None.
        size: rows and columns of a picture, in pixels.
        actions: names of those that an agent may choose, in this order; empty: all.
        items: what a player has again before each step, as {name: number}: `{"health": 9}`
            cannot be killed by creatures (by lava yes), `{"stone": 9}` never runs out of stone.
        **settings: as `crafter.Env` takes them: area, view, reward, length.

    Raises:
        ValueError: an action or an item that the game does not know.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": STEPS_PER_S}

    def __init__(
        self,
        render_mode: str | None = None,
        size: tuple[int, int] = (64, 64),
        actions: Sequence[str] = (),
        items: Mapping[str, int] | None = None,
        **settings: Any,
    ) -> None:
        self._game: Any = crafter.Env(size=size, seed=0, **settings)
        self.render_mode = render_mode
        known = list(self._game.action_names)
        self.action_names = tuple(actions or known)
        self._items = dict(items or {})
        for kind, asked, names in (
            ("actions", self.action_names, known),
            ("items", self._items, list(constants.items)),  # type: ignore
        ):
            if unknown := set(asked) - set(names):
                raise ValueError(
                    f"Crafter's {kind} are {', '.join(names)}; got {', '.join(sorted(unknown))}"
                )
        self._ids = [known.index(name) for name in self.action_names]
        self.action_space = Discrete(len(self.action_names))
        self.observation_space = Box(0, 255, (*size, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        # A world is a function of its seed and of how many were made before.
        self._game._seed = int(self.np_random.integers(2**31 - 1))
        self._game._episode = 0
        return self._game.reset(), {}

    def step(
        self, action: int | np.integer
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._game._player.inventory.update(self._items)
        observation, reward, is_over, info = self._game.step(self._ids[int(action)])
        died = info["discount"] == 0
        return observation, float(reward), died, bool(is_over and not died), info

    def render(self) -> np.ndarray:
        return self._game.render()


for _name, _rewarded in (("CrafterReward-v1", True), ("CrafterNoReward-v1", False)):
    if _name not in gymnasium.registry:
        gymnasium.register(
            _name,
            entry_point=f"{__name__}:CrafterEnv",
            max_episode_steps=10000,
            kwargs={"reward": _rewarded},
        )
