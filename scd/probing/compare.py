"""`scd intervene`: change a model, finetune, measure, time and tabulate; what is done is skipped.

Beside the models (scd/probing/intervention_models.py) the folder holds `evaluations/` and the
result: `intervention.json`, `table.md` and `intervention.png`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scd.common.config import to_json
from scd.common.files import read_json
from scd.common.provenance import provenance, write_json, write_text
from scd.common.runtime import choose_device, cpu_threads
from scd.common.threads import ThreadChoice
from scd.data.source import Source, open_source
from scd.engine.open import open_engine, stream_threads
from scd.evaluation.metrics import find_row
from scd.evaluation.plots import plot_metrics
from scd.evaluation.predict import (
    TIMED,
    check_fit,
    choose_clips,
    choose_windows,
    read_windows,
    reduced_to,
    step_in_turns,
    summarize,
)
from scd.evaluation.protocols import Protocol
from scd.evaluation.trial import measure
from scd.models.build import num_parameters
from scd.models.checkpoint import World, load_world
from scd.models.config import SeparableConfig
from scd.probing.intervention_models import Candidate, Start, candidates, claim
from scd.probing.interventions import Comparison, Intervention
from scd.streaming.rollout import Rollout, Timing

NUM_WARM_UP = 8
"""First frames of a timed stream that do not count: caches fill, tables are made."""

WORDS = {
    "untouched": "the run as it is",
    "before": "changed, not finetuned",
    "after": "changed, finetuned",
    "control": "as it is, finetuned equally long",
    "scratch": "separable from scratch, equal compute",
}


def intervene(intervention: Intervention) -> dict[str, Any]:
    """Run an intervention, and return the content of its intervention.json.

    Raises:
        ValueError: the run's model cannot be changed like this, or the data does not fit it.
        FileNotFoundError: no such run or data.
        FileExistsError: the folder holds another intervention.
        Interrupted: a signal came; the same command goes on from there.
    """
    common = intervention.comparison
    out = Path(common.out)
    start = claim(intervention, out)
    device = choose_device(common.device)
    untouched = load_world(out / "untouched", device=device)
    source = open_source(common.data or start.base.data, "val", start.base.strict)
    check_fit(untouched, source.card, common.data or start.base.data)
    protocol = Protocol(
        context=common.context,
        horizon=common.horizon,
        num_clips=common.num_clips,
        batch_size=common.batch_size,
    )
    protocol = reduced_to(protocol, source)
    choose_clips(source, protocol, common.data or start.base.data)
    models = candidates(intervention, start, untouched, out)
    with ThreadChoice(common.threads, active=device.type == "cpu") as threads:
        measured = {
            name: _evaluated(one, source, protocol, out / "evaluations" / f"{name}.json", threads)
            for name, one in models.items()
        }
    with cpu_threads(stream_threads(common.threads, untouched.model.config)):
        timings = time_in_turns(
            {name: one.world for name, one in models.items()}, source, protocol, common
        )
    result = _result(intervention, start, models, measured, timings)
    result |= {"settings": to_json(intervention), "protocol": to_json(protocol)}
    result |= provenance(device)
    write_json(result, out / "intervention.json")
    write_text(markdown(result), out / "table.md")
    plot(result, out / "intervention.png")
    return result


def _evaluated(
    one: Candidate, source: Source, protocol: Protocol, path: Path, threads: ThreadChoice
) -> dict[str, Any]:
    if path.is_file():
        return read_json(path)
    measured = measure(one.world, source, protocol, threads=threads)
    values = {
        "rows": measured.rows,
        "overall": measured.overall,
        "left_out": measured.left_out,
    }
    write_json(values, path)
    return values


def time_in_turns(
    worlds: Mapping[str, World], source: Source, protocol: Protocol, common: Comparison
) -> dict[str, list[Timing]]:
    """Time the frames of one stream of each world, in turns, after the warm-up.

    The clip's actions repeat if it is too short.
    """
    length = protocol.context + protocol.horizon
    batch = read_windows(source, choose_windows(source, 1, length, protocol.seed), length)
    given, actions = protocol.context, batch.conditions.actions
    rollouts = {
        name: Rollout(world, engine=open_engine(world.model, common.engine))
        for name, world in worlds.items()
    }
    for rollout in rollouts.values():
        rollout.begin(batch.frames[:, :given], batch.conditions.frames(0, given))
    steps = range(NUM_WARM_UP + common.timed_frames)
    known = [
        None if actions is None else actions[:, given + index % protocol.horizon] for index in steps
    ]
    _, timings = step_in_turns(rollouts, known)
    return {name: all_of[NUM_WARM_UP:] for name, all_of in timings.items()}


def _result(
    intervention: Intervention,
    start: Start,
    models: Mapping[str, Candidate],
    measured: Mapping[str, Mapping[str, Any]],
    timings: Mapping[str, list[Timing]],
) -> dict[str, Any]:
    rows, overall = (
        [row | {"model": name} for name, found in measured.items() for row in found[part]]
        for part in ("rows", "overall")
    )
    seconds = {name: summarize(of_frames) for name, of_frames in timings.items()}
    return {
        "intervention": type(intervention).__name__.removesuffix("Config").lower(),
        "rows": rows,
        "overall": overall,
        "left_out": measured["untouched"]["left_out"],
        "models": {
            name: {
                "kind": type(one.world.model).__name__,
                "settings": to_json(one.world.model.config),
                "parameters": num_parameters(one.world.model),
                "steps": one.steps,
                "train_flops": one.train_flops,
                "seconds_per_frame": seconds[name]["total"]["p50"],
                "timing": seconds[name],
            }
            for name, one in models.items()
        },
        "sampling": to_json(models["untouched"].world.sampling),
        "timed": f"{TIMED}; one stream of each model, frame by frame in turns with the "
        f"{intervention.comparison.engine} engine, {intervention.comparison.timed_frames} frames "
        f"after {NUM_WARM_UP} that do not count; seconds_per_frame is the median total",
        "trained": "untouched: the run as it is; before: changed, not trained further; after: "
        f"changed and finetuned for {intervention.comparison.max_steps} steps; control: the run "
        "as it is, finetuned equally long; scratch: the separable model trained from random "
        "weights with as many operations (forward and backward, by scd.plan) as the run and the "
        "finetuning took together, and with the run's own schedule",
        "run_steps": start.steps,
        "is_separable": isinstance(models["after"].world.model.config, SeparableConfig),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return a Markdown table: quality with 95 % intervals, training and time per frame."""
    horizon = result["protocol"]["horizon"]
    horizons = sorted({1, (horizon + 1) // 2, horizon})
    columns = [("psnr", h) for h in horizons]
    if "ssim" not in result["left_out"]:
        columns.append(("ssim", horizon))
    if "shuffled_actions" not in result["left_out"]:
        columns.append(("psnr lost by wrong actions", horizon))
    titles = [
        f"{metric.replace('psnr', 'PSNR').replace('ssim', 'SSIM')} +{h}" for metric, h in columns
    ]
    head = ["model", "steps", "training, TFLOP", *titles, "ms per frame", "speed-up"]
    models = result["models"]
    slowest = models["untouched"]["seconds_per_frame"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, model in models.items():
        rows = [row for row in result["rows"] if row["model"] == name]
        cells = [_cell(rows, metric, h) for metric, h in columns]
        seconds = model["seconds_per_frame"]
        cells += [f"{1000 * seconds:.1f}", f"{slowest / seconds:.2f}"]
        training = [str(model["steps"]), f"{model['train_flops'] / 1e12:.3g}"]
        lines.append(f"| {' | '.join([WORDS[name], *training, *cells])} |")
    notes = [
        f"{result['protocol']['num_clips']} held-out clips, the same for all; in brackets 95 % "
        "intervals over clips.",
        f"Time: {result['timed']}.",
        f"Models: {result['trained']}.",
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def _cell(rows: list[Mapping[str, Any]], metric: str, horizon: int) -> str:
    if metric == "psnr lost by wrong actions":
        right = find_row(rows, "psnr", horizon)["mean"]
        return f"{right - find_row(rows, 'psnr', horizon, 'shuffled_actions')['mean']:.2f}"
    row = find_row(rows, metric, horizon)
    digits = 3 if metric == "ssim" else 2
    low, high = (f"{row[name]:.{digits}f}" for name in ("ci_low", "ci_high"))
    return f"{row['mean']:.{digits}f} ({low} .. {high})"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw quality against the horizon, a curve for each model and one for the last frame."""
    rows = [
        row | {"baseline": row["model"]} for row in result["rows"] if row["baseline"] == "model"
    ]
    # The same for every model: nothing is predicted.
    rows += [
        row
        for row in result["rows"]
        if row["baseline"] == "repeat_last" and row["model"] == "untouched"
    ]
    panels = ["psnr"] + (["ssim"] if "ssim" not in result["left_out"] else [])
    plot_metrics(rows, panels, path, f"{result['intervention']}: before and after finetuning")
