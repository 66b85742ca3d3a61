"""What a dense model loses, untrained, when it is cut into a part once per frame and a decoder.

Encoder: layers 1 .. E. Decoder: layers 1 .. F and E + 1 .. L, the first and last ones, as the paper
composes it. What layers F + 1 .. E add to the tokens is taken from the first step, pure noise, and
is added again in all others. (Ours; the composition: paper, section 6.1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from scd.evaluation.image import Estimate
from scd.probing.ablation import losses, relative
from scd.probing.intercept import Call, change_held, recorded
from scd.probing.subject import Progress, Subject, Task, silent


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
        """Layers of the decoder."""
        return self.num_first + self.num_layers - self.num_encoder

    @property
    def decoder_layers(self) -> list[int]:
        """Numbers of the dense layers that the decoder is made of."""
        first = range(1, self.num_first + 1)
        return [*first, *range(self.num_encoder + 1, self.num_layers + 1)]


@dataclass(frozen=True, kw_only=True)
class SpliceLoss:
    """Relative increase of the loss by a split, without training."""

    split: Split
    """The split."""
    with_past: Estimate
    """The decoder's layers look at earlier frames as before."""
    own_frame: Estimate | None
    """They see their own frame only, as a decoder does; None: it was not measured."""


def splits(num_layers: int, max_decoder: int | None = None) -> list[Split]:
    """List all splits of a dense model; those with more decoder layers come later."""
    largest = num_layers - 1 if max_decoder is None else max_decoder
    pairs = [
        (encoder, first)
        for encoder in range(1, num_layers + 1)
        for first in range(encoder)
        if 1 <= first + num_layers - encoder <= largest
    ]
    found = [
        Split(num_layers=num_layers, num_encoder=encoder, num_first=first)
        for encoder, first in pairs
    ]
    return sorted(found, key=lambda split: (split.num_decoder, split.num_first))


@torch.no_grad()
def splice_losses(
    subject: Subject,
    task: Task,
    levels: Sequence[float],
    candidates: Sequence[Split] | None = None,
    own_frame: bool = True,
    progress: Progress = silent,
) -> list[SpliceLoss]:
    """Measure the loss of each split on the same clips and noise.

    Args:
        subject: a dense model.
        task: frames and their noise.
        levels: times at which the loss is taken; see `noise_levels`.
        candidates: the splits; None: all.
        own_frame: measure too what the decoder's layers do without earlier frames.
        progress: told how far it is.

    Raises:
        ValueError: the model is split already, or has another number of layers.
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

        def loss(narrow: bool, split: Split = split) -> Estimate:
            with ExitStack() as stack:
                stack.enter_context(_spliced(subject, calls, split))
                if narrow:
                    places = [layer - 1 for layer in split.decoder_layers]
                    stack.enter_context(subject.own_frame_only(places))
                errors = [task.error(subject, state, time) for time in levels]
            return relative(task.per_clip(torch.stack(errors)), full)

        alone = loss(narrow=True) if own_frame else None
        found.append(SpliceLoss(split=split, with_past=loss(narrow=False), own_frame=alone))
        progress(number / len(candidates))
    return found


def _spliced(subject: Subject, calls: dict[int, Call], split: Split) -> Any:
    places = range(split.num_first, split.num_encoder)
    return change_held(
        [subject.layers[place] for place in places], [calls[place] for place in places]
    )
