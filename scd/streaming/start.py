"""Where streams begin: frames and the actions that led to them, given, or of the world's clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from scd.data.clip import Batch, Clip, Conditions, by_latent
from scd.data.given import Frames, as_frames
from scd.data.source import DataCard
from scd.models.checkpoint import World

NUM_GIVEN = 16
"""Frames of one of the world's clips from which a stream begins, unless it is said otherwise."""

Given = Frames | Clip | Sequence[Clip]
"""First frames [b t 3 h w] in [-1, 1]; or clips, with the actions that led to their frames, for a
stream of each."""


def own_start(world: World, batch: int, seed: int) -> Given | None:
    """Return where streams of a world begin that are given nothing; None: from nothing.

    That is one of its clips, by the seed, since a world that was not taught to begin from nothing
    shows stripes for ever.
    """
    clips = world.clips
    if world.begins_from_nothing or not len(clips) or not world.card.conditions.has_actions:
        return None
    return [clips[seed % len(clips)][:NUM_GIVEN]] * batch


def given_frames(
    given: Given | None, conditions: Conditions | None, latents: Tensor | None, card: DataCard
) -> tuple[Tensor | None, Conditions, Tensor | None]:
    """Return given frames, what led to them, and latents in their place.

    Actions of frames of video are put together to those of latent frames, where a world has such.

    Args:
        given: frames or clips; None: none.
        conditions: beside frames; of clips their own.
        latents: in the place of frames.
        card: size of the frames.

    Raises:
        ValueError: frames of another kind or size, conditions or latents beside clips, or clips
            that cannot stand side by side.
    """
    frames, conditions, latents = _given(given, conditions, latents, card)
    actions, spec = conditions.actions, card.conditions
    if actions is not None and actions.ndim == 2 + bool(spec.action_dim):
        conditions = replace(conditions, actions=by_latent(spec, actions))
    return frames, conditions, latents


def _given(
    given: Given | None, conditions: Conditions | None, latents: Tensor | None, card: DataCard
) -> tuple[Tensor | None, Conditions, Tensor | None]:
    size = card.height, card.width
    if given is None:
        return None, conditions or Conditions(), latents
    if isinstance(given, (Tensor, np.ndarray)):
        return as_frames(given, "streams, frames", size), conditions or Conditions(), latents
    clips = [given] if isinstance(given, Clip) else given
    if (
        not isinstance(clips, Sequence)
        or not clips
        or not all(isinstance(clip, Clip) for clip in clips)
    ):
        raise ValueError(
            "a stream begins from frames or clips: begin(world.clips[0]) or begin(frames, "
            f"conditions), got {type(given).__name__} {given!r}"
        )
    if latents is not None or (conditions is not None and conditions.actions is not None):
        raise ValueError("a clip brings its own frames and actions: give it alone")
    batch = Batch.of(clips)
    known = {name: value for name, value in vars(batch.conditions).items() if value is not None}
    conditions = replace(conditions or Conditions(), **known)
    if batch.encoded:
        return None, conditions, batch.frames
    return as_frames(batch.frames, "streams, frames", size), conditions, None
