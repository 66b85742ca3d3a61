"""Share of attention that a frame which is being denoised gives to earlier frames.

Weights are summed block by block in float32 from queries and keys: no matrix of all weights is ever
held. Source: paper, figure 4.
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
from matplotlib.colors import Normalize, PowerNorm
from torch import Tensor
from torch.nn import functional

from scd.evaluation.html import fragment, plot
from scd.evaluation.media import spread
from scd.evaluation.plots import Ink, curve_panels, finish, legend
from scd.models.config import SamplingConfig
from scd.probing.measurement import Entries, Measurement, by_layer, plain
from scd.probing.plan import Plan
from scd.probing.plots import (
    BLUE,
    GREEN,
    GREY,
    NUM_SHOWN,
    ORANGE,
    PINK,
    PURPLE,
    draw_bar,
    draw_map,
    name_layers,
    plot_tiles,
)
from scd.probing.subject import CONTEXT, FrameAttention, Progress, Subject, Task, silent
from scd.probing.trajectory import MAX_BLOCK_BYTES, denoise, step_times

SHADES = (BLUE, PURPLE, PINK, ORANGE, "#8f9a2f", GREEN)
"""Colours of some layers, the first one first."""

SECTION = """
<h2>Where do layers look?</h2>
<p>The share of attention that the tokens of the denoised frame give to earlier frames, beside what
it would be if all keys weighed the same. It is {{ "%.2f" % first }} in {{ names[0] }} and
{{ "%.2f" % last }} in {{ names[-1] }}.
{% if context > 0 %}
The decoder of a separable model sees no earlier frame: its share is 0 by construction, and up to
{{ "%.2f" % context }} of its attention goes to the context tokens.
{% endif %}
</p>
{{ mass }}{{ distances }}
{% for one in maps %}{{ one }}{% endfor %}
<p class="soft">Maps: what one token of the frame attends to ({{ places | join("; ") }}), in one
clip at the middle step, averaged over heads; white is the largest weight of its row.</p>
"""


@dataclass(frozen=True, kw_only=True)
class AttentionMass:
    """Shares of attention, averaged over queries, clips and draws of noise.

    Distances count frames backwards: 0 is the frame itself. The shares of all distances and of the
    context add up to 1.
    """

    layers: tuple[int, ...]
    """Numbers from 1."""
    past_mass: Float[np.ndarray, "layers k steps"]
    """Share of earlier frames, at each step. For a layer that runs once per frame it is the same at
    all steps, and counts the frames before the newest known one."""
    uniform: Float[np.ndarray, " layers"]
    """What `past_mass` would be if all visible keys weighed the same: (i - 1) / i for frame i."""
    context_mass: Float[np.ndarray, "layers k steps"]
    """Share of a separable decoder's context, which is no frame; 0 elsewhere."""
    profile: Float[np.ndarray, "layers k frames"]
    """Share of each distance, averaged over steps."""
    maps: Float[np.ndarray, "layers frames chosen rows columns"]
    """Weights that chosen tokens of the first clip give to each token of each distance, averaged
    over heads, at the middle step."""
    chosen: tuple[int, ...]
    """Tokens of the maps, by row and column, from 0."""


@torch.no_grad()
def attention_mass(
    subject: Subject,
    task: Task,
    sampling: SamplingConfig,
    chosen: Sequence[int] | None = None,
    progress: Progress = silent,
) -> AttentionMass:
    """Measure every layer and head at every step of a trajectory.

    Args:
        chosen: tokens for the maps, from 0; None: that in the middle of the frame.

    Raises:
        ValueError: a layer's attention cannot be seen, or no layer attends to earlier frames.
    """
    times = step_times(sampling)
    counter = _Counter(subject, task.num_past, len(times) - 1, subject.tokens(chosen))
    with subject.watch_attention(counter.see):
        # What runs once per frame is the same at all steps; what comes last in `begin` counts.
        state = task.begin(subject)
        counter.begun = True
        for step, _ in enumerate(denoise(subject, state, task.noise, times), 1):
            counter.step = step
            progress(step / (len(times) - 1))
    return counter.result()


