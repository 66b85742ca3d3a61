"""Curves of a probe: similarity, attention and importance over layers, candidates for a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.ticker import StrMethodFormatter, SymmetricalLogLocator

from scd.evaluation.media import spread
from scd.evaluation.plots import Ink, curve_panels, finish, legend, text_colour
from scd.probing.maps import draw_bar, draw_map

LABELS = {
    "cosine": "cosine (inflated by the common vector)",
    "flattened": "flattened (inflated too)",
    "centred_by_step": "centred by step",
    "cka": "CKA",
}
"""How plots call measures of similarity whose name alone would not do."""

CURVES = {
    "cosine": "#3b7dd8",
    "flattened": "#7f4fb5",
    "centred": "#d98a2b",
    "centred_by_step": "#c2568f",
    "cka": "#2f9e77",
    "uniform": "#8a8f98",
}
"""Colours of the measures of similarity, and of the uniform baseline of attention."""

SHADES = ("#3b7dd8", "#7f4fb5", "#c2568f", "#d98a2b", "#8f9a2f", "#2f9e77")
"""Colours of some layers, the first one first."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A candidate in the plot of seconds against loss."""

    name: str
    """Written beside it."""
    seconds: float
    """Per frame."""
    loss: float
    """Relative increase."""
    low: float
    """Lower end of the interval of the loss."""
    high: float
    """Upper end."""
    on_front: bool
    """Whether no other candidate is both faster and better."""
    chosen: bool
    """Whether it is the recommended one."""


def plot_similarity(
    matrices: Mapping[str, Float[np.ndarray, "l t t"]],
    names: Sequence[str],
    path: Path,
    ink: Ink,
) -> None:
    """Draw similarity over layers: of all pairs of steps, and of the last fifth with the rest.

    Args:
        matrices: a step by step matrix of each layer, by measure.
        names: of the layers.
        path: a .png file.
        ink: what it will be seen on.
    """
    figure, (every, late) = curve_panels(2, ink)
    layers = range(1, len(names) + 1)
    for name, values in matrices.items():
        for axes, means in zip((every, late), pair_means(values), strict=True):
            axes.plot(
                layers, means, label=LABELS.get(name, name), color=CURVES[name], marker="o",
                markersize=3,
            )  # fmt: skip
    every.set_ylabel("similarity, all pairs of steps")
    late.set_ylabel("similarity, last fifth of the steps\nwith the steps before")
    for axes in (every, late):
        _name_layers(axes, names)
        axes.set_ylim(top=1.03)
        legend(axes, ink)
    finish(figure, path, "", ink)


def pair_means(
    matrices: Float[np.ndarray, "l t t"],
) -> tuple[Float[np.ndarray, " l"], Float[np.ndarray, " l"]]:
    """Average matrices over pairs of different steps, and over (last fifth, before) pairs."""
    num_steps = matrices.shape[-1]
    different = ~np.eye(num_steps, dtype=bool)
    first_late = num_steps - max(1, round(num_steps / 5))
    late = matrices[:, first_late:, :first_late]
    return matrices[:, different].mean(axis=-1), late.mean(axis=(-2, -1))


def plot_past_mass(
    mass: Float[np.ndarray, "l k t"],
    uniform: Float[np.ndarray, " l"],
    names: Sequence[str],
    path: Path,
    ink: Ink,
) -> None:
    """Draw the mass of attention on earlier frames: over layers, over heads, over steps.

    Args:
        mass: of each layer, head and step, in [0, 1].
        uniform: what each layer would give if it looked everywhere alike.
        names: of the layers.
        path: a .png file.
        ink: what it will be seen on.
    """
    figure, (curve, heads, steps) = curve_panels(3, ink)
    layers = range(1, len(names) + 1)
    of_heads = mass.mean(axis=2)
    curve.plot(layers, uniform, color=CURVES["uniform"], linestyle="--", label="uniform")
    curve.plot(
        layers, of_heads.mean(axis=1), color=CURVES["cosine"], marker="o", markersize=3,
        label="mean of heads",
    )  # fmt: skip
    curve.fill_between(
        layers, of_heads.min(axis=1), of_heads.max(axis=1), color=CURVES["cosine"], alpha=0.2,
        linewidth=0, label="lowest to highest head",
    )  # fmt: skip
    curve.set_ylim(-0.02, 1.02)
    curve.set_ylabel("attention on earlier frames")
    _name_layers(curve, names)
    legend(curve, ink)
    for axes, values, label in (
        (heads, of_heads, "head"),
        (steps, mass.mean(axis=1), "step"),
    ):
        drawn = draw_map(axes, values, names, Normalize(0, 1))
        axes.set_xlabel(label)
        draw_bar(figure, drawn, [axes], ink)
    finish(figure, path, "", ink)


