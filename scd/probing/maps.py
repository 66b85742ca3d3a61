"""Maps of a probe: matrices of steps, small pictures side by side, layers against anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from scd.evaluation.media import spread
from scd.evaluation.plots import Ink, colour_axes, curve_panels, finish, text_colour

NUM_SHOWN = 6
"""Layers that are shown where all would be too many."""

ANNOTATED = 16
"""Columns up to which the cells of a map carry their numbers."""

_FROM_ONE = FuncFormatter(lambda place, _: f"{place + 1:.0f}")


def plot_matrices(
    matrices: Mapping[str, Float[np.ndarray, "l t t"]],
    names: Sequence[str],
    path: Path,
    ink: Ink,
) -> None:
    """Draw the step by step matrices of some layers, one row per measure with its own scale."""
    shown = spread(len(names), NUM_SHOWN)
    figure = Figure(
        figsize=(1.75 * len(shown) + 1.1, 1.85 * len(matrices) + 0.2), dpi=130, layout="constrained"
    )
    grid = figure.subplots(len(matrices), len(shown), squeeze=False)
    for place, (kind, values) in enumerate(matrices.items()):
        row = grid[place]
        scale = Normalize(float(values.min()), max(1.0, float(values.min()) + 1e-3))
        for axes, layer in zip(row, shown, strict=True):
            drawn = axes.imshow(values[layer], norm=scale, cmap="viridis")
            colour_axes(axes, ink)
            axes.tick_params(labelsize=7)
            for side in (axes.xaxis, axes.yaxis):
                side.set_major_locator(MaxNLocator(3, integer=True))
                side.set_major_formatter(_FROM_ONE)
            if place == 0:
                axes.set_title(names[layer], fontsize=9, color=text_colour(ink))
        row[0].set_ylabel(f"{kind}\nstep", fontsize=8)
        draw_bar(figure, drawn, list(row), ink)
    finish(figure, path, "", ink)


def plot_tiles(
    tiles: Float[np.ndarray, "rows columns h w 3"],
    row_names: Sequence[str],
    column_names: Sequence[str],
    path: Path,
    ink: Ink,
    label: str = "",
) -> None:
    """Draw small pictures side by side, with a name for each row and column.

    Args:
        tiles: colours in [0, 1].
        row_names: from top to bottom.
        column_names: from left to right.
        path: a .png file.
        ink: what it will be seen on.
        label: below the columns.
    """
    num_rows, num_columns, height, width, _ = tiles.shape
    gap = 1 / 16
    picture = np.zeros((num_rows, num_columns, 16 * height + height, 16 * width + width, 4))
    large = tiles.repeat(16, axis=2).repeat(16, axis=3)
    picture[:, :, : 16 * height, : 16 * width, :3] = large
    picture[:, :, : 16 * height, : 16 * width, 3] = 1
    picture = picture.transpose(0, 2, 1, 3, 4).reshape(
        num_rows * 17 * height, num_columns * 17 * width, 4
    )
    size = 0.72 * min(1.0, 12 / num_columns)
    figure = Figure(
        figsize=(size * num_columns * width / height + 1.3, size * num_rows + 0.6),
        dpi=130,
        layout="constrained",
    )
    axes = figure.subplots()
    axes.imshow(
        picture, interpolation="nearest", extent=(0.0, float(num_columns), float(num_rows), 0.0),
        aspect=height / width,
    )  # fmt: skip
    axes.set_xticks([at + 0.5 - gap / 2 for at in range(num_columns)], column_names, fontsize=8)
    axes.set_yticks([at + 0.5 - gap / 2 for at in range(num_rows)], row_names, fontsize=8)
    axes.set_xlabel(label, fontsize=8)
    colour_axes(axes, ink)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    finish(figure, path, "", ink)


def plot_reuse(
    losses: Float[np.ndarray, "l t"],
    gains: Float[np.ndarray, "l t"],
    names: Sequence[str],
    steps: Sequence[int],
    path: Path,
    ink: Ink,
) -> None:
    """Draw two maps of reuse: relative loss and change of PSNR, layers up against first step.

    Args:
        losses: relative increase of the velocity loss.
        gains: PSNR of the finished frame minus that of the untouched one, dB.
        names: of the last frozen layer.
        steps: after which features are reused, from 1.
        path: a .png file.
        ink: what it will be seen on.
    """
    size = (max(4.2, 0.42 * len(steps) + 1.6), max(3.0, 0.27 * len(names) + 1.1))
    figure, panels = curve_panels(2, ink)
    figure.set_size_inches(2 * size[0], size[1])
    worst = min(float(gains.min()), -0.1)
    for axes, values, scale, label, form in (
        (panels[0], 100 * losses, PowerNorm(0.5, 0, max(float(100 * losses.max()), 1.0), clip=True),
         "loss, + %", "{:.0f}"),
        (panels[1], gains, Normalize(worst, 0), "PSNR, dB", "{:+.1f}"),
    ):  # fmt: skip
        cmap = "viridis" if axes is panels[1] else "viridis_r"
        drawn = draw_map(axes, values, names, scale, cmap)
        axes.set_xticks(range(len(steps)), [str(step) for step in steps], fontsize=7)
        axes.set_xlabel("reused after step")
        axes.set_ylabel("layers up to")
        if len(steps) <= ANNOTATED:
            _annotate(axes, values, scale, cmap == "viridis_r", form)
        draw_bar(figure, drawn, [axes], ink, label)
    finish(figure, path, "", ink)


def draw_map(
    axes: Axes, values: np.ndarray, names: Sequence[str], scale: Normalize, cmap: str = "viridis"
) -> AxesImage:
    """Draw one row of cells for each layer; the columns are counted from 1."""
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(_FROM_ONE)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    return axes.imshow(values, norm=scale, cmap=cmap, aspect="auto", interpolation="nearest")


def _annotate(
    axes: Axes, values: np.ndarray, scale: Normalize, dark_is_high: bool, form: str
) -> None:
    for row, column in np.ndindex(*values.shape):
        high = float(scale(values[row, column])) > 0.55
        axes.text(
            column, row, form.format(values[row, column]), ha="center", va="center", fontsize=6,
            color="white" if high == dark_is_high else "black",
        )  # fmt: skip


def draw_bar(figure: Figure, drawn: AxesImage, axes: list[Axes], ink: Ink, label: str = "") -> None:
    """Draw the scale of colours beside panels."""
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9)
    bar.set_label(label, color=text_colour(ink), fontsize=8)
    bar.ax.tick_params(colors=text_colour(ink), labelsize=7)
    bar.outline.set_edgecolor(text_colour(ink))  # pyright: ignore[reportCallIssue]
