"""The measurements of a probe by name, each from a plan to entries of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from torch import Tensor

from scd.models.decoder import Join
from scd.models.flow import SamplingConfig
from scd.probing.ablation import leave_one_out
from scd.probing.attention import attention_mass
from scd.probing.entries import (
    Entries,
    attention_entries,
    colour_entries,
    leave_one_out_entries,
    proposal_entries,
    reuse_entries,
    similarity_entries,
    splice_entries,
    splice_losses_of,
)
from scd.probing.features import pca_view
from scd.probing.reuse import ReuseGrid, reuse_loss, reuse_rollout
from scd.probing.similarity import step_similarity
from scd.probing.splice import Split, splice_losses, splits
from scd.probing.split import Speed, candidates_of, propose, time_step
from scd.probing.subject import Progress, Subject, Task
from scd.probing.trajectory import layer_features

Measurement = Literal["attention", "similarity", "colours", "leave_one_out", "reuse", "splits"]
"""In the order in which they run: what a model may lack comes first."""

MAX_SPLITS = 90
"""Splits that are tried; of deeper models only those at evenly spaced depths."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all measurements share."""

    subject: Subject
    """What is probed."""
    task: Task
    """Frames and their noise."""
    sampling: SamplingConfig
    """Steps of the trajectories."""
    levels: Sequence[float]
    """Times at which losses are taken."""
    layers: Sequence[int] | None
    """Numbers of the layers to look at; None: all."""
    tokens: Sequence[int] | None
    """Tokens whose attention is shown; None: the one in the middle of the frame."""
    grid: ReuseGrid
    """Axes of the map of reuse."""
    decode: Callable[[Tensor], Tensor]
    """From latent frames to pixels in [-1, 1]."""
    frame_steps: int
    """Denoising steps of the frame whose seconds are predicted."""
    join: Join
    """How the decoder of a split would be given its context."""
    tolerance: float
    """Relative loss that the recommended split may add."""

    @property
    def names(self) -> list[str]:
        """Names of all layers."""
        return [layer.name for layer in self.subject.layers]

    @property
    def stepped(self) -> list[int]:
        """Numbers of the layers to look at that run at every step."""
        numbers = [place + 1 for place in self.subject.stepped]
        return [number for number in numbers if self.layers is None or number in self.layers]


Parts = Mapping[str, Mapping[str, Any]]
"""What was measured before, by name of the measurement."""


def measure_attention(plan: Plan, progress: Progress) -> Entries:
    """Measure what a frame that is denoised looks at."""
    found = attention_mass(plan.subject, plan.task, plan.sampling, plan.tokens, progress=progress)
    return attention_entries(found, plan.names)


def measure_similarity(plan: Plan, progress: Progress) -> Entries:
    """Compare the features of all steps."""
    if not plan.stepped:
        return {"left_out": "similarity: none of the chosen layers runs at every step"}
    features = layer_features(
        plan.subject, plan.task, plan.sampling, plan.stepped, progress=progress
    )
    return similarity_entries(step_similarity(features), plan.names)


def measure_colours(plan: Plan, progress: Progress) -> Entries:
    """Find the principal components of the features."""
    if not plan.stepped:
        return {"left_out": "colours: none of the chosen layers runs at every step"}
    features = layer_features(
        plan.subject, plan.task, plan.sampling, plan.stepped, progress=progress
    )
    return colour_entries(pca_view(features, plan.subject.grid), plan.names)


def measure_leave_one_out(plan: Plan, progress: Progress) -> Entries:
    """Leave out one layer after another."""
    found = leave_one_out(plan.subject, plan.task, plan.levels, plan.layers, progress)
    return leave_one_out_entries(found, plan.names)


def measure_reuse(plan: Plan, progress: Progress) -> Entries:
    """Keep the features of the first layers: the loss, then whole trajectories."""
    subject, task, sampling, grid = plan.subject, plan.task, plan.sampling, plan.grid
    loss = reuse_loss(subject, task, sampling, grid, progress=lambda share: progress(0.3 * share))
    rollout = reuse_rollout(
        subject, task, sampling, grid, plan.decode, lambda share: progress(0.3 + 0.7 * share)
    )
    return reuse_entries(loss, rollout)


def measure_splits(plan: Plan, progress: Progress) -> Entries:
    """Try splits of a dense model, and time it."""
    subject = plan.subject
    if any(layer.once for layer in subject.layers):
        return {"left_out": "splits: this model is split already"}
    if len(subject.layers) < 2:
        return {"left_out": "splits: a model of one layer cannot be split"}
    seconds = time_step(subject, plan.task)
    tried = chosen_splits(len(subject.layers))
    losses = splice_losses(subject, plan.task, plan.levels, tried, progress=progress)
    return splice_entries(losses, seconds)


def proposed_split(plan: Plan, parts: Parts) -> Entries:
    """Recommend a split, from what all measurements found."""
    subject = plan.subject
    losses, seconds = splice_losses_of(parts["splits"])
    num_frames = plan.task.clean.shape[1]
    speed = Speed(
        seconds_per_step=seconds,
        num_steps=plan.frame_steps,
        num_context_frames=min(num_frames, subject.window or num_frames),
        join=plan.join,
        sizes=subject.sizes,
    )
    candidates = candidates_of(losses, speed, **known_of_layers(parts))
    proposal = propose(candidates, speed.dense_seconds(len(subject.layers)), plan.tolerance)
    basis = {
        "seconds_per_step": speed.seconds_per_step,
        "num_steps": speed.num_steps,
        "num_context_frames": speed.num_context_frames,
        "join": speed.join,
        "counted": "layers" if subject.sizes is None else "operations",
        "tolerance": plan.tolerance,
    }
    return proposal_entries(proposal, candidates, basis)


def chosen_splits(num_layers: int, most: int = MAX_SPLITS) -> list[Split]:
    """List the splits to try: all, or those whose depths are multiples of the smallest spacing
    that leaves few enough."""
    for spacing in range(1, num_layers + 1):
        found = [
            split
            for split in splits(num_layers)
            if split.num_first % spacing == 0 and (num_layers - split.num_encoder) % spacing == 0
        ]
        if len(found) <= most:
            break
    return found


def known_of_layers(parts: Parts) -> dict[str, Mapping[int, float] | None]:
    """Return what earlier measurements say of single layers, for `candidates_of`."""
    left = parts.get("leave_one_out", {}).get("leave_one_out")
    attention = parts.get("attention", {}).get("attention")
    reuse = parts.get("reuse", {}).get("reuse")
    return {
        "leave_one_out": left and {one["layer"]: one["relative_loss"] for one in left},
        "past_mass": attention and {one["layer"]: fmean(one["past_mass"]) for one in attention},
        "reuse": reuse
        and {
            layer: losses[0]
            for layer, losses in zip(reuse["layers"], reuse["relative_loss"], strict=True)
        },
    }


MEASUREMENTS: dict[Measurement, Callable[[Plan, Progress], Entries]] = {
    "attention": measure_attention,
    "similarity": measure_similarity,
    "colours": measure_colours,
    "leave_one_out": measure_leave_one_out,
    "reuse": measure_reuse,
    "splits": measure_splits,
}
"""Measurements by name."""
