"""Frames per second: whether two rates are the same, and a video brought to another one.

Brought to another rate, a moment shows the frame that is on screen then, as in every player: frames
are passed over, or shown for several moments. An action covers the time since the moment before:
of several discrete ones the most frequent counts, the latest of equally frequent ones, and
continuous ones are averaged; where a frame is shown again its action is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64

TOLERANCE = 0.02
"""Share by which rates may differ: 29.97 is meant as 30; 24 and 25 are two rates."""


def is_same_rate(one: float, other: float) -> bool:
    """Tell whether two numbers of frames per second mean the same."""
    return abs(one - other) <= TOLERANCE * max(one, other)


def check_rate(world: str, fps: float, data: str, theirs: float) -> None:
    """Refuse data of another rate than a world's (ValueError)."""
    if not is_same_rate(fps, theirs):
        raise ValueError(
            f"{world} makes {fps:g} frames/s, {data} has {theirs:g}: a folder of clips is brought "
            f"to that rate by the name CLIPS?fps={fps:g} (latents, when they are encoded)"
        )


def count_rates(rates: Iterable[float]) -> str:
    """Say how often there is each rate, the most frequent first."""
    counts = Counter(round(rate, 2) for rate in rates).most_common()
    return ", ".join(f"{number} of {rate:g}" for rate, number in counts)


def frames_at(num_frames: int, fps: float, wanted: float) -> Int64[np.ndarray, " t"]:
    """Return the number of the frame that is on screen at each moment of a video.

    Args:
        num_frames: of the video.
        fps: its frames per second.
        wanted: moments per second, the first at the video's beginning.
    """
    if is_same_rate(fps, wanted):
        return np.arange(num_frames)
    # Fractions: rounding would show another frame now and then.
    step = Fraction(fps).limit_denominator(1001) / Fraction(wanted).limit_denominator(1001)
    moments = np.arange(-(-num_frames * step.denominator // step.numerator))
    return moments * step.numerator // step.denominator


def pool_actions(
    actions: Int[np.ndarray, " t"] | Float[np.ndarray, "t a"],
    frames: Int[np.ndarray, " n"],
    counts: Sequence[bool] = (),
) -> Int[np.ndarray, " n"] | Float[np.ndarray, "n a"]:
    """Return the action of each moment.

    Args:
        actions: of all frames of a video.
        frames: what `frames_at` returned for it.
        counts: of each entry of a vector, whether it is the number of a choice, or a key; empty:
            none is.
    """
    begins = np.concatenate([frames[:1], frames[:-1] + 1])
    parts = [
        actions[min(begin, frame) : frame + 1]
        for begin, frame in zip(begins.tolist(), frames.tolist(), strict=True)
    ]
    if actions.ndim == 1:
        pooled = [_most_frequent(part) for part in parts]
    else:
        pooled = [part.mean(0) for part in parts]
        for entry in np.flatnonzero(counts):
            for moment, part in zip(pooled, parts, strict=True):
                moment[entry] = _most_frequent(part[:, entry])
    return np.array(pooled, actions.dtype).reshape(len(parts), *actions.shape[1:])


def _most_frequent(values: np.ndarray) -> Any:
    """Return the value that occurs most often, the latest of several."""
    # `most_common` keeps the order of what it met, so the latest comes first.
    return Counter(values[::-1].tolist()).most_common(1)[0][0]
