"""Splits of a dense model into encoder and decoder: what each would lose and cost, which to take.

Encoder: layers 1 .. E, once per frame. Decoder: layers 1 .. F and E + 1 .. L, the first and last
ones, at every step, as the paper composes it. In a split ablation layers F + 1 .. E add at every
step what they added to the tokens at the first, from pure noise; nothing is trained.
Source: paper, figure 7, and (composition); the ablation, the predicted seconds and
the rule are ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from scd.common.runtime import synchronize
from scd.data.clip import Conditions
from scd.evaluation.image import Estimate
from scd.models.build import frame_cost
from scd.models.config import DecoderConfig, DenseConfig, EncoderConfig, Join, SeparableConfig
from scd.models.cost import Load, Sizes
from scd.probing.intercept import change_held, recorded
from scd.probing.subject import Progress, Subject, Task, losses, relative, silent

NUM_TIMED = 7
"""Calls of the network of which the median time is taken."""

MAX_SPLITS = 90
"""Splits that are tried; of deeper models only those at evenly spaced depths."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Layers of a dense model as encoder and decoder; layers are counted from 1."""

    num_layers: int
    """L: layers of the dense model."""
    num_encoder: int
    """E: the encoder is layers 1 .. E."""
    num_first: int
    """F: the decoder begins with layers 1 .. F, and goes on with E + 1 .. L."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_first < self.num_encoder <= self.num_layers or self.num_decoder < 1:
            raise ValueError(
                "a split needs 0 <= first layers < encoder layers <= layers and 1 or more decoder "
                f"layers, got {self.num_first}, {self.num_encoder} and {self.num_layers}"
            )

    @property
    def num_decoder(self) -> int:
        return self.num_first + self.num_layers - self.num_encoder

    @property
    def decoder_layers(self) -> list[int]:
        """Numbers of the dense layers that the decoder is made of."""
        first = range(1, self.num_first + 1)
        return [*first, *range(self.num_encoder + 1, self.num_layers + 1)]


@dataclass(frozen=True, kw_only=True)
class SplitLoss:
    """Relative increase of the loss by a split, without training."""

    split: Split
    with_past: Estimate
    """The decoder's layers attend to earlier frames as before."""
    own_frame: Estimate | None
    """They see their own frame only, as a decoder does; None: it was not measured."""


def splits(num_layers: int, max_decoder: int | None = None) -> list[Split]:
    """List all splits of a dense model, by number of decoder layers."""
    largest = num_layers - 1 if max_decoder is None else max_decoder
    found = [
        Split(num_layers=num_layers, num_encoder=encoder, num_first=first)
        for encoder in range(1, num_layers + 1)
        for first in range(encoder)
        if 1 <= first + num_layers - encoder <= largest
    ]
    return sorted(found, key=lambda split: (split.num_decoder, split.num_first))


def chosen_splits(num_layers: int, most: int = MAX_SPLITS) -> list[Split]:
    """List all splits, or of deep models those whose depths are multiples of some spacing."""
    for spacing in range(1, num_layers + 1):
        found = [
            split
            for split in splits(num_layers)
            if split.num_first % spacing == 0 and (num_layers - split.num_encoder) % spacing == 0
        ]
        if len(found) <= most:
            break
    return found


