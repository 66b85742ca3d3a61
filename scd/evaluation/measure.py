"""Rollouts on held-out clips as rows: each metric by horizon, of the model and of baselines.

Baselines are measured on the same clips: `repeat_last` shows the last given frame again,
`shuffled_actions` is the model steered by the actions of another clip: a model that listens must
lose by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.runtime import make_generator
from scd.data.clip import Batch, Conditions
from scd.data.source import Source
from scd.data.toy import ToyWorld
from scd.evaluation.drift import drift_estimates, frame_looks
from scd.evaluation.image import SSIM_WINDOW, Estimate, estimates, frame_values, psnr_gain
from scd.evaluation.inverse_dynamics import TrainedJudge
from scd.evaluation.judged import JudgedClips
from scd.evaluation.memory import MemoryClips, MemoryScore, find_memory_clips, memory_score
from scd.evaluation.predict import Protocol, choose_windows, predict, read_windows
from scd.models.checkpoint import World
from scd.streaming.rollout import Timing

PerFrame = Mapping[str, Float[Tensor, "b t"]]
"""Numbers of each predicted frame of each clip, by name."""


@dataclass(kw_only=True)
class Measurement:
    """What an evaluation found."""

    rows: list[dict[str, Any]]
    """metric, horizon, mean, ci_low, ci_high, baseline; one for each horizon. A distance between
    sets of frames has one for each quarter of the horizon, at the quarter's last frame."""
    overall: list[dict[str, Any]]
    """The same of all predicted frames together, without a horizon."""
    timings: list[Timing]
    """Of the model's steps on full batches, without the first step."""
    left_out: dict[str, str]
    """What could not be measured, and why."""
    memory_events: int = 0
    """Hidden shapes behind the memory score."""


def measure(
    world: World,
    source: Source,
    protocol: Protocol,
    with_memory: bool = True,
    judge: TrainedJudge | None = None,
) -> Measurement:
    """Roll out held-out clips and compare them with the truth and the baselines.

    Args:
        world: what predicts.
        source: the episodes.
        protocol: which clips, and how they are rolled out.
        with_memory: measure the memory score too, where the source is a toy world.
        judge: measures control and Frechet distance, if given; it fits the source.

    Raises:
        ValueError: as `scd.evaluation.evaluate.evaluate`.
    """
    if protocol.context < 1:
        raise ValueError("context must be 1 or more, got 0: nothing to compare with is known then")
    left_out = _not_measurable(source, protocol)
    judged = None if judge is None else JudgedClips(judge)
    values, looks, timings = _roll_out(world, source, protocol, left_out, judged)
    seed, whole = protocol.seed, slice(0, protocol.horizon)
    result = Measurement(
        rows=[
            row | {"horizon": index + 1}
            for index in range(protocol.horizon)
            for make, numbers in ((compare_rows, values), (drift_rows, looks))
            for row in make(numbers, slice(index, index + 1), seed)
        ],
        overall=compare_rows(values, whole, seed) + drift_rows(looks, whole, seed),
        # The first step of a process also pays for what is set up once.
        timings=timings[1:] or timings,
        left_out=left_out,
    )
    if judged is not None:
        left_out |= judged.left_out(protocol.num_clips)
        for frames, metric, baseline, estimate in judged.estimates(protocol.horizon, seed):
            row = row_of(metric, estimate, baseline)
            if frames is None:
                result.overall.append(row)
            else:
                result.rows.append(row | {"horizon": frames.stop})
    if isinstance(source, ToyWorld) and with_memory:
        _add_memory(result, world, source, protocol)
    return result


def _not_measurable(source: Source, protocol: Protocol) -> dict[str, str]:
    """Say what a source or protocol does not allow, and why."""
    left_out: dict[str, str] = {}
    if min(source.card.height, source.card.width) < SSIM_WINDOW:
        left_out["ssim"] = f"frames are smaller than its window of {SSIM_WINDOW} pixels"
    if not source.card.conditions.has_actions or protocol.num_clips < 2:
        left_out["shuffled_actions"] = "needs actions and two clips"
    return left_out


def _roll_out(
    world: World,
    source: Source,
    protocol: Protocol,
    left_out: Mapping[str, str],
    judged: JudgedClips | None,
) -> tuple[dict[str, PerFrame], dict[str, PerFrame], list[Timing]]:
    """Return metrics and looks of all clips by baseline, looks of the truth too, and timings."""
    context, num_frames = protocol.context, protocol.context + protocol.horizon
    windows = choose_windows(source, protocol.num_clips, num_frames, protocol.seed)
    shuffled = another_clip(protocol)
    values: list[dict[str, PerFrame]] = []
    looks: list[dict[str, PerFrame]] = []
    timings: list[Timing] = []
    for number, chosen in enumerate(protocol.batches()):
        batch = read_windows(source, windows[chosen], num_frames)
        predicted = predict(world, batch, protocol, number)
        if len(batch.frames) == min(protocol.batch_size, protocol.num_clips):
            timings += predicted.timings
        given, true = batch.frames[:, context - 1 : context], batch.frames[:, context:]
        made = {"model": predicted.frames, "repeat_last": given.expand_as(true)}
        steering = {"model": batch.conditions, "truth": batch.conditions}
        if "shuffled_actions" not in left_out:
            others = [windows[index] for index in shuffled[chosen]]
            other = read_windows(source, others, num_frames).conditions
            made["shuffled_actions"] = predict(world, batch, protocol, number, other).frames
            steering |= {"shuffled_actions": other, "unsteered": other}
        values.append({name: frame_values(frames, true) for name, frames in made.items()})
        made["truth"] = true
        looks.append({name: frame_looks(frames) for name, frames in made.items()})
        if judged is not None:
            judged.add(given, made, {name: c.frames(context, None) for name, c in steering.items()})
    return _join(values), _join(looks), timings


