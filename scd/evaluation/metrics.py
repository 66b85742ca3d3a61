"""What a metric is: measured of each unit of work, and then made into rows of a result.

To add a number of single frames against the truth, add it to `frame_values` (image.py). To add
another kind, write a `Metric` and name it in `open_metrics` (evaluate.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scd.data.clip import Conditions
from scd.data.source import DataCard
from scd.evaluation.image import (
    HIGHER_IS_BETTER,
    SSIM_WINDOW,
    Estimate,
    bootstrap,
    estimates,
    frame_values,
    psnr_gain,
)
from scd.evaluation.lpips import METRICS, Lpips
from scd.evaluation.protocols import Protocol

Numbers = Mapping[str, Mapping[str, Tensor]]
"""Baseline -> name -> numbers [b ...] of a unit's clips; [b trajectories ...] of all units."""

Found = Iterator[tuple[int | None, str, str, Estimate]]
"""Horizon (None: all predicted frames together), metric, baseline and number."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The clips of a unit of work as they are measured, pixels in [-1, 1]."""

    predicted: Float[Tensor, "b t 3 h w"]
    """Given frames, and what the model made after them."""
    true: Float[Tensor, "b t 3 h w"]
    """The same frames of the data."""
    context: int
    steering: Conditions
    """What steered the predicted frames."""
    shuffled: bool
    """Whether that was another clip's."""
    is_first: bool
    """Whether this unit also measures what does not depend on the model."""

    @property
    def future(self) -> Float[Tensor, "b m 3 h w"]:
        """The true frames after the given ones."""
        return self.true[:, self.context :]

    @property
    def last(self) -> Float[Tensor, "b 1 3 h w"]:
        """The last given frame."""
        return self.true[:, self.context - 1 : self.context]

    @property
    def baselines(self) -> dict[str, Float[Tensor, "b m 3 h w"]]:
        """The predicted frames by baseline; beside the model the last given frame, repeated."""
        name = "shuffled_actions" if self.shuffled else "model"
        made = {name: self.predicted[:, self.context :]}
        if self.is_first and self.context:
            made["repeat_last"] = self.last.expand_as(self.future)
        return made

    @property
    def with_truth(self) -> dict[str, Float[Tensor, "b m 3 h w"]]:
        """The same, and in the first unit the true frames."""
        return self.baselines | ({"truth": self.future} if self.is_first else {})


class Metric(ABC):
    """One kind of number. Phases: `measure` each unit; then `estimates` of all of them."""

    kind: str
    """Name of what is stored of a unit; without a dot."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol

    @abstractmethod
    def measure(self, seen: Seen) -> Numbers:
        """Measure a unit; what it cannot tell of it is left out."""

    @abstractmethod
    def estimates(self, found: Numbers) -> Found:
        """Yield rows of what was measured of all units, which may be nothing."""

    def left_out(self, card: DataCard, num_clips: int) -> dict[str, str]:
        """Say what such data or so few clips do not allow, and why."""
        return {}

    def by_clip(self, found: Numbers) -> dict[str, Float[Tensor, "b trajectories"]]:
        """Return numbers of each clip's trajectories, for those who choose among them."""
        return {}

    def horizons(self) -> list[tuple[int | None, slice]]:
        """Return each predicted frame, and all of them together."""
        horizon = self.protocol.horizon
        each = [(index + 1, slice(index, index + 1)) for index in range(horizon)]
        return [*each, (None, slice(0, horizon))]


