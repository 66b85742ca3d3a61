"""Pictures to look at: grids of labelled frames, and other figures, as PNG.

Apart from videos, since matplotlib takes a third of a second to import and thirty megabytes, and
whoever serves a world draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from scd.common.files import file_aside
from scd.data.clip import frames_to_pixels
from scd.evaluation.media import Ink, enlarge

CELL_SIZE = 96
"""Pixels that the shorter side of a frame in a grid is enlarged to, at least."""

GAP = 4
"""Pixels between the frames of a grid."""

EMPTY = 235
"""Grey level of a cell of a grid that has no frame, and of the gaps."""


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """One named row of a grid; a row with fewer frames than columns leaves the last ones empty."""

    name: str
    frames: Float[Tensor, "t 3 h w"]


def grid_pixels(rows: Sequence[PictureRow]) -> UInt8[Tensor, "_ _ 3"]:
    """Lay rows of frames out as one picture, enlarged, with gaps; missing frames stay grey."""
    sizes = sorted({tuple(row.frames.shape[-2:]) for row in rows})
    num_columns = max((len(row.frames) for row in rows), default=0)
    if len(sizes) != 1 or num_columns == 0:
        raise ValueError(f"a grid needs frames, all of one size, got sizes {sizes}")
    pixels = [enlarge(frames_to_pixels(row.frames), CELL_SIZE) for row in rows if len(row.frames)]
    height, width = pixels[0].shape[1:3]
    step_down, step_right = height + GAP, width + GAP
    grid = torch.full(
        (len(rows) * step_down + GAP, num_columns * step_right + GAP, 3), EMPTY, dtype=torch.uint8
    )
    for down, row in enumerate(rows):
        top = GAP + down * step_down
        cells = enlarge(frames_to_pixels(row.frames), CELL_SIZE)
        for right, cell in enumerate(cells):
            left = GAP + right * step_right
            grid[top : top + height, left : left + width] = cell
    return grid


def write_grid(
    rows: Sequence[PictureRow], columns: Sequence[str], path: Path, ink: Ink = "on white"
) -> None:
    """Write a PNG of rows of frames, named at the left, with a label above each column.

    Truth stands above prediction by convention; labels are such as the horizon.
    """
    picture = grid_pixels(rows).numpy()
    if ink != "on white":
        # Where white frames would lie in their place; all else lets the page through.
        covers = [replace(row, frames=torch.ones_like(row.frames)) for row in rows]
        alpha = np.where(grid_pixels(covers).numpy()[..., :1] == EMPTY, 0, 255).astype(np.uint8)
        picture = np.concatenate([picture, alpha], axis=-1)
    num_columns = max(len(row.frames) for row in rows)
    if len(columns) != num_columns:
        raise ValueError(f"{num_columns} columns need as many labels, got {len(columns)}")
    height, width = picture.shape[:2]
    step_down, step_right = (height - GAP) / len(rows), (width - GAP) / num_columns
    left, top, edge, dpi = 24 + 8 * max(len(row.name) for row in rows), 28, 8, 100
    figure = Figure(figsize=((left + width + edge) / dpi, (top + height + edge) / dpi), dpi=dpi)
    total_width, total_height = left + width + edge, top + height + edge
    figure.figimage(picture, left, edge)
    colour = text_colour(ink)
    for index, label in enumerate(columns):
        x = left + GAP / 2 + (index + 0.5) * step_right
        figure.text(
            x / total_width,
            1 - (top - 8) / total_height,
            label,
            ha="center",
            va="bottom",
            size=9,
            color=colour,
        )
    for index, row in enumerate(rows):
        y = top + GAP / 2 + (index + 0.5) * step_down
        figure.text(
            (left - 8) / total_width,
            1 - y / total_height,
            row.name,
            ha="right",
            va="center",
            size=9,
            color=colour,
        )
    write_figure(figure, path, transparent=ink != "on white")


def text_colour(ink: Ink) -> str:
    return "#d8dbe0" if ink == "on dark" else "#33373d"


def write_figure(figure: Figure, path: Path, transparent: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(path) as aside:
        figure.savefig(aside, format="png", transparent=transparent)
