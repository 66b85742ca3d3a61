"""Plots: a metric against the horizon, loss against steps, seconds per frame against context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from scd.evaluation.grids import text_colour, write_figure
from scd.evaluation.media import Ink

COLOURS = {
    "model": "#3b7dd8",
    "separable": "#3b7dd8",
    "dense": "#c2568f",
    "dense_equal_time": "#7f4fb5",
    "repeat_last": "#8a8f98",
    "shuffled_actions": "#d98a2b",
    "truth": "#2f8f5b",
    "unsteered": "#b8483a",
}
"""One colour per curve name, legible on white and on black and told apart by the colour-blind."""

LABELS = {
    "mse": "mean squared error, pixels in [-1, 1]",
    "psnr": "PSNR of the mean squared error, dB",
    "psnr_per_frame": "mean of per-frame PSNR, dB",
    "psnr_gain": "PSNR above repeating the last frame, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "memory": "share of hidden shapes that come back",
    "sharpness": "detail of the frames over the truth's",
    "contrast": "contrast of the frames over the truth's",
    "control": "share of actions that are read back",
    "control_error": "error of actions that are read back",
    "frechet_own": "Frechet distance of\ninverse dynamics features",
    "fvd": "FVD",
    "loss": "loss",
}
"""Axis labels of metrics."""


def plot_metrics(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    path: Path,
    title: str = "",
    ink: Ink = "on white",
) -> None:
    """Draw each metric against the horizon, one curve per baseline, with its 95 % band.

    Args:
        rows: as in an evaluation's JSON: metric, horizon, mean, ci_low, ci_high, baseline.
        metrics: one panel each, from left to right; all must have rows.
        path: a .png file.
        title: above all panels.
        ink: what it will be seen on.
    """
    missing = [name for name in metrics if not any(row["metric"] == name for row in rows)]
    if missing:
        raise ValueError(f"no rows of {missing}; measured: {sorted({r['metric'] for r in rows})}")
    figure, panels = curve_panels(len(metrics), ink)
    for axes, metric in zip(panels, metrics, strict=True):
        here = [row for row in rows if row["metric"] == metric]
        for name in dict.fromkeys(row["baseline"] for row in here):
            curve = sorted(
                (row for row in here if row["baseline"] == name), key=lambda row: row["horizon"]
            )
            horizons = [row["horizon"] for row in curve]
            _curve(
                axes,
                horizons,
                [row["mean"] for row in curve],
                name,
                ([row["ci_low"] for row in curve], [row["ci_high"] for row in curve]),
            )
        axes.set_xlabel("predicted frames")
        axes.set_ylabel(LABELS.get(metric, metric))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        legend(axes, ink)
    finish(figure, path, title, ink)


def plot_loss(
    curves: Mapping[str, tuple[Sequence[int | float], Sequence[int | float]]],
    path: Path,
    title: str = "",
    ink: Ink = "on white",
) -> None:
    """Draw training losses against steps, by name, on a logarithmic scale."""
    figure, (axes,) = curve_panels(1, ink)
    for name, (steps, losses) in curves.items():
        _curve(axes, steps, losses, name, None)
    _scale_by_logarithm(axes)
    axes.set_xlabel("steps")
    axes.set_ylabel(LABELS["loss"])
    legend(axes, ink)
    finish(figure, path, title, ink)


def plot_speed(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str = "", ink: Ink = "on white"
) -> None:
    """Draw milliseconds per frame against the context, one panel per number of steps.

    A curve is named by what tells its rows of `scd bench` from the others.
    """
    if not rows:
        raise ValueError("a plot of speed needs rows of scd bench, got none")
    names = speed_names(rows)
    all_steps = sorted({row["steps"] for row in rows})
    figure, panels = curve_panels(len(all_steps), ink)
    for axes, steps in zip(panels, all_steps, strict=True):
        for name in dict.fromkeys(names):
            curve = sorted(
                (row["context"], 1000 * row["seconds_per_frame_median"])
                for row, its_name in zip(rows, names, strict=True)
                if row["steps"] == steps and its_name == name
            )
            if curve:
                _curve(axes, [at for at, _ in curve], [ms for _, ms in curve], name, None)
        _scale_by_logarithm(axes)
        axes.set_xlabel("frames of context")
        axes.set_ylabel(f"ms per frame, {steps} step{'s' if steps > 1 else ''}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        legend(axes, ink)
    finish(figure, path, title, ink)


def _scale_by_logarithm(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def speed_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each row of `scd bench` by its model, and by what differs among the rows."""
    keys = ("model", "engine", "join", "precision", "batch", "sessions", "guidance", "device")
    varied = [key for key in keys if key == "model" or len({row[key] for row in rows}) > 1]
    numbered = ("batch", "sessions")
    return [
        ", ".join(
            f"{key} {row[key]}" if key in numbered else str(row[key])
            for key in varied
            if row[key] is not None
        )
        for row in rows
    ]


def curve_panels(number: int, ink: Ink) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * number, 3.4), dpi=150, layout="constrained")
    panels = list(figure.subplots(1, number, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        colour_axes(axes, ink)
    return figure, panels


def colour_axes(axes: Axes, ink: Ink) -> None:
    """Give labels, ticks and lines of a panel the colour of text."""
    for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
        part.set_color(text_colour(ink))
    axes.tick_params(which="both", colors=text_colour(ink))
    for spine in axes.spines.values():
        spine.set_color(text_colour(ink))


def _curve(
    axes: Axes,
    xs: Sequence[int | float],
    means: Sequence[int | float],
    name: str,
    band: tuple[Sequence[int | float], Sequence[int | float]] | None,
) -> None:
    colour = COLOURS.get(name)
    # Few points are points: a line through one horizon would not be seen.
    marker = "o" if len(xs) <= 16 else None
    (line,) = axes.plot(
        xs, means, label=name.replace("_", " "), color=colour, marker=marker, markersize=3
    )
    if band is not None:
        axes.fill_between(xs, *band, color=line.get_color(), alpha=0.2, linewidth=0)


def legend(axes: Axes, ink: Ink) -> None:
    axes.legend(frameon=False, labelcolor=text_colour(ink), fontsize=8)


def finish(figure: Figure, path: Path, title: str, ink: Ink) -> None:
    if title:
        figure.suptitle(title, color=text_colour(ink), fontsize=10)
    write_figure(figure, path, transparent=ink != "on white")
