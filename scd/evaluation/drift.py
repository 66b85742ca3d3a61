"""What a stream loses as it goes on: fine detail, contrast, brightness.

PSNR rewards blur: the mean of all futures is the best guess by it. These three need no alignment
with the truth, only its frames' average look, so they also tell where nothing can be predicted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from scd.evaluation.image import Estimate, bootstrap


def frame_looks(frames: Float[Tensor, "b t 3 h w"]) -> dict[str, Float[Tensor, "b t"]]:
    """Measure each frame by itself, pixels in [-1, 1].

    Returns:
        detail: mean absolute difference of neighbouring pixels, across and down.
        spread: standard deviation of grey over the frame's pixels.
        level: mean of all pixels.
    """
    values = frames.float()
    across, down = values.diff(dim=-1).abs(), values.diff(dim=-2).abs()
    return {
        "detail": (across.mean((-3, -2, -1)) + down.mean((-3, -2, -1))) / 2,
        "spread": values.mean(-3).std((-2, -1), correction=0),
        "level": values.mean((-3, -2, -1)),
    }


def drift_estimates(
    looks: Mapping[str, Float[Tensor, "b t"]],
    true: Mapping[str, Float[Tensor, "b t"]],
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compare the looks of predicted frames with those of the true frames of the same clips.

    Returns:
        sharpness: detail over the truth's, both averaged over clips; 1 is ideal, less is blur.
        contrast: spread over the truth's; 1 is ideal.
        brightness: mean absolute difference of a frame's level from the truth's; 0 is ideal.
    """
    found = {}
    for metric, look in (("sharpness", "detail"), ("contrast", "spread")):
        both = torch.stack([looks[look].mean(1), true[look].mean(1)], dim=1)
        found[metric] = bootstrap(both, _ratio, seed)
    apart = (looks["level"] - true["level"]).abs().mean(1)
    return found | {"brightness": bootstrap(apart, seed=seed)}


def _ratio(means: Float[Tensor, "r 2"]) -> Float[Tensor, " r"]:
    # Flat frames have no detail to lose: equal to theirs, a prediction is ideal.
    floor = torch.finfo(torch.float32).eps
    return (means[:, 0] + floor) / (means[:, 1] + floor)
