"""What several measurements draw: layers along an axis, maps with a scale, small pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import (
    FuncFormatter,
    MaxNLocator,
    StrMethodFormatter,
    SymmetricalLogLocator,
)

from scd.evaluation.media import spread
from scd.evaluation.plots import Ink, colour_axes, finish, text_colour

BLUE, PURPLE, ORANGE, PINK, GREEN, GREY = (
    "#3b7dd8", "#7f4fb5", "#d98a2b", "#c2568f", "#2f9e77", "#8a8f98",
)  # fmt: skip
"""Colours of curves; grey is what they are compared with."""

NUM_SHOWN = 6
"""Layers that are shown where all would be too many."""

_FROM_ONE = FuncFormatter(lambda place, _: f"{place + 1:.0f}")


def count_from_one(axis: Axis, num_ticks: int | Literal["auto"] = "auto") -> None:
    axis.set_major_locator(MaxNLocator(num_ticks, integer=True))
    axis.set_major_formatter(_FROM_ONE)


def name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Write the names of some layers below an axis that counts them from 1."""
    shown = spread(len(names), 14)
    kinds = {name.rpartition(" ")[0] for name in names}
    labels = [names[place].rpartition(" ")[2] if len(kinds) == 1 else names[place]
              for place in shown]  # fmt: skip
    axes.set_xticks([place + 1 for place in shown], labels)
    if len(kinds) == 1:
        axes.set_xlabel(kinds.pop())
    else:
        axes.tick_params(axis="x", labelrotation=45, labelsize=7)


def scale_percent(axes: Axes) -> None:
    """Scale an axis of losses in percent."""
    # Losses span orders of magnitude, and some are 0 or even below.
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(linthresh=1, base=10, subs=[1, 2, 5]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def draw_map(
    axes: Axes, values: np.ndarray, names: Sequence[str], scale: Normalize, cmap: str = "viridis"
) -> AxesImage:
    """Draw one row of cells for each layer; the columns are counted from 1."""
    axes.grid(False)
    count_from_one(axes.xaxis)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    return axes.imshow(values, norm=scale, cmap=cmap, aspect="auto", interpolation="nearest")


def draw_bar(figure: Figure, drawn: AxesImage, axes: list[Axes], ink: Ink, label: str = "") -> None:
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9, ticks=MaxNLocator(4))
    bar.set_label(label, color=text_colour(ink), fontsize=8)
    bar.ax.tick_params(colors=text_colour(ink), labelsize=7)
    bar.outline.set_edgecolor(text_colour(ink))  # pyright: ignore[reportCallIssue]


def plot_tiles(
    tiles: Float[np.ndarray, "rows columns h w 3"],
    row_names: Sequence[str],
    column_names: Sequence[str],
    label: str,
    path: Path,
    ink: Ink,
) -> None:
    """Draw small pictures side by side, with a name for each row and column.

    Args:
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
