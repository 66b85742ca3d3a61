"""Wan's table of noise levels, as times: snapped to, warped, and weighed in training.

A time here is Wan's sigma, a timestep is 1000 times that. Source: paper (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.runtime import finest
from scd.models.config import SamplingConfig
from scd.models.flow import schedule
from scd.models.wan.config import NUM_TIMES, SHIFT


def time_table(shift: float = SHIFT) -> Float[Tensor, " times"]:
    """Return the descending times that a scheduler of Wan knows, from 1 to almost 0, as float64."""
    sampling = SamplingConfig(num_steps=NUM_TIMES, schedule="shifted", shift=shift)
    return schedule(sampling)[:-1]


def nearest_times(time: Float[Tensor, "*b"], table: Float[Tensor, " times"]) -> Float[Tensor, "*b"]:
    """Snap times to the table's nearest entry: so time 0 becomes the smallest one, 0.00498."""
    return table[_nearest(time, table)].to(time.device, finest(time.device))


def _nearest(time: Tensor, table: Tensor) -> Tensor:
    return (time.to(table)[..., None] - table).abs().argmin(-1)


def warped_times(steps: Sequence[int], shift: float = SHIFT) -> tuple[float, ...]:
    """Return the times of the steps of a distilled model, which are counted on an unbent scale.

    Args:
        steps: descending numbers in 1 .. 1000, as [1000, 750, 500, 250].
        shift: of the table.
    """
    table = time_table(shift)
    if any(not 1 <= step <= NUM_TIMES for step in steps):
        raise ValueError(f"steps must lie in 1 .. {NUM_TIMES}, got {list(steps)}")
    return tuple(float(table[NUM_TIMES - step]) for step in steps)


def training_weights(
    time: Float[Tensor, "*b"], table: Float[Tensor, " times"]
) -> Float[Tensor, "*b"]:
    """Return the weight of a loss at a time: a bell around 0.5, 0 at time 1, of mean 1 over all.

    exp(-2 (time - 0.5)^2), less its smallest value, divided by its mean; of the nearest entry.
    """
    bell = torch.exp(-2 * (table - 0.5) ** 2)
    bell = bell - bell.min()
    weights = bell * (len(table) / bell.sum())
    return weights[_nearest(time, table)].to(time.device, finest(time.device))
