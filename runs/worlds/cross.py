"""Who plays while Freeway is recorded: crosses the lanes, mostly upwards, in stretches.

One who does as often this as that never leaves the pavement.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ODDS = (0.2, 0.55, 0.25)
"""How often a stretch is of which action: nothing, up, down."""

STRETCH = (3, 14)
"""Frames that one may last."""

_stretch: dict[str, Any] = {}
"""The stretch of the episode that is being played."""


def cross(observation: np.ndarray, action_space: Any, generator: np.random.Generator) -> int:
    """Return the action of the next frame.

    Args:
        observation: picture, 8-bit RGB.
        action_space: Discrete(3).
        generator: of the episode.
    """
    if _stretch.get("episode") is not generator or not _stretch["frames"]:
        action, frames = generator.choice(len(ODDS), p=ODDS), generator.integers(*STRETCH)
        _stretch.update(episode=generator, action=int(action), frames=int(frames))
    _stretch["frames"] -= 1
    return _stretch["action"]
