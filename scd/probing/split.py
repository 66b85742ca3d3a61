"""Where to cut a dense model: what each split would cost and lose, and which one to take.

Encoder: layers 1 .. E, once per frame. Decoder: layers 1 .. F and E + 1 .. L, at every step.
Source: paper, sections 5.6 and 6.1; the predictions and the rule are ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from scd.bench.limits import synchronize
from scd.data.clip import Conditions
from scd.evaluation.image import Estimate
from scd.models.cost import Load, dense_cost, separable_cost
from scd.models.decoder import DecoderConfig, Join
from scd.models.encoder import EncoderConfig
from scd.models.sizes import Sizes
from scd.probing.splice import SpliceLoss, Split
from scd.probing.subject import Subject, Task

NUM_TIMED = 7
"""Calls of the network whose median is a call's time."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a frame of the dense model takes, and by which count other models are compared."""

    seconds_per_step: float
    """Median time of one call of the dense model for one stream, on this machine."""
    num_steps: int
    """Denoising steps per frame."""
    num_context_frames: int
    """Frames that attention sees, the one that is denoised included."""
    join: Join
    """How the decoder would be given its context."""
    sizes: Sizes | None
    """Of the model's parts; None: unknown, and every pass of a layer over a frame counts alike."""

    def seconds(self, split: Split) -> float:
        """Predict the seconds per frame of a split, by the ratio of operations to a dense step."""
        return self.seconds_per_step * self._split_operations(split) / self._dense(split)[1]

    def dense_seconds(self, num_layers: int) -> float:
        """Return the seconds per frame of the dense model, with the pass that remembers it."""
        split = Split(num_layers=num_layers, num_encoder=1, num_first=0)
        total, step = self._dense(split)
        return self.seconds_per_step * total / step

    def _dense(self, split: Split) -> tuple[int, int]:
        """Count the operations of a frame, and of one step."""
        if self.sizes is None:
            return (self.num_steps + 1) * split.num_layers, split.num_layers
        cost = dense_cost(self.sizes, split.num_layers, self._load)
        return cost.flops(self.num_steps), cost.step_flops

    def _split_operations(self, split: Split) -> int:
        if self.sizes is None:
            tokens = 2 if self.join in ("token_concat", "token_concat_projected") else 1
            prepare = split.num_decoder if self.join == "prefix" else 0
            return split.num_encoder + prepare + self.num_steps * split.num_decoder * tokens
        encoder = EncoderConfig(num_layers=split.num_encoder)
        decoder = DecoderConfig(num_layers=split.num_decoder, join=self.join)
        return separable_cost(self.sizes, encoder, decoder, self._load).flops(self.num_steps)

    @property
    def _load(self) -> Load:
        return Load(num_context_frames=self.num_context_frames)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A split with all that is predicted of it."""

    split: Split
    """The split."""
    seconds: float
    """Predicted seconds per frame."""
    with_past: Estimate
    """Relative loss without training, the decoder's layers looking at earlier frames as before."""
    own_frame: Estimate | None
    """The same, the decoder's layers seeing their own frame only; None: not measured."""
    left_out: float | None
    """Sum of the leave-one-out losses of the layers that the decoder lacks."""
    reuse: float | None
    """Loss of reusing the encoder's layers from the first step on: the nearest measured depth."""
    past_mass: float | None
    """Mean attention on earlier frames of the layers after the encoder; None: there are none."""
    on_front: bool
    """Whether no other split is both faster and better."""

    @property
    def name(self) -> str:
        """Encoder depth, then first and last layers of the decoder, as in "8: 2+4"."""
        split = self.split
        return f"{split.num_encoder}: {split.num_first}+{split.num_layers - split.num_encoder}"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The recommended split and why."""

    candidate: Candidate
    """The split."""
    dense_seconds: float
    """Seconds per frame of the model as it is."""
    reason: str
    """The rule that chose it, and what it says of this model."""


@torch.no_grad()
def time_step(subject: Subject, task: Task, num_timed: int = NUM_TIMED) -> float:
    """Measure the median seconds of one call of the network for one stream."""
    first = {
        name: value if value is None else value[:1] for name, value in vars(task.conditions).items()
    }
    one = Task(clean=task.clean[:1], conditions=Conditions(**first), noise=task.noise[:1])
    state = one.begin(subject)
    seconds = []
    for number in range(num_timed + 2):
        synchronize(one.noise.device)
        began = time.perf_counter()
        subject.velocity(state, one.noise, 1.0)
        synchronize(one.noise.device)
        if number >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def candidates_of(
    losses: Sequence[SpliceLoss],
    speed: Speed,
    leave_one_out: Mapping[int, float] | None = None,
    reuse: Mapping[int, float] | None = None,
    past_mass: Mapping[int, float] | None = None,
) -> list[Candidate]:
    """Put what was measured of each split beside what it would cost.

    Args:
        losses: of each split.
        speed: of the dense model.
        leave_one_out: relative loss without a layer, by its number; None: not measured.
        reuse: relative loss with layers up to a number kept from the first step on.
        past_mass: attention of a layer on earlier frames, by its number.
    """
    seconds = np.array([speed.seconds(one.split) for one in losses])
    front = front_of(seconds, np.array([one.with_past.mean for one in losses]))
    found = []
    for one, predicted, on_front in zip(losses, seconds.tolist(), front.tolist(), strict=True):
        split = one.split
        missing = range(split.num_first + 1, split.num_encoder + 1)
        last = range(split.num_encoder + 1, split.num_layers + 1)
        left_out = reused = attention = None
        if leave_one_out is not None and all(layer in leave_one_out for layer in missing):
            left_out = sum(leave_one_out[layer] for layer in missing)
        if reuse:
            reused = reuse[min(reuse, key=lambda depth: abs(depth - split.num_encoder))]
        if past_mass is not None and last:
            attention = statistics.fmean(past_mass[layer] for layer in last)
        found.append(
            Candidate(
                split=split,
                seconds=predicted,
                with_past=one.with_past,
                own_frame=one.own_frame,
                left_out=left_out,
                reuse=reused,
                past_mass=attention,
                on_front=on_front,
            )
        )
    return found


def front_of(
    seconds: Float[np.ndarray, " x"], losses: Float[np.ndarray, " x"]
) -> Bool[np.ndarray, " x"]:
    """Tell which points no other one beats in one and equals in both: the Pareto front."""
    no_worse = (seconds[None] <= seconds[:, None]) & (losses[None] <= losses[:, None])
    better = (seconds[None] < seconds[:, None]) | (losses[None] < losses[:, None])
    return ~np.any(no_worse & better, axis=1)


def propose(candidates: Sequence[Candidate], dense_seconds: float, tolerance: float) -> Proposal:
    """Recommend a split.

    Of the splits that are predicted faster than the dense model: the fastest one whose loss stays
    within the tolerance, by the upper end of its interval; if there is none, the one with the
    lowest loss.

    Raises:
        ValueError: no candidates.
    """
    if not candidates:
        raise ValueError("a split is chosen among 1 or more candidates, got none")
    faster = [one for one in candidates if one.seconds < dense_seconds]
    within = [one for one in faster if one.with_past.ci_high <= tolerance]
    if within:
        chosen = min(within, key=lambda one: (one.seconds, one.with_past.mean))
        reason = (
            f"the fastest of {len(within)} splits whose loss without any training rises by at most "
            f"{100 * tolerance:g} %, by the upper end of its interval"
        )
    elif faster:
        chosen = min(faster, key=lambda one: (one.with_past.mean, one.seconds))
        reason = (
            f"no split that is faster than the dense model stays within {100 * tolerance:g} % of "
            "its loss without training; this one loses least"
        )
    else:
        chosen = min(candidates, key=lambda one: (one.with_past.mean, one.seconds))
        reason = "no split is predicted to be faster than the dense model; this one loses least"
    return Proposal(candidate=chosen, dense_seconds=dense_seconds, reason=reason)
