"""Feature PCA: first principal components, as colours, on one basis for all steps of a frame.

Source: paper, figure 2b; the agreement in numbers is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from scd.evaluation import media
from scd.evaluation.html import fragment, plot
from scd.probing.measurement import Entries, Measurement, by_layer, plain
from scd.probing.plan import Plan
from scd.probing.plots import NUM_SHOWN, plot_tiles
from scd.probing.subject import Progress
from scd.probing.trajectory import Features, layer_features

NUM_COMPONENTS = 3
"""Components, one for each of red, green and blue."""

EDGES = (0.01, 0.99)
"""Quantiles of a component that become black and full colour."""

SECTION = """
{% from "evaluation/parts.html" import table %}
<h2>Features as colours</h2>
<p>The first three principal components of a frame's tokens over all steps, as red, green and blue,
on one scale. The first component of the first step agrees with that of the last by
{{ "%.2f" % lowest }} to {{ "%.2f" % highest }}, depending on the layer (1: the same up to
scale).</p>
{{ pictures }}
{{ table(header, lines) }}
<p class="soft">One clip is shown; the numbers are means over all clips. Variance: the share that
the three components hold.</p>
"""


@dataclass(frozen=True, kw_only=True)
class FeaturePCA:
    """Principal components of some layers as pictures, and their correlation with the last step."""

    layers: tuple[int, ...]
    """Number of each layer, from 1."""
    steps: tuple[int, ...]
    """Steps that are shown, from 1."""
    pictures: Float[np.ndarray, "layers clips shown rows columns 3"]
    """Components as colours in 0 .. 1. The scale of a component is the same for all steps of a
    frame; the basis is that frame's own, so colours of different clips or layers do not compare."""
    agreement: Float[np.ndarray, "layers steps 3"]
    """|correlation| over tokens of each component with itself at the last step, for all steps,
    averaged over clips."""
    explained: Float[np.ndarray, "layers 3"]
    """Share of the variance that each component holds, averaged over clips."""


@torch.no_grad()
def feature_pca(
    features: Iterable[Features], grid: tuple[int, int], num_clips: int = 2, num_shown: int = 8
) -> FeaturePCA:
    """Find the components of each frame's tokens over all steps, layer by layer.

    Args:
        features: of the layers.
        grid: rows and columns of a frame's tokens.
        num_clips: first clips that are drawn; numbers are over all clips.
        num_shown: steps that are drawn, evenly from the first to the last.
    """
    layers, pictures, agreements, shares, shown = [], [], [], [], []
    for one in features:
        components, share = principal(one.tokens)
        shown = media.spread(one.tokens.shape[0], num_shown)
        picture = coloured(components[:num_clips])[:, shown]
        pictures.append(picture.unflatten(2, grid).cpu().numpy())
        agreements.append(agreement(components).mean(0).cpu().numpy())
        shares.append(share.mean(0).cpu().numpy())
        layers.append(one.layer + 1)
    if not layers:
        raise ValueError("needed the features of 1 or more layers, got none")
    return FeaturePCA(
        layers=tuple(layers),
        steps=tuple(step + 1 for step in shown),
        pictures=np.stack(pictures),
        agreement=np.stack(agreements),
        explained=np.stack(shares),
    )


def principal(
    tokens: Float[Tensor, "steps b n d"],
) -> tuple[Float[Tensor, "b steps n 3"], Float[Tensor, "b 3"]]:
    """Project the tokens of each clip on its first components over all tokens and steps.

    Returns:
        The components, and the share of the variance that each holds.

    Raises:
        ValueError: tokens narrower than three.
    """
    if tokens.shape[-1] < NUM_COMPONENTS:
        raise ValueError(
            f"colours need tokens of width {NUM_COMPONENTS} or more, got {tokens.shape[-1]}"
        )
    by_clip = tokens.transpose(0, 1)
    by_clip = by_clip - by_clip.mean(dim=(1, 2), keepdim=True)
    flat = by_clip.flatten(1, 2)
    values, vectors = torch.linalg.eigh((flat.mT @ flat).double())
    values = values.clamp(min=0)
    basis = vectors[:, :, -NUM_COMPONENTS:].flip(-1)
    # The sign of a component is arbitrary: its largest entry is made positive.
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis = (basis * largest.sign()).float()
    share = values[:, -NUM_COMPONENTS:].flip(-1) / values.sum(-1, keepdim=True).clamp(min=1e-30)
    return by_clip @ basis[:, None], share.float()


def coloured(components: Float[Tensor, "b steps n 3"]) -> Float[Tensor, "b steps n 3"]:
    """Scale each component to 0 .. 1, the same for all steps of a clip."""
    edges = torch.tensor(EDGES, device=components.device)
    low, high = torch.quantile(components.flatten(1, 2), edges, dim=1)[:, :, None, None]
    return ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def agreement(components: Float[Tensor, "b steps n 3"]) -> Float[Tensor, "b steps 3"]:
    """Return |correlation| over tokens of each component with itself at the last step.

    0 where a component does not vary over the tokens.
    """
    deviation = components - components.mean(2, keepdim=True)
    last = deviation[:, -1:]
    product = (deviation * last).sum(2).abs()
    scale = deviation.norm(dim=2) * last.norm(dim=2)
    return (product / scale.clamp(min=1e-30)).clamp(0, 1)


def measure(plan: Plan, progress: Progress) -> Entries:
    if not plan.stepped:
        return {"left_out": "colours: none of the chosen layers runs at every step"}
    features = layer_features(plan.subject, plan.task, plan.sampling, plan.stepped, progress)
    found = feature_pca(features, plan.subject.grid)
    numbers = {"agreement": found.agreement, "explained": found.explained}
    return {
        "principal_components": by_layer(found.layers, plan.names, **numbers),
        "pictures": {"steps": list(found.steps), "colours": plain(found.pictures)},
    }


def section(result: Mapping[str, Any], pictures: Mapping[str, Any]) -> Markup:
    layers = result["principal_components"]
    shown = media.spread(len(layers), NUM_SHOWN)
    tiles = np.array(pictures["colours"])[shown][:, 0]
    names = [layers[place]["name"] for place in shown]
    steps = [str(step) for step in pictures["steps"]]
    first = [one["agreement"][0][0] for one in layers]
    lines = []
    for one in layers:
        middle = one["agreement"][len(one["agreement"]) // 2]
        numbers = (f"{value:.2f}" for value in (*one["agreement"][0], *middle))
        lines.append([one["name"], *numbers, f"{100 * sum(one['explained']):.0f} %"])
    parts = [f"{when} {number}" for when in ("first step:", "middle:") for number in (1, 2, 3)]
    return fragment(
        SECTION,
        lowest=min(first),
        highest=max(first),
        pictures=plot(
            partial(plot_tiles, tiles, names, steps, "step"),
            "Principal components of one frame, layers from top to bottom, steps from left",
            "two",
        ),
        header=["|correlation| with the last step", *parts, "variance"],
        lines=lines,
    )


MEASUREMENT = Measurement(measure=measure, section=section, place=30)
