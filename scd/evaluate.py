"""Rollouts on held-out clips, measured against the truth by a fixed protocol.

Horizon h is the h-th predicted frame, and only that frame. Baselines are measured on the same
clips: `repeat_last` shows the last given frame again, `shuffled_actions` is the model steered by
the actions of another clip: a model that listens must lose by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from scd.checkpoint import World, load_world
from scd.clip import Batch, Conditions
from scd.config import to_json
from scd.data.folder import open_source
from scd.data.source import Source, Split
from scd.data.toy import ToyWorld
from scd.metrics.image import SSIM_WINDOW, Estimate, estimates, frame_values, psnr_gain
from scd.metrics.memory import MemoryClips, MemoryScore, find_memory_clips, memory_score
from scd.model.build import num_parameters
from scd.plots import plot_metrics
from scd.predict import (
    NUM_CLIPS,
    TIMED,
    Protocol,
    check_fit,
    choose_windows,
    predict,
    read_windows,
    summarize,
)
from scd.results import provenance, write_json
from scd.rollout import Guidance, Timing
from scd.runtime import choose_device, make_generator


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation of one checkpoint."""

    run: str
    """Run folder, one of its step folders, or a world folder."""
    data: str
    """"toy:32", "toy:64", or a folder of episodes."""
    context: int = 8
    """Frames of each clip that the model is given."""
    horizon: int = 8
    """Frames that it predicts after them."""
    out: str = "evaluation.json"
    """The result; a plot with the same name and the ending .png goes beside it."""
    num_clips: int | None = None
    """Held-out clips, which do not overlap; None: 64, or all there are if they are fewer."""
    split: Split = "val"
    """Part of the data that they are from."""
    seed: int = 0
    """Seed of the choice of clips, the noise, the shuffling and the intervals."""
    num_steps: int | None = None
    """Denoising steps per frame; None: as the checkpoint says."""
    guidance: Guidance = field(default_factory=Guidance)
    """How predictions are pushed away from an unconditional branch."""
    batch_size: int = 16
    """Clips side by side. Other sizes draw other noise."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or those the optimiser moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix != ".json":
            raise ValueError(f"out must be a .json file, got {self.out}")


@dataclass(kw_only=True)
class Measurement:
    """What an evaluation found."""

    rows: list[dict[str, Any]]
    """metric, horizon, mean, ci_low, ci_high, baseline; one for each horizon."""
    overall: list[dict[str, Any]]
    """The same of all predicted frames together, without a horizon."""
    timings: list[Timing]
    """Of the model's steps on full batches, without the first step."""
    left_out: dict[str, str]
    """What could not be measured, and why."""
    memory_events: int = 0
    """Hidden shapes behind the memory score."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure a checkpoint, write the result and its plot, and return the result.

    Raises:
        FileNotFoundError: no such run or data.
        ValueError: no episode is as long as context and horizon together, fewer clips than asked
            for, a context or horizon below 1, or data of another kind than the model's.
    """
    device = choose_device(config.device)
    world = load_world(config.run, config.weights, device)
    source = open_source(config.data, config.split, config.strict)
    check_fit(world, source.card, config.data)
    sampling = world.sampling
    if config.num_steps is not None:
        sampling = replace(sampling, num_steps=config.num_steps)
    protocol = Protocol(
        context=config.context,
        horizon=config.horizon,
        num_clips=NUM_CLIPS if config.num_clips is None else config.num_clips,
        batch_size=config.batch_size,
        seed=config.seed,
        sampling=sampling,
        guidance=config.guidance,
    )
    if config.num_clips is None:
        protocol = protocol.reduced_to(source)
    measured = measure(world, source, protocol)
    result = {
        "rows": measured.rows,
        "overall": measured.overall,
        "left_out": measured.left_out,
        "memory_events": measured.memory_events,
        "seconds_per_frame": summarize(measured.timings),
        "timed": f"{TIMED}; {min(config.batch_size, protocol.num_clips)} clips side by side",
        "model": {
            "kind": type(world.model).__name__,
            "parameters": num_parameters(world.model),
            "sampling": to_json(sampling),
        },
        "settings": to_json(replace(config, num_clips=protocol.num_clips)),
    } | provenance(device)
    out = Path(config.out)
    write_json(result, out)
    panels = ["psnr", "psnr_gain"] + (["ssim"] if "ssim" not in measured.left_out else [])
    plot_metrics(measured.rows, panels, out.with_suffix(".png"), f"{config.run} on {config.data}")
    return result