def _join(parts: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, PerFrame]:
    """Put the clips of all batches into one tensor for each baseline and name."""
    return {
        baseline: {name: torch.cat([part[baseline][name] for part in parts]) for name in found}
        for baseline, found in parts[0].items()
    }


def _add_memory(result: Measurement, world: World, source: ToyWorld, protocol: Protocol) -> None:
    try:
        clips = find_memory_clips(source, protocol.num_clips, protocol.context, protocol.horizon)
    except ValueError as error:
        result.left_out["memory"] = str(error)
        return
    for baseline, score in score_memory(world, clips, protocol).items():
        row = row_of("memory", score.estimate, baseline)
        result.rows.append(row | {"horizon": protocol.horizon})
        result.memory_events = score.num_events


def drift_rows(looks: Mapping[str, PerFrame], frames: slice, seed: int) -> list[dict[str, Any]]:
    """Make one row per baseline and look, over some predicted frames."""
    some = {
        baseline: {name: value[:, frames] for name, value in found.items()}
        for baseline, found in looks.items()
    }
    true = some.pop("truth")
    return [
        row_of(metric, estimate, baseline)
        for baseline, found in some.items()
        for metric, estimate in drift_estimates(found, true, seed).items()
    ]


def compare_rows(values: Mapping[str, PerFrame], frames: slice, seed: int) -> list[dict[str, Any]]:
    """Make one row per baseline and metric of the mean over some predicted frames."""
    rows = []
    reference = values["repeat_last"]["mse"][:, frames].mean(1)
    for baseline, found in values.items():
        of_clips = {name: value[:, frames].mean(1) for name, value in found.items()}
        measured = estimates(of_clips, seed)
        if baseline != "repeat_last":
            measured["psnr_gain"] = psnr_gain(of_clips["mse"], reference, seed)
        rows += [row_of(metric, estimate, baseline) for metric, estimate in measured.items()]
    return rows


def row_of(metric: str, estimate: Estimate, baseline: str) -> dict[str, Any]:
    """Return one row of a result, without its horizon."""
    return {"metric": metric, "baseline": baseline} | asdict(estimate)


def find_row(
    rows: Sequence[Mapping[str, Any]], metric: str, horizon: int, baseline: str = "model"
) -> Mapping[str, Any]:
    """Return the one row of a metric, horizon and baseline.

    Raises:
        ValueError: there is none.
    """
    for row in rows:
        if (row["metric"], row["horizon"], row["baseline"]) == (metric, horizon, baseline):
            return row
    raise ValueError(f"no row of {metric} at horizon {horizon} for {baseline}")


def score_memory(world: World, clips: MemoryClips, protocol: Protocol) -> dict[str, MemoryScore]:
    """Score a world's memory on clips, and that of repeating the last given frame.

    The world is given the last `protocol.context` of the given frames, so several contexts can be
    compared on the same events and the same predicted frames.

    Raises:
        ValueError: a context longer than the given frames.
    """
    frames, conditions = clips.batch.frames, clips.batch.conditions
    skipped = clips.num_given - protocol.context
    if skipped < 0:
        raise ValueError(
            f"the clips give {clips.num_given} frames, a context of {protocol.context} was needed"
        )
    assert conditions.actions is not None
    predicted = []
    for number, chosen in enumerate(replace(protocol, num_clips=len(frames)).batches()):
        actions = conditions.actions[chosen, skipped:]
        batch = Batch(frames=frames[chosen, skipped:], conditions=Conditions(actions=actions))
        predicted.append(predict(world, batch, protocol, number).frames)
    repeated = frames[:, clips.num_given - 1 : clips.num_given]
    repeated = repeated.expand(-1, frames.shape[1] - clips.num_given, -1, -1, -1)
    return {
        "model": memory_score(torch.cat(predicted), clips, protocol.seed),
        "repeat_last": memory_score(repeated, clips, protocol.seed),
    }


def another_clip(protocol: Protocol) -> list[int]:
    """For each clip choose another one, each once: a random cycle through all of them."""
    generator = make_generator(protocol.seed, "shuffle")
    order = torch.randperm(protocol.num_clips, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other.tolist()
