"""Denoising trajectories from noise to a frame, and the features of each layer along them.

Source: paper, figures 2 to 5 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.memory import GIB
from scd.models.config import SamplingConfig
from scd.models.flow import schedule
from scd.probing.intercept import newest, recorded, tokens_of
from scd.probing.subject import Progress, Subject, Task, silent
from scd.streaming.finite import NotFinite

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Places of the five noise levels in the density of training times. Source: paper, figure 7."""

MAX_FEATURE_BYTES = 2 * GIB
"""Features that are held at once; more are gathered in several passes over the same trajectory."""


MAX_BLOCK_BYTES = 64 * 2**20
"""Attention weights that are held at once; a block has one query at least."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Output of one layer for the same frames at every step."""

    layer: int
    """Place of the layer in `Subject.layers`, from 0."""
    tokens: Float[Tensor, "steps b n d"]
    """Float32."""


def step_times(sampling: SamplingConfig) -> list[float]:
    """Return the times of a trajectory: that of each step, and 0 at the end.

    Raises:
        ValueError: fewer than two steps, of which nothing can be compared, or another solver.
    """
    if sampling.num_steps < 2:
        raise ValueError(f"the probe compares steps: needed 2 or more, got {sampling.num_steps}")
    if sampling.solver != "euler":
        raise ValueError(f"the probe follows Euler steps, got solver={sampling.solver!r}")
    return schedule(sampling).tolist()


def noise_levels(
    mean: float = 0.0, std: float = 1.0, quantiles: Sequence[float] = QUANTILES
) -> tuple[float, ...]:
    """Return the times at quantiles of a logit-normal density: that from which training drew.

    Raises:
        ValueError: quantiles outside of (0, 1), or none.
    """
    if not quantiles or not all(0 < quantile < 1 for quantile in quantiles):
        raise ValueError(f"needed quantiles between 0 and 1, got {list(quantiles)}")
    normal = NormalDist(mean, std)
    return tuple(float(1 / (1 + np.exp(-normal.inv_cdf(one)))) for one in quantiles)


def spread(first: int, last: int, num: int) -> list[int]:
    """Return at most `num` different whole numbers from first to last, evenly spaced."""
    return sorted({round(value) for value in np.linspace(first, last, num).tolist()})


def spread_early(last: int, num: int) -> list[int]:
    """Return at most `num` different whole numbers from 1 to last, more of them early."""
    return sorted({round(value) for value in np.geomspace(1, last, num).tolist()})


@torch.no_grad()
def denoise(
    subject: Subject,
    state: Any,
    noisy: Float[Tensor, "b c h w"],
    times: Sequence[float],
    first: int = 0,
) -> Iterator[Float[Tensor, "b c h w"]]:
    """Take Euler steps from frames at times[first], and yield the frame after each.

    Args:
        times: of all steps, and 0.
        first: step to begin with, from 0.

    Raises:
        NotFinite: a frame holds NaN or infinity.
    """
    for time, next_time in zip(times[first:-1], times[first + 1 :], strict=True):
        noisy = noisy + (next_time - time) * subject.velocity(state, noisy, time)
        if not noisy.isfinite().all():
            raise NotFinite(
                "the model makes frames that are not finite, the first in the step from time "
                f"{time:g} on: its weights are damaged, or its training went wrong"
            )
        yield noisy


def feature_bytes(subject: Subject, num_frames: int, num_steps: int, num_layers: int = 1) -> int:
    return num_layers * num_steps * num_frames * subject.tokens_per_frame * subject.width * 4


def layer_features(
    subject: Subject,
    task: Task,
    sampling: SamplingConfig,
    layers: Sequence[int] | None = None,
    progress: Progress = silent,
    max_bytes: int = MAX_FEATURE_BYTES,
) -> Iterator[Features]:
    """Gather the outputs of layers for the newest frame at every step of one trajectory.

    Args:
        layers: numbers from 1; None: all that run at every step.
        max_bytes: features that are held at once. The trajectory is the same each time, so what
            does not fit is gathered by running it again.

    Yields:
        One layer after another.

    Raises:
        ValueError: no such layers, one that runs once per frame, or fewer than two steps.
    """
    times = step_times(sampling)
    places = subject.stepped if layers is None else subject.places(layers)
    for place in places:
        if subject.layers[place].once:
            raise ValueError(f"{subject.layers[place].name} runs once per frame: it has no steps")
    num_steps, num_frames = len(times) - 1, task.clean.shape[0]
    at_once = max(1, max_bytes // feature_bytes(subject, num_frames, num_steps))
    state = task.begin(subject)
    for start in range(0, len(places), at_once):
        chunk = places[start : start + at_once]
        shape = (len(chunk), num_steps, num_frames, subject.tokens_per_frame, subject.width)
        kept = torch.empty(shape, device=task.clean.device)
        with recorded([subject.layers[place] for place in chunk]) as calls:
            for step, _ in enumerate(denoise(subject, state, task.noise, times)):
                if len(calls) < len(chunk):
                    raise ValueError(f"not all layers ran as modules at step {step + 1}")
                for number, call in calls.items():
                    kept[number, step] = newest(tokens_of(call.output), subject.tokens_per_frame)
                calls.clear()
                progress((start + len(chunk) * (step + 1) / num_steps) / len(places))
        for place, tokens in zip(chunk, kept, strict=True):
            yield Features(layer=place, tokens=tokens)