def readable(result: Mapping[str, Any]) -> str:
    """Return a table for people: each metric's means at the first, middle and last horizon."""
    settings = result["settings"]
    last = settings["horizon"]
    horizons = sorted({1, (last + 1) // 2, last})
    clips = f"{settings['num_clips']} clips of {settings['split']}"
    lines = [f"{clips:32}" + "".join(f"{f'+{horizon}':>9}" for horizon in horizons)]
    means = {(r["metric"], r["baseline"], r["horizon"]): r["mean"] for r in result["rows"]}
    for metric, baseline in dict.fromkeys((metric, baseline) for metric, baseline, _ in means):
        found = [means.get((metric, baseline, horizon)) for horizon in horizons]
        cells = "".join(" " * 9 if mean is None else f"{mean:9.3f}" for mean in found)
        lines.append(f"{metric:15} {baseline:16}{cells}")
    lines += [f"without {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def measure(
    world: World, source: Source, protocol: Protocol, with_memory: bool = True
) -> Measurement:
    """Roll out held-out clips and compare them with the truth and the baselines.

    Args:
        world: what predicts.
        source: the episodes.
        protocol: which clips, and how they are rolled out.
        with_memory: measure the memory score too, where the source is a toy world.

    Raises:
        ValueError: as `evaluate`.
    """
    context, num_frames = protocol.context, protocol.context + protocol.horizon
    windows = choose_windows(source, protocol.num_clips, num_frames, protocol.seed)
    left_out: dict[str, str] = {}
    if min(source.card.height, source.card.width) < SSIM_WINDOW:
        left_out["ssim"] = f"frames are smaller than its window of {SSIM_WINDOW} pixels"
    if not source.card.conditions.has_actions or protocol.num_clips < 2:
        left_out["shuffled_actions"] = "needs actions and two clips"
    shuffled = _another_clip(protocol)
    parts: list[dict[str, dict[str, Tensor]]] = []
    timings: list[Timing] = []
    for number, chosen in enumerate(protocol.batches()):
        batch = read_windows(source, windows[chosen], num_frames)
        predicted = predict(world, batch, protocol, number)
        if len(batch.frames) == min(protocol.batch_size, protocol.num_clips):
            timings += predicted.timings
        true = batch.frames[:, context:]
        repeated = batch.frames[:, context - 1 : context].expand_as(true)
        values = {
            "model": frame_values(predicted.frames, true),
            "repeat_last": frame_values(repeated, true),
        }
        if "shuffled_actions" not in left_out:
            others = [windows[index] for index in shuffled[chosen]]
            actions = read_windows(source, others, num_frames).conditions
            misled = predict(world, batch, protocol, number, actions)
            values["shuffled_actions"] = frame_values(misled.frames, true)
        parts.append(values)
    values = {
        baseline: {name: torch.cat([part[baseline][name] for part in parts]) for name in found}
        for baseline, found in parts[0].items()
    }
    result = Measurement(
        rows=[
            row | {"horizon": index + 1}
            for index in range(protocol.horizon)
            for row in _compare(values, slice(index, index + 1), protocol.seed)
        ],
        overall=_compare(values, slice(0, protocol.horizon), protocol.seed),
        # The first step of a process also pays for what is set up once.
        timings=timings[1:] or timings,
        left_out=left_out,
    )
    if isinstance(source, ToyWorld) and with_memory:
        try:
            clips = find_memory_clips(source, protocol.num_clips, context, protocol.horizon)
        except ValueError as error:
            left_out["memory"] = str(error)
            return result
        for baseline, score in score_memory(world, clips, protocol).items():
            row = row_of("memory", score.estimate, baseline)
            result.rows.append(row | {"horizon": protocol.horizon})
            result.memory_events = score.num_events
    return result


def _compare(
    values: Mapping[str, Mapping[str, Float[Tensor, "b t"]]], frames: slice, seed: int
) -> list[dict[str, Any]]:
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


def _another_clip(protocol: Protocol) -> list[int]:
    """For each clip choose another one, each once: a random cycle through all of them."""
    generator = make_generator(protocol.seed, "shuffle")
    order = torch.randperm(protocol.num_clips, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other.tolist()
