"""What a session begins with: checked, and as streams want it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scd.data.clip import Conditions, ConditionSpec, pixels_to_frames
from scd.models.checkpoint import World
from scd.serving.admission import HostConfig
from scd.serving.errors import BadRequest
from scd.serving.events import Action, Start
from scd.serving.history import Kept, as_action
from scd.streaming.rollout import Rollout


def check_start(start: Start, world: World, spec: ConditionSpec, config: HostConfig) -> None:
    """Refuse a start that does not fit the world or the limits (BadRequest)."""
    frames = start.frames
    if start.num_steps is not None:
        check_steps(start.num_steps, config.max_steps)
    check_seed(start.seed)
    if frames is None:
        if start.actions:
            raise BadRequest("actions lead to given frames, but none were given")
        return
    check_picture(frames, (*frames.shape[:1], world.card.height, world.card.width, 3))
    if not 1 <= len(frames) <= config.max_start_frames:
        raise BadRequest(f"1 to {config.max_start_frames} frames can be given, got {len(frames)}")
    wanted = len(frames) if spec.has_actions else 0
    if len(start.actions) != wanted:
        raise BadRequest(
            f"{len(frames)} frames of this world need {wanted} actions, got {len(start.actions)}"
        )


def check_steps(num_steps: int, max_steps: int) -> None:
    """Refuse a number of denoising steps (BadRequest)."""
    if not 1 <= num_steps <= max_steps:
        raise BadRequest(f"steps must lie in 1 .. {max_steps}, got {num_steps}")


def check_seed(seed: int) -> None:
    """Refuse a seed that a snapshot could not hold (BadRequest)."""
    if not 0 <= seed < 2**53:
        raise BadRequest(f"a seed must be 0 or more and below 2**53, got {seed}")


def check_picture(picture: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse pixels of another kind or size (BadRequest)."""
    if picture.dtype != np.uint8 or picture.shape != shape:
        raise BadRequest(
            f"pictures must be bytes of shape {shape}, got {picture.dtype} of {picture.shape}"
        )


def frames_of(start: Start) -> Tensor | None:
    """Return the given frames [t 3 h w] in [-1, 1]; None: there are none."""
    # Copied: a picture may come from memory that cannot be written.
    return None if start.frames is None else pixels_to_frames(torch.from_numpy(start.frames.copy()))


def conditions_of(start: Start) -> Conditions:
    """Return the actions [1 t] of the given frames, and the label [1]."""
    actions = [as_action(action) for action in start.actions]
    known = [action for action in actions if action is not None]
    if len(known) != len(actions) or len({action.shape for action in known}) > 1:
        raise BadRequest("each given frame needs an action of the same kind")
    return Conditions(
        actions=torch.stack(known)[None] if known else None,
        labels=None if start.label is None else torch.tensor([start.label]),
    )


def given_frames(start: Start, world: World, rollout: Rollout) -> list[Kept]:
    """Return the given frames as a history keeps them."""
    frames = frames_of(start)
    if frames is None:
        return []
    engine = rollout.engine
    latents = world.autoencoder.encode(frames[None].to(engine.device)).to(engine.dtype)[0]
    actions: tuple[Action, ...] = start.actions or (None,) * len(latents)
    return [
        Kept(latent=latent[None], action=action)
        for latent, action in zip(latents, actions, strict=True)
    ]
