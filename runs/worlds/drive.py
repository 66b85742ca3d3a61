"""Who drives while CarRacing is recorded: follows the road by sight, and strays on purpose.

A driver that always does right shows a model no wrong action, and one that does anything at all is
soon on the grass and stays there. So stretches of following the road alternate with stretches of
one random action.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NOTHING, RIGHT, LEFT, GAS, BRAKE = range(5)
"""Actions of CarRacing-v3 with continuous=False."""

CAR_COLUMN = 48
"""Where the car is in the 96 x 96 picture, at row 70."""

LOOK_AHEAD = (50, 58, 64)
"""Rows of the picture in which the road is looked for."""

ODDS = {GAS: 0.3, LEFT: 0.25, RIGHT: 0.25, NOTHING: 0.12, BRAKE: 0.08}
"""How often a stray stretch does what."""

STRAY, STRETCH = 0.08, (2, 8)
"""Probability that a frame begins a stray stretch; frames that it may last."""

GAS_SHARE = 0.45
"""How often the road straight ahead is answered by more gas: always would be too fast to turn."""

_straying: dict[str, Any] = {}
"""The stray stretch of the episode that is being played."""


def drive(observation: np.ndarray, action_space: Any, generator: np.random.Generator) -> int:
    """Return the action of the next frame.

    Args:
        observation: 96 x 96 picture, 8-bit RGB.
        action_space: Discrete(5).
        generator: of the episode.
    """
    if _straying.get("episode") is not generator:
        _straying.update(episode=generator, action=NOTHING, frames=0)
    if _straying["frames"] > 0:
        _straying["frames"] -= 1
        return _straying["action"]
    if generator.random() < STRAY:
        _straying["action"] = int(generator.choice(list(ODDS), p=list(ODDS.values())))
        _straying["frames"] = int(generator.integers(*STRETCH))
        return _straying["action"]
    # Grass is green: its green stands above its red. The road is grey.
    rows = observation[list(LOOK_AHEAD)].astype(np.int32)
    road = (rows[..., 1] - rows[..., 0] < 30) & (rows.max(-1) > 60)
    columns = np.nonzero(road)[1]
    if len(columns) == 0:
        return int(generator.choice([LEFT, RIGHT, GAS, BRAKE]))
    aside = columns.mean() - CAR_COLUMN
    if abs(aside) > 4:
        return RIGHT if aside > 0 else LEFT
    return GAS if generator.random() < GAS_SHARE else NOTHING
