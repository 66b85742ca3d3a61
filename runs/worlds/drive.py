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

NEAR, FAR, ALL = slice(52, 66), slice(30, 44), slice(0, 84)
"""Rows of the picture in which the road is looked for."""

ODDS = {GAS: 0.3, LEFT: 0.25, RIGHT: 0.25, NOTHING: 0.12, BRAKE: 0.08}
"""How often a stray stretch does what."""

STRAY, STRETCH = 0.08, (2, 8)
"""Probability that a frame begins a stray stretch; frames that it may last."""

GAS_SHARE = 0.3
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
    near, far = _aside(observation[NEAR]), _aside(observation[FAR])
    if near is None:
        # On the grass: slowly back to what road is in sight, or round until there is some.
        anywhere = _aside(observation[ALL])
        if generator.random() < 0.4:
            return GAS if generator.random() < 0.5 else BRAKE
        return RIGHT if anywhere is not None and anywhere > 0 else LEFT
    if abs(near) > 4:
        return RIGHT if near > 0 else LEFT
    if far is None or abs(far) > 20:
        # A curve comes.
        return BRAKE if generator.random() < 0.3 else NOTHING
    return GAS if generator.random() < GAS_SHARE else NOTHING


def _aside(rows: np.ndarray) -> float | None:
    """Return by how many columns the road lies to the right of the car; None: there is none."""
    # The road is grey; grass is green, the car red.
    rows = rows.astype(np.int32)
    columns = np.nonzero((np.abs(rows[..., 1] - rows[..., 0]) < 30) & (rows.max(-1) > 60))[1]
    return float(columns.mean() - CAR_COLUMN) if len(columns) > 5 else None
