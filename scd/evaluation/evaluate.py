"""`scd evaluate`: one checkpoint on held-out clips, by a fixed protocol.

Horizon h is the h-th predicted frame, and only that frame. What is measured:
scd/evaluation/measure.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device
from scd.data.source import Split, open_source
from scd.evaluation.inverse_dynamics import load_judge
from scd.evaluation.measure import measure
from scd.evaluation.plots import plot_metrics
from scd.evaluation.predict import NUM_CLIPS, TIMED, Protocol, check_fit, summarize
from scd.models.build import num_parameters
from scd.models.checkpoint import load_world
from scd.models.flow import with_num_steps
from scd.streaming.rollout import Guidance


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
    judge: str = ""
    """Folder of a judge of the same data (scd train-judge): measures control and frechet_own too.
    Empty: neither."""
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


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure a checkpoint, write the result and its plot, and return the result.

    Raises:
        FileNotFoundError: no such run, data or judge.
        ValueError: no episode is as long as context and horizon together, fewer clips than asked
            for, a context or horizon below 1, or data of another kind than the model's or judge's.
    """
    device = choose_device(config.device)
    world = load_world(config.run, config.weights, device)
    source = open_source(config.data, config.split, config.strict)
    check_fit(world, source.card, config.data)
    judge = load_judge(config.judge, device) if config.judge else None
    if judge is not None:
        judge.check_fit(source.card, config.data)
    sampling = with_num_steps(world.sampling, config.num_steps)
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
    measured = measure(world, source, protocol, judge=judge)
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
        "judge": None if judge is None else {"digest": judge.digest, "held_out": judge.held_out},
        "settings": to_json(replace(config, num_clips=protocol.num_clips)),
    } | provenance(device)
    out = Path(config.out)
    write_json(result, out)
    found = {row["metric"] for row in measured.rows}
    wanted = ("psnr", "psnr_gain", "ssim", "sharpness", "control", "control_error", "frechet_own")
    panels = [metric for metric in wanted if metric in found]
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
