"""Who plays while Crafter is recorded: wanders about one place, digs, and puts stones back.

A player who chooses anew in each frame stands and turns; one who always goes on leaves behind all
that a model could remember. So stretches of a few steps go to and fro, after a walk to somewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NOTHING, LEFT, RIGHT, UP, DOWN, DIG, PLACE = range(7)
"""Actions, in the order of `actions=` in runs/worlds/crafter.sh."""

BACK = {LEFT: RIGHT, RIGHT: LEFT, UP: DOWN, DOWN: UP}

TILE, PLAYER = 16, (3, 4)
"""Pixels of a tile's side, and the row and column of the player's tile."""

AHEAD = {LEFT: (0, -1), RIGHT: (0, 1), UP: (-1, 0), DOWN: (1, 0)}
"""Rows and columns to the next tile."""

STRETCHES = {"walk": 0.52, "tunnel": 0.2, "dig": 0.1, "place": 0.09, "stand": 0.09}
"""How often a stretch is of which kind."""

JOURNEYS, JOURNEY = 2, (3, 10)
"""Stretches at the start of an episode that lead away, and how many steps each may have."""

_episode: dict[str, Any] = {}
"""The stretch of the episode that is being played: actions to come, direction, journeys left."""


def play(observation: np.ndarray, action_space: Any, generator: np.random.Generator) -> int:
    """Return the action of the next frame.

    Args:
        observation: picture of 9 x 9 tiles, 8-bit RGB.
        action_space: Discrete(7).
        generator: of the episode.
    """
    if _episode.get("generator") is not generator:
        direction = int(generator.integers(LEFT, DOWN + 1))
        _episode.update(generator=generator, to_come=[], direction=direction, journeys=JOURNEYS)
    if not _episode["to_come"]:
        _episode["to_come"] = _stretch(generator)
    action = _episode["to_come"].pop(0)
    if action in AHEAD and _is_lava(observation, action):
        # The one thing that kills.
        _episode["to_come"] = []
        safe = [one for one in AHEAD if not _is_lava(observation, one)]
        action = int(generator.choice(safe)) if safe else NOTHING
    return action


def _is_lava(observation: np.ndarray, direction: int) -> bool:
    row, column = (
        (place + step) * TILE for place, step in zip(PLAYER, AHEAD[direction], strict=True)
    )
    tile = observation[row : row + TILE, column : column + TILE].astype(float)
    red, green, blue = tile.mean((0, 1))
    return bool(red > 1.3 * green and red > 2.5 * blue)


def _stretch(generator: np.random.Generator) -> list[int]:
    direction = _episode["direction"]
    aside = [LEFT, RIGHT] if direction in (UP, DOWN) else [UP, DOWN]
    if _episode["journeys"]:
        _episode["journeys"] -= 1
        num = int(generator.integers(*JOURNEY))
        steps = [DIG, direction] * num
        _episode["direction"] = int(generator.choice(aside))
        return steps
    kind = str(generator.choice(list(STRETCHES), p=list(STRETCHES.values())))
    if kind in ("walk", "tunnel"):
        near = [direction, BACK[direction], *aside]
        direction = int(generator.choice(near, p=[0.15, 0.35, 0.25, 0.25]))
        _episode["direction"] = direction
        num = int(generator.integers(1, 6))
        return [direction] * num if kind == "walk" else [direction] + [DIG, direction] * num
    if kind == "dig":
        return [DIG] * int(generator.integers(1, 6))
    return [PLACE if kind == "place" else NOTHING] * int(generator.integers(1, 3))