class AgainstTruth(Metric):
    """Predicted frames against the true ones, each by itself."""

    kind = "values"

    def __init__(
        self, protocol: Protocol, network: Lpips | None = None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(protocol)
        self.network, self.device = network, device

    def measure(self, seen: Seen) -> Numbers:
        if not seen.context:
            return {}
        return {name: self._values(one, seen.future) for name, one in seen.baselines.items()}

    def _values(self, frames: Tensor, true: Tensor) -> dict[str, Tensor]:
        parts = []
        # Clip by clip, to bound the memory.
        for clip in zip(frames, true, strict=True):
            one, other = (side.to(self.device) for side in clip)
            values = frame_values(one, other)
            if self.network is not None:
                for given, metric in METRICS.items():
                    values[metric] = self.network(one, other, given)
            parts.append(values)
        return {name: torch.stack([part[name] for part in parts]).cpu() for name in parts[0]}

    def estimates(self, found: Numbers) -> Found:
        values = {
            baseline: {name: self.of_clips(name, one) for name, one in numbers.items()}
            for baseline, numbers in found.items()
        }
        for horizon, frames in self.horizons() if values else ():
            of_clips = {
                baseline: {name: one[:, frames].mean(1) for name, one in numbers.items()}
                for baseline, numbers in values.items()
            }
            reference, seed = of_clips["repeat_last"]["mse"], self.protocol.seed
            for baseline, numbers in of_clips.items():
                measured = estimates(numbers, seed)
                if baseline != "repeat_last":
                    measured["psnr_gain"] = psnr_gain(numbers["mse"], reference, seed)
                for metric, estimate in measured.items():
                    yield horizon, metric, baseline, estimate

    def left_out(self, card: DataCard, num_clips: int) -> dict[str, str]:
        if self.protocol.from_nothing:
            return {"mse, psnr, ssim": "no frame was given, so no frame has one truth"}
        if min(card.height, card.width) < SSIM_WINDOW:
            return {"ssim": f"frames are smaller than its window of {SSIM_WINDOW} pixels"}
        return {}

    def by_clip(self, found: Numbers) -> dict[str, Float[Tensor, "b trajectories"]]:
        return {name: one.double().mean(2) for name, one in found.get("model", {}).items()}

    def of_clips(
        self, metric: str, values: Float[Tensor, "b trajectories m"]
    ) -> Float[Tensor, "b m"]:
        """Return one number for each frame of each clip, as the protocol takes it."""
        if self.protocol.trajectories == "mean":
            return values.mean(1)
        return values[torch.arange(len(values)), self.best_trajectories(metric, values)]

    def best_trajectories(
        self, metric: str, values: Float[Tensor, "b trajectories m"]
    ) -> Int[Tensor, " b"]:
        """Return which trajectory of each clip is the best over all predicted frames."""
        highest = metric in HIGHER_IS_BETTER or (
            metric == "mse" and self.protocol.mse_trajectory == "highest"
        )
        of_clips = values.mean(2)
        return of_clips.argmax(1) if highest else of_clips.argmin(1)

    def ranking(self, found: Numbers) -> tuple[str, Float[Tensor, " b"], Int[Tensor, " b"]]:
        """Return what clips are ranked by, each clip's number, and the trajectory to show.

        The metric is LPIPS where it was measured, else PSNR. The trajectory is the best one where
        the protocol takes the best, else the first.
        """
        values = found["model"]
        metric = "lpips" if "lpips" in values else "psnr_per_frame"
        numbers = self.of_clips(metric, values[metric]).mean(1)
        chosen = torch.zeros(len(numbers), dtype=torch.long)
        if self.protocol.trajectories == "best":
            chosen = self.best_trajectories(metric, values[metric])
        return metric, numbers, chosen


class Drift(Metric):
    """What a stream loses as it goes on: fine detail, contrast, brightness.

    PSNR rewards blur: the mean of all futures is the best guess by it. These three need no
    alignment with the truth, only the statistics of its frames, so they also tell where nothing can
    be predicted. They are taken over all trajectories, never of the best.
    """

    kind = "drift"

    def measure(self, seen: Seen) -> Numbers:
        return {name: drift_statistics(frames) for name, frames in seen.with_truth.items()}

    def estimates(self, found: Numbers) -> Found:
        means = {
            baseline: {name: one.mean(1) for name, one in numbers.items()}
            for baseline, numbers in found.items()
        }
        true = means.pop("truth")
        for horizon, frames in self.horizons():
            for baseline, numbers in means.items():
                made, real = (
                    {name: one[:, frames] for name, one in side.items()} for side in (numbers, true)
                )
                for metric, estimate in drift_estimates(made, real, self.protocol.seed).items():
                    yield horizon, metric, baseline, estimate


class Seams(Metric):
    """Whether the grid of the cells shows of which frames are made, one token each.

    Where it does, neighbouring pixels differ more across a border of cells than within one. Real
    pictures have no such grid, but what is drawn at the same places in each of them, such as the
    player's car, makes their own share another one than 1: it is divided by theirs.
    """

    kind = "seams"

    def __init__(self, protocol: Protocol, rows: int, columns: int) -> None:
        """Look for borders between `rows` x `columns` cells of a frame."""
        super().__init__(protocol)
        self.rows, self.columns = rows, columns

    def measure(self, seen: Seen) -> Numbers:
        return {
            name: seam_statistics(frames, self.rows, self.columns)
            for name, frames in seen.with_truth.items()
        }

    def estimates(self, found: Numbers) -> Found:
        sides = {
            baseline: torch.stack([numbers["across"], numbers["within"]], -1).mean(1)
            for baseline, numbers in found.items()
        }
        true = sides.pop("truth")
        for horizon, frames in self.horizons():
            for baseline, one in sides.items():
                both = torch.stack([one[:, frames].mean(1), true[:, frames].mean(1)], dim=1)
                yield horizon, "seams", baseline, bootstrap(both, _shares, self.protocol.seed)


def seam_statistics(
    frames: Float[Tensor, "b t 3 h w"], rows: int, columns: int
) -> dict[str, Float[Tensor, "b t"]]:
    """Measure each frame by itself, pixels in [-1, 1].

    Args:
        frames: pictures.
        rows: of cells, each of as many rows of pixels.
        columns: of cells.

    Returns:
        across: mean absolute difference of neighbouring pixels with a border of cells between them;
            0 where there is no border.
        within: the same of those in one cell; 0 where a cell is a pixel.
    """
    sums = {name: (torch.zeros(frames.shape[:2]), 0) for name in ("across", "within")}
    for dim, number in ((-2, rows), (-1, columns)):
        apart = frames.float().diff(dim=dim).abs().movedim(dim, -1).mean((2, 3))
        is_border = torch.arange(1, frames.shape[dim]) % (frames.shape[dim] // number) == 0
        for name, places in (("across", is_border), ("within", ~is_border)):
            total, count = sums[name]
            sums[name] = total + apart[..., places].sum(-1).cpu(), count + int(places.sum())
    return {name: total / max(count, 1) for name, (total, count) in sums.items()}


def drift_statistics(frames: Float[Tensor, "b t 3 h w"]) -> dict[str, Float[Tensor, "b t"]]:
    """Measure each frame by itself, pixels in [-1, 1].

    Returns:
        detail: mean absolute difference of neighbouring pixels, across and down.
        deviation: standard deviation of grey over the frame's pixels.
        level: mean of all pixels.
    """
    values = frames.float()
    across, down = values.diff(dim=-1).abs(), values.diff(dim=-2).abs()
    return {
        "detail": (across.mean((-3, -2, -1)) + down.mean((-3, -2, -1))) / 2,
        "deviation": values.mean(-3).std((-2, -1), correction=0),
        "level": values.mean((-3, -2, -1)),
    }


def drift_estimates(
    predicted: Mapping[str, Float[Tensor, "b t"]],
    true: Mapping[str, Float[Tensor, "b t"]],
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compare the statistics of predicted frames with those of the true frames of the same clips.

    Returns:
        sharpness: detail over the truth's, both averaged over clips; 1 is ideal, less is blur.
        contrast: deviation over the truth's; 1 is ideal.
        brightness: mean absolute difference of a frame's level from the truth's; 0 is ideal.
    """
    found = {}
    for metric, name in (("sharpness", "detail"), ("contrast", "deviation")):
        both = torch.stack([predicted[name].mean(1), true[name].mean(1)], dim=1)
        found[metric] = bootstrap(both, _ratio, seed)
    apart = (predicted["level"] - true["level"]).abs().mean(1)
    return found | {"brightness": bootstrap(apart, seed=seed)}


def _ratio(means: Float[Tensor, "*r 2"]) -> Float[Tensor, "*r"]:
    # Flat frames have no detail to lose and show no grid: equal to theirs, a prediction is ideal.
    floor = torch.finfo(torch.float32).eps
    return (means[..., 0] + floor) / (means[..., 1] + floor)


def _shares(means: Float[Tensor, "r 2 2"]) -> Float[Tensor, " r"]:
    return _ratio(_ratio(means))


def row_of(metric: str, estimate: Estimate, baseline: str) -> dict[str, Any]:
    """Return one row of a result, without its horizon."""
    return {"metric": metric, "baseline": baseline} | asdict(estimate)


def find_row(
    rows: Sequence[Mapping[str, Any]], metric: str, horizon: int, baseline: str = "model"
) -> Mapping[str, Any]:
    """Return the one row of a metric, horizon and baseline (ValueError: there is none)."""
    for row in rows:
        if (row["metric"], row["horizon"], row["baseline"]) == (metric, horizon, baseline):
            return row
    raise ValueError(f"no row of {metric} at horizon {horizon} for {baseline}")
