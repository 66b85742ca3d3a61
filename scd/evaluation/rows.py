"""Rows of a result from what was measured of all units of a protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scd.evaluation.frechet import frechet_estimate
from scd.evaluation.fvd import fvd_estimate
from scd.evaluation.image import Estimate, bootstrap
from scd.evaluation.judged import CLIPS_PER_FEATURE, parts_of
from scd.evaluation.measure import PerFrame, compare_rows, drift_rows, row_of
from scd.evaluation.protocols import NamedProtocol
from scd.evaluation.trajectories import Tensors, Unit
from scd.streaming.rollout import Timing

HIGHER_IS_BETTER = frozenset({"psnr_per_frame", "ssim"})
"""Metrics of frames of which more is better; of the others less is."""

Measured = Mapping[str, Mapping[str, Float[Tensor, "b trajectories ..."]]]
"""Numbers of all clips and their trajectories, by baseline and name."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What was measured of all units, clip by clip. Made by `gather`."""

    kinds: Mapping[str, Measured]
    """By kind of number, as in `scd.evaluation.trajectories.Tensors`."""
    timings: list[Timing]
    """Of the model's steps on full batches."""

    def of(self, kind: str) -> Measured:
        """Return one kind of numbers; empty if it was not measured."""
        return self.kinds.get(kind, {})


def gather(parts: Mapping[Unit, Tensors]) -> Gathered:
    """Put the units together: batches one after another, trajectories side by side."""
    found: dict[str, dict[str, dict[str, dict[int, dict[int, Tensor]]]]] = {}
    timings: list[Timing] = []
    for unit, tensors in sorted(parts.items()):
        for key, value in tensors.items():
            kind, baseline, name = key.split(".")
            if kind == "timing":
                timings += [
                    Timing(encoder_s=encoder, decoder_s=decoder, autoencoder_s=autoencoder)
                    for encoder, decoder, autoencoder in value.tolist()
                ]
                continue
            table = found.setdefault(kind, {}).setdefault(baseline, {}).setdefault(name, {})
            table.setdefault(unit.trajectory, {})[unit.batch] = value
    kinds = {
        kind: {
            baseline: {name: _joined(table) for name, table in names.items()}
            for baseline, names in baselines.items()
        }
        for kind, baselines in found.items()
    }
    return Gathered(kinds=kinds, timings=timings)


def _joined(table: Mapping[int, Mapping[int, Tensor]]) -> Tensor:
    """Stack trajectories of which each is a number of batches."""
    each = [
        torch.cat([batches[at] for at in sorted(batches)]) for _, batches in sorted(table.items())
    ]
    return torch.stack(each, dim=1)


def best_trajectories(
    metric: str, values: Float[Tensor, "b trajectories m"], protocol: NamedProtocol
) -> Int[Tensor, " b"]:
    """Return which trajectory of each clip is the best over all predicted frames, by one metric."""
    of_clips = values.mean(2)
    highest = metric in HIGHER_IS_BETTER
    if metric == "mse" and protocol.mse_trajectory == "highest":
        highest = True
    return of_clips.argmax(1) if highest else of_clips.argmin(1)


def reduced(found: Measured, protocol: NamedProtocol) -> dict[str, PerFrame]:
    """Return one number for each frame of each clip, as the protocol takes it of trajectories."""
    return {
        baseline: {
            metric: _of_clips(metric, values, protocol) for metric, values in metrics.items()
        }
        for baseline, metrics in found.items()
    }


def _of_clips(metric: str, values: Tensor, protocol: NamedProtocol) -> Tensor:
    if protocol.trajectories == "mean":
        return values.mean(1)
    chosen = best_trajectories(metric, values, protocol)
    return values[torch.arange(len(values)), chosen]


