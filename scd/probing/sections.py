"""The sections of a probe's page, one for each measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from scd.evaluation.html import show_plot, table
from scd.evaluation.media import spread
from scd.evaluation.plots import Ink
from scd.probing.maps import plot_matrices, plot_reuse, plot_tiles
from scd.probing.plots import (
    pair_means,
    plot_distances,
    plot_leave_one_out,
    plot_past_mass,
    plot_similarity,
)

NUM_PICTURED = 6
"""Layers whose colours and attention maps are shown where all would be too many."""

Draw = Callable[[Path, Ink], None]
"""Draws one plot to a file for one kind of page."""


class Plots:
    """Draws each plot for light and dark pages and returns it as part of the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def __call__(self, draw: Draw, text: str, size: str = "grid") -> str:
        self.number += 1
        light = self.folder / f"{self.number}-light.png"
        dark = self.folder / f"{self.number}-dark.png"
        draw(light, "on light")
        draw(dark, "on dark")
        return show_plot((light, dark), text, size)


def show_similarity(result: Mapping[str, Any], _: Any, plots: Plots) -> str:
    """Show how much features change from step to step, plain and centred."""
    layers = result["step_similarity"]
    names = [one["name"] for one in layers]
    kinds = ("cosine", "flattened", "centred", "centred_by_step", "cka")
    matrices = {kind: np.array([one[kind] for one in layers]) for kind in kinds}
    shown = ("cosine", "centred", "centred_by_step")
    plain, centred, by_step = (pair_means(matrices[kind])[0] for kind in shown)
    return (
        "<h2>Do features change from step to step?</h2>"
        "<p><strong>Plain cosine is inflated.</strong> All tokens of a transformer share a large "
        "common vector, so any two features look alike. Centred cosine takes each layer's mean "
        "token over tokens, clips and steps away first. Over all pairs of steps plain cosine lies "
        f"between {plain.min():.2f} and {plain.max():.2f}, depending on the layer, centred cosine "
        f"between {centred.min():.2f} and {centred.max():.2f}, and centred by step between "
        f"{by_step.min():.2f} and {by_step.max():.2f}.</p>"
        + plots(
            lambda path, ink: plot_similarity(matrices, names, path, ink),
            "Similarity of steps over layers",
        )
        + plots(
            lambda path, ink: plot_matrices(
                {kind.replace("_", " "): matrices[kind] for kind in shown}, names, path, ink
            ),
            "Similarity of every two steps in some layers",
        )
        + '<p class="soft">Every row of matrices has its own scale of colours. Flattened: all '
        "tokens of a frame as one vector. Centred by step: each step's own mean token is taken "
        "away, so what all tokens gain in common as the time goes by is no change. CKA compares "
        "the steps "
        f"{', '.join(map(str, result['cka_steps']))}, by linear kernel alignment, which centres "
        "each step by itself.</p>"
    )