@torch.no_grad()
def split_losses(
    subject: Subject,
    task: Task,
    levels: Sequence[float],
    candidates: Sequence[Split] | None = None,
    own_frame: bool = True,
    progress: Progress = silent,
) -> list[SplitLoss]:
    """Measure the loss of each split on the same clips and noise: a split ablation.

    Args:
        candidates: None: all splits.
        own_frame: measure the loss without earlier frames in the decoder's layers too.

    """
    num_layers = len(subject.layers)
    if any(layer.once for layer in subject.layers):
        raise ValueError("this model is split already: some of its layers run once per frame")
    candidates = splits(num_layers) if candidates is None else candidates
    for split in candidates:
        if split.num_layers != num_layers:
            raise ValueError(f"a split of {split.num_layers} layers, the model has {num_layers}")
    full = losses(subject, task, levels)
    state = task.begin(subject)
    with recorded(subject.layers) as calls:
        subject.velocity(state, task.noise, 1.0)
    found = []
    for number, split in enumerate(candidates, 1):
        frozen = range(split.num_first, split.num_encoder)
        alone = None
        with change_held([subject.layers[one] for one in frozen], [calls[one] for one in frozen]):
            with_past = relative(losses(subject, task, levels, state), full)
            if own_frame:
                with subject.own_frame_only([layer - 1 for layer in split.decoder_layers]):
                    alone = relative(losses(subject, task, levels, state), full)
        found.append(SplitLoss(split=split, with_past=with_past, own_frame=alone))
        progress(number / len(candidates))
    return found


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds per frame of the dense model, measured, and of splits, predicted from operations."""

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
        """Predict the seconds per frame of the dense model, its KV cache update included."""
        split = Split(num_layers=num_layers, num_encoder=1, num_first=0)
        total, step = self._dense(split)
        return self.seconds_per_step * total / step

    def _dense(self, split: Split) -> tuple[int, int]:
        """Return the operations of a frame, and of one of its steps."""
        if self.sizes is None:
            return (self.num_steps + 1) * split.num_layers, split.num_layers
        cost = frame_cost(DenseConfig(num_layers=split.num_layers, **vars(self.sizes)), self._load)
        return cost.flops(self.num_steps), cost.step_flops

    def _split_operations(self, split: Split) -> int:
        if self.sizes is None:
            tokens = 2 if self.join in ("token_concat", "token_concat_projected") else 1
            prepare = split.num_decoder if self.join == "prefix" else 0
            return split.num_encoder + prepare + self.num_steps * split.num_decoder * tokens
        config = SeparableConfig(
            encoder=EncoderConfig(num_layers=split.num_encoder),
            decoder=DecoderConfig(num_layers=split.num_decoder, join=self.join),
            **vars(self.sizes),
        )
        return frame_cost(config, self._load).flops(self.num_steps)

    @property
    def _load(self) -> Load:
        return Load(num_context_frames=self.num_context_frames)


@dataclass(frozen=True, kw_only=True)
class Candidate(SplitLoss):
    """A split with all that is predicted of it."""

    seconds: float
    """Predicted seconds per frame."""
    left_out: float | None
    """Sum of the leave-one-out losses of the layers that the decoder lacks."""
    reuse: float | None
    """Loss of reusing the encoder's layers from the first step on: the nearest measured depth."""
    past_mass: float | None
    """Mean attention to earlier frames of the layers after the encoder; None: there are none."""
    on_front: bool
    """Whether no other split is both faster and better."""

    @property
    def name(self) -> str:
        """Encoder depth, then first and last layers of the decoder, as in "8: 2+4"."""
        split = self.split
        return f"{split.num_encoder}: {split.num_first}+{split.num_layers - split.num_encoder}"


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
    losses: Sequence[SplitLoss],
    speed: Speed,
    leave_one_out: Mapping[int, float] | None = None,
    reuse: Mapping[int, float] | None = None,
    past_mass: Mapping[int, float] | None = None,
) -> list[Candidate]:
    """Combine what was measured of each split with its predicted seconds.

    Args:
        leave_one_out: relative loss without a layer, by its number; None: not measured.
        reuse: relative loss with layers up to a number kept from the first step on.
        past_mass: a layer's attention to earlier frames, by its number.
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
                **vars(one), seconds=predicted, left_out=left_out, reuse=reused,
                past_mass=attention, on_front=on_front,
            )
        )  # fmt: skip
    return found


def front_of(
    seconds: Float[np.ndarray, " x"], losses: Float[np.ndarray, " x"]
) -> Bool[np.ndarray, " x"]:
    """Tell which points no other one beats in one and equals in both: the Pareto front."""
    no_worse = (seconds[None] <= seconds[:, None]) & (losses[None] <= losses[:, None])
    better = (seconds[None] < seconds[:, None]) | (losses[None] < losses[:, None])
    return ~np.any(no_worse & better, axis=1)


def propose(
    candidates: Sequence[Candidate], dense_seconds: float, tolerance: float
) -> tuple[Candidate, str]:
    """Recommend a split, and say why.

    Of the splits that are predicted faster than the dense model: the fastest one whose loss stays
    within the tolerance, by the upper end of its interval; if there is none, the one with the
    lowest loss.

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
    return chosen, reason
