"""What the loss on held-out clips says when one layer after another is left out.

Source: paper, section 5.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scd.evaluation.image import Estimate, bootstrap
from scd.probing.intercept import without
from scd.probing.subject import Progress, Subject, Task, silent


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """Relative increase of the loss without each layer: 0.5 is half as much again."""

    layers: tuple[int, ...]
    """Number of each layer, from 1."""
    relative_loss: Float[np.ndarray, " layers"]
    """Loss without the layer / loss with all layers - 1, of the means over clips and levels."""
    ci_low: Float[np.ndarray, " layers"]
    """Lower end of the 95 % interval over clips, paired."""
    ci_high: Float[np.ndarray, " layers"]
    """Upper end."""
    by_level: Float[np.ndarray, "layers levels"]
    """The same at each noise level."""
    levels: tuple[float, ...]
    """Times at which the loss was taken."""
    loss: Float[np.ndarray, "levels clips"]
    """Loss with all layers."""


@torch.no_grad()
def leave_one_out(
    subject: Subject,
    task: Task,
    levels: Sequence[float],
    layers: Sequence[int] | None = None,
    progress: Progress = silent,
) -> LeaveOneOut:
    """Measure the loss without each layer, which is left out of the pass over the past too.

    Clips and noise are the same for all layers.

    Args:
        subject: what is probed.
        task: frames and their noise.
        levels: times at which the loss is taken; see `noise_levels`.
        layers: numbers from 1; None: all.
        progress: told how far it is.

    Raises:
        ValueError: no such layers.
    """
    places = subject.places(layers)
    full = losses(subject, task, levels)
    found, by_level = [], []
    for number, place in enumerate(places, 1):
        with without([subject.layers[place]]):
            left = losses(subject, task, levels)
        found.append(relative(left, full))
        by_level.append((left.mean(1) / full.mean(1) - 1).cpu().numpy())
        progress(number / len(places))
    return LeaveOneOut(
        layers=tuple(place + 1 for place in places),
        relative_loss=np.array([one.mean for one in found], np.float32),
        ci_low=np.array([one.ci_low for one in found], np.float32),
        ci_high=np.array([one.ci_high for one in found], np.float32),
        by_level=np.stack(by_level),
        levels=tuple(levels),
        loss=full.cpu().numpy(),
    )


def losses(subject: Subject, task: Task, levels: Sequence[float]) -> Float[Tensor, "levels b"]:
    """Return the loss of each clip at each time, averaged over its draws of noise."""
    state = task.begin(subject)
    return task.per_clip(torch.stack([task.error(subject, state, time) for time in levels]))


def relative(changed: Float[Tensor, "levels b"], full: Float[Tensor, "levels b"]) -> Estimate:
    """Estimate by which share a loss exceeds another on the same clips."""
    both = torch.stack([changed.mean(0), full.mean(0)], dim=1).cpu()
    return bootstrap(both, lambda means: means[:, 0] / means[:, 1] - 1)
