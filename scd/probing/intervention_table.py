"""The comparison of an intervention as a table for people and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scd.evaluation.metrics import find_row
from scd.evaluation.plots import plot_metrics

WORDS = {
    "untouched": "the run as it is",
    "before": "changed, not finetuned",
    "after": "changed, finetuned",
    "control": "as it is, finetuned equally long",
    "scratch": "separable from scratch, equal compute",
}
"""What each model is."""


def markdown(result: Mapping[str, Any]) -> str:
    """Return a Markdown table: quality with 95 % intervals, training, and time per frame."""
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