def plot_distances(
    profile: Float[np.ndarray, "l t"], names: Sequence[str], path: Path, ink: Ink
) -> None:
    """Draw how far back attention looks: mass against the distance in frames, 0 its own frame."""
    figure, (axes, every) = curve_panels(2, ink)
    distances = range(profile.shape[1])
    for colour, layer in zip(SHADES, spread(len(names), len(SHADES)), strict=False):
        axes.plot(
            distances, profile[layer], label=names[layer], marker="o", markersize=3, color=colour
        )
    axes.axhline(1 / profile.shape[1], color=CURVES["uniform"], linestyle="--", label="uniform")
    axes.set_yscale("log")
    axes.set_ylim(max(1e-4, float(profile[profile > 0].min()) / 2), 1.2)
    axes.set_xlabel("frames back")
    axes.set_ylabel("attention")
    legend(axes, ink)
    drawn = draw_map(every, profile, names, PowerNorm(0.5, 0, 1))
    every.set_xticks(list(distances), [str(distance) for distance in distances])
    every.set_xlabel("frames back")
    draw_bar(figure, drawn, [every], ink)
    finish(figure, path, "", ink)


def plot_leave_one_out(
    mean: Float[np.ndarray, " l"],
    low: Float[np.ndarray, " l"],
    high: Float[np.ndarray, " l"],
    names: Sequence[str],
    path: Path,
    ink: Ink,
) -> None:
    """Draw the relative increase of the loss without each layer, with intervals over clips."""
    figure, (axes,) = curve_panels(1, ink)
    figure.set_size_inches(7.5, 3.4)
    layers = np.arange(1, len(names) + 1)
    percent = 100 * mean
    axes.bar(layers, percent, color=CURVES["cosine"], width=0.7)
    spread_of = np.maximum([percent - 100 * low, 100 * high - percent], 0)
    axes.errorbar(
        layers, percent, yerr=spread_of, fmt="none", ecolor=text_colour(ink), capsize=2, linewidth=1
    )
    _scale_percent(axes)
    axes.set_ylabel("loss without the layer, + %")
    axes.axhline(0, color=text_colour(ink), linewidth=0.8)
    _name_layers(axes, names)
    finish(figure, path, "", ink)


def plot_front(points: Sequence[Point], dense_seconds: float, path: Path, ink: Ink) -> None:
    """Draw candidates for a split: predicted seconds per frame against predicted loss."""
    figure, (axes,) = curve_panels(1, ink)
    figure.set_size_inches(7.5, 4.2)
    axes.axvline(1e3 * dense_seconds, color=CURVES["uniform"], linestyle="--", label="unsplit")
    front = sorted((point for point in points if point.on_front), key=lambda one: one.seconds)
    axes.plot(
        [1e3 * point.seconds for point in front], [100 * point.loss for point in front],
        color=CURVES["cosine"], linewidth=1, label="front",
    )  # fmt: skip
    for point in points:
        colour = CURVES["centred"] if point.chosen else CURVES["cosine"]
        at = (1e3 * point.seconds, 100 * point.loss)
        if point.on_front:
            axes.vlines(at[0], 100 * point.low, 100 * point.high, color=colour, linewidth=1)
            axes.annotate(
                point.name, at, textcoords="offset points", xytext=(5, 4), fontsize=7,
                color=text_colour(ink),
            )  # fmt: skip
        axes.plot(
            *at, color=colour, marker="*" if point.chosen else "o", linestyle="none",
            markersize=13 if point.chosen else 4, alpha=1 if point.on_front else 0.35,
            label="recommended" if point.chosen else None,
        )  # fmt: skip
    _scale_percent(axes)
    axes.set_xlabel("predicted ms per frame")
    axes.set_ylabel("predicted loss, + %")
    legend(axes, ink)
    finish(figure, path, "", ink)


def _scale_percent(axes: Axes) -> None:
    # Losses span orders of magnitude, and some are 0 or even below.
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(linthresh=1, base=10, subs=[1, 2, 5]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    shown = [place for place in spread(len(names), 14)]
    kinds = {name.rpartition(" ")[0] for name in names}
    labels = [names[place].rpartition(" ")[2] if len(kinds) == 1 else names[place]
              for place in shown]  # fmt: skip
    axes.set_xticks([place + 1 for place in shown], labels)
    if len(kinds) == 1:
        axes.set_xlabel(kinds.pop())
    else:
        axes.tick_params(axis="x", labelrotation=45, labelsize=7)
