"""A frame whose causal work is done, for callers who denoise it themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.streaming.steering import Action


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The next frame of each stream, all of its causal work done and none of its denoising."""

    context: Any
    """Of the engine; of twice the batch with guidance."""
    noise: Tensor
    """Where denoising starts, [b c h w]; of a block [b frames c h w]."""
    step_noise: Tensor | None
    """Noise of the steps, [steps *noise]; None: they need none."""
    conditions: Conditions
    """Of the frame."""


@torch.no_grad()
def draft_all(rollouts: Sequence[Any], actions: Sequence[Action | None]) -> list[Draft]:
    """Do what `draft` does for streams of one engine, which then shares the causal work of all.

    Args:
        rollouts: as of `scd.streaming.rollout`, that have begun.
        actions: of each.

    Raises:
        ValueError: the actions of any do not fit.
    """
    conditions = [one._steered(now) for one, now in zip(rollouts, actions, strict=True)]
    contexts = rollouts[0].engine.contexts(
        [one._state for one in rollouts],
        conditions,
        [one._encoder_noise() for one in rollouts],
    )
    return [
        Draft(
            context=one._branched(context),
            noise=one._noise("frame", one.engine.shape.shape),
            step_noise=one._step_noise(),
            conditions=condition,
        )
        for one, context, condition in zip(rollouts, contexts, conditions, strict=True)
    ]