class _Counter:
    """Adds up attention shares: `see` each attention, then `result`."""

    def __init__(self, subject: Subject, num_past: int, num_steps: int, chosen: list[int]) -> None:
        layers, heads = len(subject.layers), subject.num_heads
        self.subject, self.chosen, self.num_steps = subject, chosen, num_steps
        # Distances 0 .. num_past, one more for an encoder's start frame, and the context last.
        self.num_classes = num_past + 3
        self.shares = torch.zeros(layers, heads, num_steps, self.num_classes)
        self.uniform = torch.zeros(layers)
        self.maps = torch.zeros(layers, self.num_classes, len(chosen), *subject.grid)
        self.seen: set[int] = set()
        self.step, self.begun = 0, False

    def see(self, attention: FrameAttention) -> None:
        layer = self.subject.layers[attention.layer]
        if layer.once == self.begun:
            return
        classes = torch.tensor(attention.distances)
        if int(classes.max()) > self.num_classes - 2:
            raise ValueError(f"a key of {layer.name} lies {int(classes.max())} frames back")
        classes = classes.where(classes != CONTEXT, self.num_classes - 1)
        members = functional.one_hot(classes, self.num_classes).float()
        shares = mass(attention, members.to(attention.q.device)).mean(0).cpu()
        steps = slice(None) if layer.once else slice(self.step, self.step + 1)
        self.shares[attention.layer, :, steps] = shares[:, None]
        self.seen.add(attention.layer)
        if self.step in (0, self.num_steps // 2):
            self.uniform[attention.layer] = _uniform(attention.bias, members[:, 1:-1].sum(1))
            self._map(attention, classes)

    def _map(self, attention: FrameAttention, classes: Tensor) -> None:
        weights = _weights(attention, self.chosen, slice(0, 1))[0].mean(0).cpu()
        for one in classes.unique().tolist():
            of_frame = weights[:, classes == one]
            if of_frame.shape[1] == self.subject.tokens_per_frame:
                self.maps[attention.layer, one] = of_frame.unflatten(1, self.subject.grid)

    def result(self) -> AttentionMass:
        names = [layer.name for layer in self.subject.layers]
        missing = [name for place, name in enumerate(names) if place not in self.seen]
        if missing:
            raise ValueError(
                f"no attention over frames was seen in {', '.join(missing)}: it must go through "
                "PyTorch's fused kernel, or the subject's own watch_attention show it"
            )
        past = self.shares[..., 1:-1].sum(-1)
        if not (past > 0).any():
            raise ValueError("no layer of this model looks at earlier frames: nothing to measure")
        used = max(2, 1 + int((self.shares[..., :-1] > 0).flatten(0, 2).any(0).nonzero().max()))
        return AttentionMass(
            layers=tuple(range(1, len(names) + 1)),
            past_mass=past.numpy(),
            uniform=self.uniform.numpy(),
            context_mass=self.shares[..., -1].numpy(),
            profile=self.shares[..., :used].mean(2).numpy(),
            maps=self.maps[:, :used].numpy(),
            chosen=tuple(self.chosen),
        )


def mass(
    attention: FrameAttention,
    members: Float[Tensor, "s classes"],
    max_block_bytes: int = MAX_BLOCK_BYTES,
) -> Float[Tensor, "b k classes"]:
    """Sum the weights of the keys of each class, averaged over queries.

    Args:
        members: 1 where a key belongs to a class.
        max_block_bytes: weights that are held at once.
    """
    batch, heads, num_queries = attention.q.shape[:3]
    size = max(1, max_block_bytes // (4 * batch * heads * attention.k.shape[2]))
    total = attention.q.new_zeros(batch, heads, members.shape[1], dtype=torch.float32)
    for start in range(0, num_queries, size):
        total += (_weights(attention, slice(start, start + size)) @ members).sum(2)
    return total / num_queries


def _weights(
    attention: FrameAttention, queries: slice | list[int], clips: slice = slice(None)
) -> Tensor:
    q, k, bias = attention.q[clips, :, queries], attention.k[clips], attention.bias
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().mT
    if bias is not None:
        bias = bias if bias.shape[0] == 1 else bias[clips]
        logits += (bias if bias.shape[-2] == 1 else bias[:, :, queries]).float()
    return logits.softmax(-1)


def _uniform(bias: Tensor | None, past: Float[Tensor, " s"]) -> float:
    """Return the share of past keys among those that a query may see, averaged over queries."""
    if bias is None:
        return float(past.mean())
    seen = (bias > float("-inf")).float().cpu()
    return float(((seen @ past) / seen.sum(-1)).mean())


def measure(plan: Plan, progress: Progress) -> Entries:
    tokens = plan.config.tokens
    found = attention_mass(plan.subject, plan.task, plan.sampling, tokens, progress=progress)
    layers = by_layer(
        found.layers,
        plan.names,
        past_mass=found.past_mass.mean(-1),
        uniform=found.uniform[:, None].repeat(plan.subject.num_heads, axis=1),
        context_mass=found.context_mass.mean(-1),
        past_mass_by_step=found.past_mass,
        by_distance=found.profile,
    )
    pictures = {"maps": plain(found.maps), "chosen": list(found.chosen)}
    return {"attention": layers, "pictures": pictures}


def cards(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    seeing = [one for one in result["attention"] if np.mean(one["uniform"]) > 0]
    return [
        (f"{np.mean(one['past_mass']):.2f}", f"of its attention {one['name']} gives to earlier "
         f"frames; uniform would be {np.mean(one['uniform']):.2f}")
        for one in (seeing[0], seeing[-1])
    ]  # fmt: skip


def section(result: Mapping[str, Any], pictures: Mapping[str, Any]) -> Markup:
    layers = result["attention"]
    names = [one["name"] for one in layers]
    mass = np.array([one["past_mass_by_step"] for one in layers])
    uniform = np.array([one["uniform"][0] for one in layers])
    profile = np.array([one["by_distance"] for one in layers]).mean(1)
    shown = spread(len(layers), NUM_SHOWN)
    maps = np.array(pictures["maps"])[shown]
    shown_names = [names[place] for place in shown]
    distances = ["itself", *(f"{back} back" for back in range(1, maps.shape[1]))]
    places = [_place(token, maps.shape[-1]) for token in pictures["chosen"]]
    return fragment(
        SECTION,
        first=mass[0].mean(),
        last=mass[-1].mean(),
        names=names,
        context=max(np.mean(one["context_mass"]) for one in layers),
        mass=plot(
            partial(plot_past_mass, mass, uniform, names),
            "Attention to earlier frames by layer, head and step",
        ),
        distances=plot(
            partial(plot_distances, profile, names), "Attention against the distance of frames"
        ),
        maps=[
            plot(
                partial(plot_tiles, _grey(maps[:, :, at]), shown_names, distances, ""),
                f"What the token in {place} of a frame attends to",
                "two",
            )
            for at, place in enumerate(places)
        ],
        places=places,
    )


def _place(token: int, num_columns: int) -> str:
    row, column = divmod(token, num_columns)
    return f"row {row + 1}, column {column + 1}"


def _grey(maps: np.ndarray) -> np.ndarray:
    largest = maps.max(axis=(1, 2, 3), keepdims=True)
    # Square roots: most weights are far below the largest.
    return np.sqrt(maps / np.maximum(largest, 1e-12))[..., None].repeat(3, axis=-1)


def plot_past_mass(
    mass: Float[np.ndarray, "l k t"],
    uniform: Float[np.ndarray, " l"],
    names: Sequence[str],
    path: Path,
    ink: Ink,
) -> None:
    """Draw the attention to earlier frames by layer, by head and by step."""
    figure, (curve, heads, steps) = curve_panels(3, ink)
    layers = range(1, len(names) + 1)
    of_heads = mass.mean(axis=2)
    curve.plot(layers, uniform, color=GREY, linestyle="--", label="uniform")
    curve.plot(
        layers, of_heads.mean(axis=1), color=BLUE, marker="o", markersize=3,
        label="mean of heads",
    )  # fmt: skip
    curve.fill_between(
        layers, of_heads.min(axis=1), of_heads.max(axis=1), color=BLUE, alpha=0.2,
        linewidth=0, label="lowest to highest head",
    )  # fmt: skip
    curve.set_ylim(-0.02, 1.02)
    curve.set_ylabel("attention to earlier frames")
    name_layers(curve, names)
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
    """Draw attention against the distance in frames, 0 the frame itself."""
    figure, (axes, every) = curve_panels(2, ink)
    distances = range(profile.shape[1])
    for colour, layer in zip(SHADES, spread(len(names), len(SHADES)), strict=False):
        axes.plot(
            distances, profile[layer], label=names[layer], marker="o", markersize=3, color=colour
        )
    axes.axhline(1 / profile.shape[1], color=GREY, linestyle="--", label="uniform")
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


MEASUREMENT = Measurement(measure=measure, section=section, place=40, cards=cards)