def rows_of(
    gathered: Gathered, protocol: NamedProtocol, discrete: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows by horizon, and those of all predicted frames together.

    Looks, control and Frechet distances are taken over all trajectories, never of the best.

    Args:
        gathered: what was measured.
        protocol: by which it was.
        discrete: whether actions are; decides what control is called.
    """
    seed, horizon = protocol.seed, protocol.horizon
    values = reduced(gathered.of("values"), protocol)
    looks = {
        baseline: {name: value.mean(1) for name, value in names.items()}
        for baseline, names in gathered.of("looks").items()
    }
    rows = [
        row | {"horizon": index + 1}
        for index in range(horizon)
        for row in _frame_rows(values, looks, slice(index, index + 1), seed)
    ]
    overall = _frame_rows(values, looks, slice(0, horizon), seed)
    others = [
        *_control(gathered.of("errors"), horizon, seed, discrete),
        *_own_distance(gathered.of("features"), horizon, seed),
        *_fvd(gathered.of("fvd"), protocol),
    ]
    for frames, metric, baseline, estimate in others:
        row = row_of(metric, estimate, baseline)
        if frames is None:
            overall.append(row)
        else:
            rows.append(row | {"horizon": frames.stop})
    about = {
        "protocol": protocol.name,
        "num_clips": protocol.num_clips,
        "num_trajectories": protocol.num_trajectories,
    }
    return [row | about for row in rows], [row | about for row in overall]


def _frame_rows(
    values: Mapping[str, PerFrame], looks: Mapping[str, PerFrame], frames: slice, seed: int
) -> list[dict[str, Any]]:
    """Return the rows of some frames; without values nothing was given, and there is no truth."""
    compared = compare_rows(values, frames, seed) if values else []
    return compared + drift_rows(looks, frames, seed)


Found = Iterator[tuple[slice | None, str, str, Estimate]]
"""Frames (None: all), metric, baseline, estimate."""


def _control(errors: Measured, horizon: int, seed: int, discrete: bool) -> Found:
    metric = "control" if discrete else "control_error"
    for baseline, names in errors.items():
        of_clips = names["action"].mean(1)
        values = 1 - of_clips if discrete else of_clips
        for frame in range(horizon):
            frames = slice(frame, frame + 1)
            yield frames, metric, baseline, bootstrap(values[:, frame], seed=seed)
        yield None, metric, baseline, bootstrap(values.mean(1), seed=seed)


def _own_distance(features: Measured, horizon: int, seed: int) -> Found:
    if not features or len(features["truth"]["judge"]) < clips_for_distance(features):
        return
    true = features["truth"]["judge"]
    for baseline, names in features.items():
        if baseline == "truth":
            continue
        made = names["judge"]
        for frames in [*parts_of(horizon), None]:
            some = slice(None) if frames is None else frames
            sides = [side[:, :, some].flatten(1, 2) for side in (made, true)]
            yield frames, "frechet_own", baseline, frechet_estimate(sides[0], sides[1], seed)


def clips_for_distance(features: Measured) -> int:
    """Return how many clips a distance of the judge's features needs."""
    return CLIPS_PER_FEATURE * features["truth"]["judge"].shape[-1]


def _fvd(found: Measured, protocol: NamedProtocol) -> Found:
    if not found:
        return
    made, true = found["model"]["i3d"], found["truth"]["i3d"]
    estimate = fvd_estimate(made, true.expand_as(made), protocol.fvd_sets, protocol.seed)
    yield slice(0, protocol.horizon), "fvd", "model", estimate
    yield None, "fvd", "model", estimate


def clip_values(gathered: Gathered, windows: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return for each clip where it is and, by metric, the mean over the predicted frames of each
    of its trajectories."""
    values = {
        metric: numbers.double().mean(2).tolist()
        for metric, numbers in gathered.of("values").get("model", {}).items()
    }
    errors = gathered.of("errors").get("model")
    if errors is not None:
        values["action_error"] = errors["action"].double().mean(2).tolist()
    return [
        {
            "episode": episode,
            "start": start,
            "values": {metric: numbers[index] for metric, numbers in values.items()},
        }
        for index, (episode, start) in enumerate(windows)
    ]


def ranking(
    gathered: Gathered, protocol: NamedProtocol
) -> tuple[str, Float[Tensor, " b"], Int[Tensor, " b"]]:
    """Return the metric by which clips are ranked, each clip's number, and the trajectory to show.

    The metric is LPIPS where it was measured, else PSNR. The trajectory is the best one where the
    protocol takes the best, else the first.
    """
    values = gathered.of("values")["model"]
    metric = "lpips" if "lpips" in values else "psnr_per_frame"
    numbers = _of_clips(metric, values[metric], protocol).mean(1)
    chosen = torch.zeros(len(numbers), dtype=torch.long)
    if protocol.trajectories == "best":
        chosen = best_trajectories(metric, values[metric], protocol)
    return metric, numbers, chosen
