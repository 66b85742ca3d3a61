"""Layers that noisy frames pass by once they are nearly clean.

Source: paper, section 5.4: the middle layers, at all steps but the first few.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from scd.models.flow import SamplingConfig, schedule


@dataclass(frozen=True, kw_only=True)
class LayerSkip:
    """Which layers are skipped, and at which times: there their residual branches add nothing.

    Clean frames never skip a layer, so what is remembered of them is whole.
    """

    first: int
    """First layer that is skipped, counted from 0."""
    stop: int
    """First layer after those that are skipped, counted from 0."""
    below: float
    """Noisy frames at times below this skip them, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop:
            raise ValueError(
                f"skipped layers must be first .. stop - 1 with 0 <= first < stop, "
                f"got first={self.first}, stop={self.stop}"
            )
        if not 0 < self.below <= 1:
            raise ValueError(f"below must lie in (0, 1], got {self.below}")

    @property
    def layers(self) -> range:
        """Numbers of the skipped layers, from 0."""
        return range(self.first, self.stop)

    def skips(self, time: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Tell which frames of these times skip the layers; clean ones, of CLEAN_TIME, do not."""
        return (time >= 0) & (time < self.below)


def skip_after(first: int, stop: int, full_steps: int, sampling: SamplingConfig) -> LayerSkip:
    """Skip layers in all steps of a schedule but the first ones.

    Between the last whole step and the first short one, the time at which it changes is in the
    middle, so that no rounding decides.

    Args:
        first: layer, from 0.
        stop: layer after the last one that is skipped.
        full_steps: steps that run all layers, 1 or more; all of them: no step of this schedule
            skips any, a longer one's last steps would.
        sampling: whose schedule it is.

    Raises:
        ValueError: no such steps or layers.
    """
    if not 1 <= full_steps <= sampling.num_steps:
        raise ValueError(
            f"full_steps must lie in 1 .. {sampling.num_steps}, the steps of a frame, "
            f"got {full_steps}"
        )
    times = schedule(sampling).tolist()
    below = (times[full_steps - 1] + times[full_steps]) / 2
    return LayerSkip(first=first, stop=stop, below=below)