def show_colours(result: Mapping[str, Any], pictures: Mapping[str, Any], plots: Plots) -> str:
    """Show principal components as colours."""
    layers, found = result["principal_components"], pictures["colours"]
    shown = spread(len(layers), NUM_PICTURED)
    colours = np.array(found["colours"])[shown][:, 0]
    names = [layers[place]["name"] for place in shown]
    steps = [str(step) for step in found["steps"]]
    first = np.array([one["agreement"][0] for one in layers])
    lines = [
        [
            escape(one["name"]),
            *(f"{value:.2f}" for value in one["agreement"][0]),
            *(f"{value:.2f}" for value in one["agreement"][len(one["agreement"]) // 2]),
            f"{100 * sum(one['explained']):.0f} %",
        ]
        for one in layers
    ]
    parts = [f"{when} {number}" for when in ("first step:", "middle:") for number in (1, 2, 3)]
    return (
        "<h2>Features as colours</h2>"
        "<p>The first three principal components of a frame's tokens over all steps, as red, green "
        "and blue, on one scale. The first component of the first step agrees with that of the "
        f"last by {first[:, 0].min():.2f} to {first[:, 0].max():.2f}, depending on the layer (1: "
        "the same up to scale).</p>"
        + plots(
            lambda path, ink: plot_tiles(colours, names, steps, path, ink, "step"),
            "Principal components of one frame, layers from top to bottom, steps from left",
            "two",
        )
        + table(["|correlation| with the last step", *parts, "variance"], lines)
        + '<p class="soft">One clip is shown; the numbers are means over all clips. Variance: the '
        "share that the three components hold.</p>"
    )


def show_attention(result: Mapping[str, Any], pictures: Mapping[str, Any], plots: Plots) -> str:
    """Show which frames the layers look at."""
    layers, found = result["attention"], pictures["attention"]
    names = [one["name"] for one in layers]
    mass = np.array([one["past_mass_by_step"] for one in layers])
    uniform = np.array([one["uniform"][0] for one in layers])
    profile = np.array([one["by_distance"] for one in layers]).mean(1)
    shown = spread(len(layers), NUM_PICTURED)
    maps = np.array(found["maps"])[shown]
    shown_names = [names[place] for place in shown]
    distances = ["itself", *(f"{back} back" for back in range(1, maps.shape[1]))]
    context = max(np.mean(one["context_mass"]) for one in layers)
    of_context = (
        " The decoder of a separable model sees no earlier frame: its mass on them is 0 by "
        f"construction, and up to {context:.2f} of its attention goes to the context tokens."
        if context > 0
        else ""
    )
    return (
        "<h2>Where do layers look?</h2>"
        "<p>The share of attention that the tokens of the denoised frame give to earlier frames, "
        "beside what it would be if all keys counted alike. It is "
        f"{mass[0].mean():.2f} in {escape(names[0])} and {mass[-1].mean():.2f} in "
        f"{escape(names[-1])}.{of_context}</p>"
        + plots(
            lambda path, ink: plot_past_mass(mass, uniform, names, path, ink),
            "Attention on earlier frames by layer, head and step",
        )
        + plots(
            lambda path, ink: plot_distances(profile, names, path, ink),
            "Attention against the distance of frames",
        )
        + "".join(
            plots(
                lambda path, ink, at=at: plot_tiles(
                    _grey(maps[:, :, at]), shown_names, distances, path, ink
                ),
                f"What the token in {_place(token, maps.shape[-1])} of a frame looks at",
                "two",
            )
            for at, token in enumerate(found["chosen"])
        )
        + '<p class="soft">Maps: what one token of the frame looks at '
        f"({'; '.join(_place(token, maps.shape[-1]) for token in found['chosen'])}), in one clip "
        "at the middle step, averaged over heads; white is the largest weight of its row.</p>"
    )


def _place(token: int, num_columns: int) -> str:
    """Write a token's place for people, who count from 1."""
    row, column = divmod(token, num_columns)
    return f"row {row + 1}, column {column + 1}"


def _grey(maps: np.ndarray) -> np.ndarray:
    """Scale each layer's weights [l t h w] to its largest, as colours."""
    largest = maps.max(axis=(1, 2, 3), keepdims=True)
    # Square roots: most weights are far below the largest.
    return np.sqrt(maps / np.maximum(largest, 1e-12))[..., None].repeat(3, axis=-1)


def show_leave_one_out(result: Mapping[str, Any], _: Any, plots: Plots) -> str:
    """Show what each layer is worth."""
    layers = result["leave_one_out"]
    names = [one["name"] for one in layers]
    mean, low, high = (
        np.array([one[key] for one in layers]) for key in ("relative_loss", "ci_low", "ci_high")
    )
    levels = ", ".join(f"{level:.2f}" for level in result["loss"]["levels"])
    return (
        "<h2>What is lost without a layer?</h2>"
        f"<p>The loss rises most without {escape(names[int(mean.argmax())])}, by "
        f"{100 * mean.max():.0f} %, and least without {escape(names[int(mean.argmin())])}, by "
        f"{100 * mean.min():.1f} %.</p>"
        + plots(
            lambda path, ink: plot_leave_one_out(mean, low, high, names, path, ink),
            "Relative increase of the loss without each layer",
        )
        + f'<p class="soft">Mean over the times {levels}, the same clips and noise for all layers; '
        "95 % intervals by resampling clips. The layer is left out of the pass over the given "
        "frames too.</p>"
    )


def show_reuse(result: Mapping[str, Any], _: Any, plots: Plots) -> str:
    """Show from which step on the features of the first layers may be kept."""
    found = result["reuse"]
    names = [str(layer) for layer in found["layers"]]
    losses, change = np.array(found["relative_loss"]), np.array(found["psnr_change"])
    return (
        "<h2>May features be reused?</h2>"
        "<p>The first layers give in all later steps what they gave in one step, and are not "
        "computed there. This asks directly whether a model can be separated: an encoder's "
        "features are those that may be kept from the first step on.</p>"
        + plots(
            lambda path, ink: plot_reuse(losses, change, names, found["steps"], path, ink),
            "Loss and PSNR when the first layers are kept from a step on",
        )
        + '<p class="soft">Left: the loss of later steps, on the straight path from the true frame '
        "to its noise. Right: the PSNR of finished frames against the true ones, beside that of "
        f"untouched trajectories ({found['psnr_untouched']:.1f} dB). PSNR rewards blur: a frame "
        "that keeps the first step's estimate is the mean of all that may follow, and not worse "
        "by this number.</p>"
    )
