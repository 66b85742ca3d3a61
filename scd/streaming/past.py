"""Latents that streams remember, so that they can be seen anew under another text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.interface import Engine


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One frame, or block of frames, of each stream."""

    latents: Float[Tensor, "b m c h w"]
    """Of its m frames."""
    actions: Integer[Tensor, "b m ..."] | Float[Tensor, "b m ..."] | None
    """That led to them; None: no actions steer the streams."""

    def repeat(self, num: int) -> Kept:
        """Repeat each stream `num` times in a row."""
        actions = self.actions
        return Kept(
            latents=self.latents.repeat_interleave(num, 0),
            actions=None if actions is None else actions.repeat_interleave(num, 0),
        )


Past = tuple[Kept, ...]
"""The frames or blocks in the window of streams, oldest first, sinks before all others."""


def past_of(
    engine: Engine, latents: Tensor | None, conditions: Conditions, window: int | None
) -> Past:
    """Return the past of streams that begin with given latents [b t c h w]; None: with none."""
    past: Past = ()
    if latents is None or not engine.config.conditions.has_text:
        return past
    size, actions = engine.config.frames_per_block, conditions.actions
    for start in range(0, latents.shape[1], size):
        stop = start + size
        led = None if actions is None else actions[:, start:stop]
        past = longer(engine, past, Kept(latents=latents[:, start:stop], actions=led), window)
    return past


def with_frame(
    engine: Engine, past: Past, latents: Tensor, conditions: Conditions, window: int | None
) -> Past:
    """Return a past with the newest frame [b c h w], or block, and what steered it."""
    if not engine.config.conditions.has_text:
        return past
    block = latents[:, None] if latents.ndim == 4 else latents
    actions = conditions.actions
    if actions is not None:
        # With guidance the branch from which actions are hidden stands first.
        actions = actions[-len(block) :]
        if actions.shape[1] < block.shape[1]:
            actions = actions.repeat_interleave(block.shape[1], 1)
    return longer(engine, past, Kept(latents=block, actions=actions), window)


def longer(engine: Engine, past: Past, newest: Kept, window: int | None) -> Past:
    """Return a past with one frame or block more, without those that leave the window."""
    cache = engine.config.cache.with_window(window).in_blocks(engine.config.frames_per_block)
    past = (*past, newest)
    if len(past) <= cache.window:
        return past
    return (*past[: cache.num_sinks], *past[cache.num_sinks + 1 :])


def named(past: Past) -> dict[str, Tensor]:
    """Return a past as tensors by name, for a file."""
    if not past:
        return {}
    latents, conditions = together(past)
    actions = conditions.actions
    # Numbers of actions are small, and exact in any type of a file.
    return {"latents": latents} | ({} if actions is None else {"actions": actions.float()})


def past_named(engine: Engine, tensors: Mapping[str, Tensor]) -> Past:
    """Return the past that `named` turned into tensors."""
    if "latents" not in tensors:
        return ()
    spec, size = engine.config.conditions, engine.config.frames_per_block
    latents, actions = tensors["latents"].to(engine.device), tensors.get("actions")
    led: Sequence[Tensor | None] = [None] * (latents.shape[1] // size)
    if actions is not None:
        led = actions.to(engine.device, None if spec.action_dim else torch.long).split(size, dim=1)
    parts = zip(latents.split(size, dim=1), led, strict=True)
    return tuple(Kept(latents=part.clone(), actions=done) for part, done in parts)


def together(past: Sequence[Kept]) -> tuple[Float[Tensor, "b t c h w"], Conditions]:
    """Return the latents of a past in a row, and the actions that led to them."""
    actions = [one.actions for one in past if one.actions is not None]
    latents = torch.cat([one.latents for one in past], dim=1)
    return latents, Conditions(actions=torch.cat(actions, dim=1) if actions else None)
