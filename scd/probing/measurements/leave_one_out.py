"""Leave-one-out ablation: the loss on held-out clips without each layer.

Source: paper, figure 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from markupsafe import Markup

from scd.evaluation.html import fragment, plot
from scd.evaluation.plots import Ink, curve_panels, finish, text_colour
from scd.probing.intercept import without
from scd.probing.measurement import Entries, Measurement, by_layer, plain
from scd.probing.plan import Plan
from scd.probing.plots import BLUE, name_layers, scale_percent
from scd.probing.subject import Progress, Subject, Task, losses, relative, silent

SECTION = """
<h2>What is lost without a layer?</h2>
<p>The loss rises most without {{ most }}, by {{ "%.0f" % highest }} %, and least without
{{ least }}, by {{ "%.1f" % lowest }} %.</p>
{{ bars }}
<p class="soft">Mean over the noise levels {{ levels }} (0 is clean, 1 is noise), the same clips and
noise for all layers; 95 % intervals by resampling clips. The layer is left out of the pass over the
given frames too.</p>
"""


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """Relative increase of the loss without each layer: 0.5 is half as much again."""

    layers: tuple[int, ...]
    """Numbers from 1."""
    relative_loss: Float[np.ndarray, " layers"]
    """Loss without the layer / loss with all layers - 1, of the means over clips and levels."""
    ci_low: Float[np.ndarray, " layers"]
    """Lower end of the 95 % interval over clips, paired."""
    ci_high: Float[np.ndarray, " layers"]
    """Upper end."""
    by_level: Float[np.ndarray, "layers levels"]
    """The same at each noise level."""
    levels: tuple[float, ...]
    """Noise levels, as times."""
    loss: Float[np.ndarray, "levels clips"]
    """With all layers."""


@torch.no_grad()
def leave_one_out(
    subject: Subject,
    task: Task,
    levels: Sequence[float],
    layers: Sequence[int] | None = None,
    progress: Progress = silent,
) -> LeaveOneOut:
    """Measure the loss without each layer, which is left out of the pass over the past too.

    Clips and noise are the same for all layers.

    Args:
        layers: numbers from 1; None: all.

    Raises:
        ValueError: no such layers.
    """
    places = subject.places(layers)
    full = losses(subject, task, levels)
    found, by_level = [], []
    for number, place in enumerate(places, 1):
        with without([subject.layers[place]]):
            left = losses(subject, task, levels)
        found.append(relative(left, full))
        by_level.append((left.mean(1) / full.mean(1) - 1).cpu().numpy())
        progress(number / len(places))
    return LeaveOneOut(
        layers=tuple(place + 1 for place in places),
        relative_loss=np.array([one.mean for one in found], np.float32),
        ci_low=np.array([one.ci_low for one in found], np.float32),
        ci_high=np.array([one.ci_high for one in found], np.float32),
        by_level=np.stack(by_level),
        levels=tuple(levels),
        loss=full.cpu().numpy(),
    )


def measure(plan: Plan, progress: Progress) -> Entries:
    found = leave_one_out(plan.subject, plan.task, plan.levels, plan.config.layers, progress)
    kinds = ("relative_loss", "ci_low", "ci_high", "by_level")
    numbers = {kind: getattr(found, kind) for kind in kinds}
    return {
        "leave_one_out": by_layer(found.layers, plan.names, **numbers),
        "loss": {"levels": list(found.levels), "mean": plain(found.loss.mean(-1))},
    }


def section(result: Mapping[str, Any], _: Mapping[str, Any]) -> Markup:
    layers = result["leave_one_out"]
    names = [one["name"] for one in layers]
    mean, low, high = (
        np.array([one[key] for one in layers]) for key in ("relative_loss", "ci_low", "ci_high")
    )
    return fragment(
        SECTION,
        most=names[int(mean.argmax())],
        highest=100 * mean.max(),
        least=names[int(mean.argmin())],
        lowest=100 * mean.min(),
        bars=plot(
            partial(plot_leave_one_out, mean, low, high, names),
            "Relative increase of the loss without each layer",
        ),
        levels=", ".join(f"{level:.2f}" for level in result["loss"]["levels"]),
    )


def plot_leave_one_out(
    mean: Float[np.ndarray, " l"],
    low: Float[np.ndarray, " l"],
    high: Float[np.ndarray, " l"],
    names: Sequence[str],
    path: Path,
    ink: Ink,
) -> None:
    figure, (axes,) = curve_panels(1, ink)
    figure.set_size_inches(7.5, 3.4)
    layers = np.arange(1, len(names) + 1)
    percent = 100 * mean
    axes.bar(layers, percent, color=BLUE, width=0.7)
    spread_of = np.maximum([percent - 100 * low, 100 * high - percent], 0)
    axes.errorbar(
        layers, percent, yerr=spread_of, fmt="none", ecolor=text_colour(ink), capsize=2, linewidth=1
    )
    scale_percent(axes)
    axes.set_ylabel("loss increase without the layer, %")
    axes.axhline(0, color=text_colour(ink), linewidth=0.8)
    name_layers(axes, names)
    finish(figure, path, "", ink)


MEASUREMENT = Measurement(measure=measure, section=section, place=50)
