"""The demo's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scd.common.runlog import read_curve
from scd.evaluation.html import interval, plot, write_page
from scd.evaluation.media import Ink
from scd.evaluation.metrics import find_row
from scd.evaluation.plots import plot_loss, plot_metrics

NAMES = {
    "repeat_last": "repeat the last frame",
    "separable": "separable",
    "shuffled_actions": "separable, steered by another clip's actions",
    "dense": "dense, as many steps",
    "dense_equal_time": "dense, as many seconds of training",
}

LABELS = {"psnr": "PSNR", "psnr_gain": "gain", "ssim": "SSIM"}

NOT_CLAIMED = (
    "That these models are good: they were trained for minutes on a toy world of 32x32 pixels. The "
    "paper's have a hundred times as many parameters.",
    "That one way of building a model gives better pictures: this is one seed. The intervals say "
    "how the numbers vary over clips, not over trainings.",
    "That the ratio of seconds per frame holds elsewhere: it depends on layers, frame size, number "
    "of denoising steps, batch size and hardware. Here it is one stream at a time, without an "
    "autoencoder, and neither model is compiled.",
    "That a higher PSNR looks better: it rewards blur. Look at the pictures too.",
    "That the memory score is precise: it counts a few dozen events, as its interval shows.",
)
"""Shown at the end of the report."""


def quality_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of each model and baseline, named as in NAMES."""
    quality = result["quality"]
    rows = [row for row in quality["separable"]["rows"] if row["baseline"] != "model"]
    for name in ("separable", "dense", "dense_equal_time"):
        rows += [
            row | {"baseline": name} for row in quality[name]["rows"] if row["baseline"] == "model"
        ]
    return [row for name in NAMES for row in rows if row["baseline"] == name]


def write_report(
    result: Mapping[str, Any],
    runs: Mapping[str, Path],
    draw_frames: Callable[[Path, Ink], None],
    folder: Path,
) -> None:
    """Write report.html of a demo's result.

    Args:
        result: what report.json holds.
        runs: run folder of each training, for its losses.
        draw_frames: draws some frames of the streams, as `write_stream` returns it.
        folder: holds rollout.mp4, the streams side by side.
    """
    rows, memory = quality_rows(result), result["memory"]
    contexts = sorted({row["context"] for row in memory["rows"]})
    columns = [(metric, horizon) for metric in LABELS for horizon in (1, 4, 8)]
    events = {name: read_curve(run, "step") for name, run in runs.items()}
    curves = {
        name: ([event["step"] for event in of_run], [event["loss"] for event in of_run])
        for name, of_run in events.items()
    }
    pictures = {
        "video": folder / "rollout.mp4",
        "frames": plot(draw_frames, "Frames of the truth and of both models"),
        "quality": plot(
            lambda path, ink: plot_metrics(rows, ["psnr", "psnr_gain"], path, ink=ink),
            "PSNR and gain against the number of predicted frames",
            "two",
        ),
        "loss": plot(
            lambda path, ink: plot_loss(curves, path, ink=ink),
            "Training loss against steps",
            "one",
        ),
    }
    write_page(
        "demo/report.html",
        folder / "report.html",
        title="Separable and dense causal diffusion, side by side",
        result=result,
        not_claimed=NOT_CLAIMED,
        pictures=pictures,
        numbers=_numbers(result),
        quality_header=["", *(f"{LABELS[metric]} +{horizon}" for metric, horizon in columns)],
        quality_lines=_quality_lines(rows, columns),
        speed_lines=_speed_lines(result),
        contexts=contexts,
        memory_header=["", *(f"{context} frames given" for context in contexts)],
        memory_lines=_memory_lines(memory["rows"], contexts),
        training_lines=[
            [
                NAMES[name],
                f"{model['parameters'] / 1e6:.2f} M",
                f"{model['steps']}",
                f"{model['train_seconds']:.0f} s",
                f"{model['train_seconds'] / model['steps'] * 1e3:.0f} ms",
            ]
            for name, model in result["models"].items()
        ],
    )


def _numbers(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = result["seconds_per_frame"]
    gains = [
        (f"{result[f'psnr_gain_db_h{horizon}']:+.2f} dB", f"PSNR above repeating the last frame, "
         f"{horizon} frame{'s' if horizon > 1 else ''} ahead")
        for horizon in (1, 4, 8)
    ]  # fmt: skip
    return gains + [
        (f"{seconds['separable'] * 1e3:.1f} ms", "per frame, separable"),
        (f"{seconds['dense'] * 1e3:.1f} ms", "per frame, dense"),
        (f"{result['ratio_dense_over_separable']:.2f}x", "dense over separable"),
    ]


def _quality_lines(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, int]]
) -> list[list[str]]:
    """Return one line per model and baseline; the gain of repeating the last frame is 0."""
    return [
        [
            text,
            *(
                "0"
                if (metric, name) == ("psnr_gain", "repeat_last")
                else interval(find_row(rows, metric, horizon, name))
                for metric, horizon in columns
            ),
        ]
        for name, text in NAMES.items()
    ]


def _speed_lines(result: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for name, parts in result["timing"].items():
        total = parts["total"]
        seconds = [parts[part]["mean"] for part in ("encoder", "decoder", "total")]
        cells = [f"{1e3 * value:.2f}" for value in (*seconds, total["p50"], total["p99"])]
        lines.append([name, *cells, f"{1 / total['mean']:.1f}"])
    return lines


def _memory_lines(rows: Sequence[Mapping[str, Any]], contexts: Sequence[int]) -> list[list[str]]:
    found = {(row["baseline"], row["context"]): row for row in rows}
    return [
        [NAMES[name].partition(",")[0], *(interval(found[name, context]) for context in contexts)]
        for name in dict.fromkeys(name for name, _ in found)
    ]
