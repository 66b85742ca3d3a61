"""How much the features of a frame change over its denoising steps.

Every token of a transformer carries a large common vector, so that any two features look alike by
plain cosine: with nothing but the common vector left it is 1. Centred cosine subtracts it first.
Source: paper, figure 2a; the centring and CKA (Kornblith et al., "Similarity of Neural Network
Representations Revisited") are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from scd.evaluation import media
from scd.evaluation.html import fragment, plot
from scd.evaluation.plots import Ink, colour_axes, curve_panels, finish, legend, text_colour
from scd.probing.measurement import Entries, Measurement, by_layer
from scd.probing.plan import Plan
from scd.probing.plots import (
    BLUE,
    GREEN,
    NUM_SHOWN,
    ORANGE,
    PINK,
    PURPLE,
    count_from_one,
    draw_bar,
    name_layers,
)
from scd.probing.subject import Progress
from scd.probing.trajectory import Features, layer_features

CURVES = {
    "cosine": ("cosine (inflated by the common vector)", BLUE),
    "flattened": ("flattened (inflated too)", PURPLE),
    "centred": ("centred", ORANGE),
    "centred_by_step": ("centred by step", PINK),
    "cka": ("CKA", GREEN),
}
"""Measures of similarity: what a plot calls them, and their colours."""

SHOWN = ("cosine", "centred", "centred_by_step")
"""Those whose numbers and matrices are shown."""

SECTION = """
<h2>Do features change from step to step?</h2>
<p><strong>Plain cosine is inflated.</strong> All tokens of a transformer share a large common
vector, so any two features look alike. Centred cosine first subtracts each layer's mean token over
tokens, clips and steps. Over all pairs of steps plain cosine lies between {{ cosine }},
depending on the layer, centred cosine between {{ centred }}, and centred by step between
{{ centred_by_step }}.</p>
{{ curves }}{{ matrices }}
<p class="soft">Every row of matrices has its own scale of colours. Flattened: all tokens of a frame
as one vector. Centred by step: each step's own mean token is subtracted, so what all tokens gain in
common from step to step is no change. CKA compares the steps {{ cka_steps | join(", ") }}, by
linear kernel alignment, which centres each step by itself.</p>
"""

NUM_CKA_STEPS = 10
"""Steps that are compared by CKA; each pair costs a product of all features."""

Matrices = Float[np.ndarray, "layers steps steps"]
"""One step x step matrix for each layer."""


@dataclass(frozen=True, kw_only=True)
class StepSimilarity:
    """Similarity of the features of every two steps, of the same frames, averaged over clips."""

    layers: tuple[int, ...]
    """Number of each layer, from 1."""
    cosine: Matrices
    """Of each token with itself at the other step, averaged over tokens."""
    flattened: Matrices
    """Cosine of all tokens of a frame as one vector."""
    centred: Matrices
    """As `cosine`, after the layer's mean token over all tokens, clips and steps is subtracted."""
    centred_by_step: Matrices
    """As `cosine`, after each step's own mean token over all tokens and clips is subtracted: what
    all tokens gain in common from step to step does not count as change."""
    cka: Float[np.ndarray, "layers some some"]
    """Linear centred kernel alignment of the tokens of all clips, each step centred by itself. It
    does not depend on the coordinates of the features."""
    cka_steps: tuple[int, ...]
    """Steps of `cka`, from 1."""


@torch.no_grad()
def step_similarity(
    features: Iterable[Features], num_cka_steps: int = NUM_CKA_STEPS
) -> StepSimilarity:
    """Compare the features of every two steps, layer by layer."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in CURVES}
    layers, steps = [], []
    for one in features:
        tokens = one.tokens
        layers.append(one.layer + 1)
        steps = media.spread(tokens.shape[0], num_cka_steps)
        found["cosine"].append(token_cosine(tokens))
        found["flattened"].append(token_cosine(tokens.flatten(2)[:, :, None]))
        found["centred"].append(token_cosine(centred(tokens)))
        found["centred_by_step"].append(token_cosine(centred(tokens, by_step=True)))
        found["cka"].append(alignment(tokens[steps]))
    if not layers:
        raise ValueError("needed the features of 1 or more layers, got none")
    return StepSimilarity(
        layers=tuple(layers),
        cka_steps=tuple(step + 1 for step in steps),
        **{kind: torch.stack(of_layers).cpu().numpy() for kind, of_layers in found.items()},
    )


def token_cosine(tokens: Float[Tensor, "steps b n d"]) -> Float[Tensor, "steps steps"]:
    """Average over tokens the cosine of each with itself at another step, in -1 .. 1.

    The cosine with a token of zeros is 0.
    """
    unit = functional.normalize(tokens, dim=-1).flatten(1)
    num_tokens = tokens.shape[1] * tokens.shape[2]
    return (unit @ unit.T / num_tokens).clamp(-1, 1)


def centred(
    tokens: Float[Tensor, "steps b n d"], by_step: bool = False
) -> Float[Tensor, "steps b n d"]:
    """Subtract the mean token over all tokens and clips, and over all steps or of each."""
    axes = (1, 2) if by_step else (0, 1, 2)
    # In float64: the common vector may be a thousand times as long as what is left.
    mean = tokens.mean(dim=axes, keepdim=True, dtype=torch.float64)
    return (tokens - mean).float()


def alignment(tokens: Float[Tensor, "steps b n d"]) -> Float[Tensor, "steps steps"]:
    """Return linear CKA of every two steps over all tokens, in 0 .. 1.

    |X' Y|^2 / (|X' X| |Y' Y|) with columns of X and Y centred.
    """
    flat = tokens.flatten(1, 2)
    flat = flat - flat.mean(1, keepdim=True)
    # Scaled first: squares of squares of features leave the range of float32.
    flat = flat / flat.flatten(1).norm(dim=-1).clamp(min=1e-12)[:, None, None]
    num_steps = flat.shape[0]
    crossed = flat.new_zeros(num_steps, num_steps)
    for one in range(num_steps):
        for other in range(one, num_steps):
            crossed[one, other] = crossed[other, one] = (flat[one].T @ flat[other]).square().sum()
    own = crossed.diagonal().sqrt()
    return (crossed / (own[:, None] * own[None, :]).clamp(min=1e-30)).clamp(0, 1)


def measure(plan: Plan, progress: Progress) -> Entries:
    if not plan.stepped:
        return {"left_out": "similarity: none of the chosen layers runs at every step"}
    features = layer_features(plan.subject, plan.task, plan.sampling, plan.stepped, progress)
    found = step_similarity(features)
    matrices = {kind: getattr(found, kind) for kind in CURVES}
    layers = by_layer(found.layers, plan.names, **matrices)
    return {"step_similarity": layers, "cka_steps": list(found.cka_steps)}


def cards(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    layers = result["step_similarity"]
    middle = layers[len(layers) // 2]
    text = "similarity of the last fifth of the steps with the steps before"
    return [
        (f"{pair_means(np.array([middle[kind]]))[1][0]:.2f}", f"{name} {text}, {middle['name']}")
        for kind, name in (("cosine", "plain"), ("centred", "centred"))
    ]


def section(result: Mapping[str, Any], _: Mapping[str, Any]) -> Markup:
    layers = result["step_similarity"]
    names = [one["name"] for one in layers]
    matrices = {kind: np.array([one[kind] for one in layers]) for kind in CURVES}
    means = {kind: pair_means(matrices[kind])[0] for kind in SHOWN}
    return fragment(
        SECTION,
        curves=plot(partial(plot_similarity, matrices, names), "Similarity of steps over layers"),
        matrices=plot(
            partial(plot_matrices, {kind: matrices[kind] for kind in SHOWN}, names),
            "Similarity of every two steps in some layers",
        ),
        cka_steps=result["cka_steps"],
        **{kind: f"{one.min():.2f} and {one.max():.2f}" for kind, one in means.items()},
    )


def plot_similarity(
    matrices: Mapping[str, Float[np.ndarray, "l t t"]],
    names: Sequence[str],
    path: Path,
    ink: Ink,
) -> None:
    """Draw similarity over layers: of all pairs of steps, and of the last fifth with the rest."""
    figure, (every, late) = curve_panels(2, ink)
    layers = range(1, len(names) + 1)
    for name, values in matrices.items():
        for axes, means in zip((every, late), pair_means(values), strict=True):
            label, colour = CURVES[name]
            axes.plot(layers, means, label=label, color=colour, marker="o", markersize=3)
    every.set_ylabel("similarity, all pairs of steps")
    late.set_ylabel("similarity, last fifth of the steps\nwith the steps before")
    for axes in (every, late):
        name_layers(axes, names)
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


def plot_matrices(
    matrices: Mapping[str, Float[np.ndarray, "l t t"]],
    names: Sequence[str],
    path: Path,
    ink: Ink,
) -> None:
    """Draw the step by step matrices of some layers, one row per measure with its own scale."""
    shown = media.spread(len(names), NUM_SHOWN)
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
            count_from_one(axes.xaxis, 3)
            count_from_one(axes.yaxis, 3)
            if place == 0:
                axes.set_title(names[layer], fontsize=9, color=text_colour(ink))
        row[0].set_ylabel(f"{kind.replace('_', ' ')}\nstep", fontsize=8)
        draw_bar(figure, drawn, list(row), ink)
    finish(figure, path, "", ink)


MEASUREMENT = Measurement(measure=measure, section=section, place=20, cards=cards)
