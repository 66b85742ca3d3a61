"""Tiny models whose weights are off their zeros, so that every input shows in the output."""

import numpy as np
import torch
from gymnasium import spaces

from scd.data.actions import conditions_of, flat, space_of
from scd.data.clip import Batch, Conditions
from scd.data.spaces import ConditionSpec
from scd.models.build import build
from scd.models.config import (
    BlockConfig,
    CacheConfig,
    DecoderConfig,
    DenseConfig,
    EncoderConfig,
    FrameShape,
    SeparableConfig,
)
from scd.objectives.denoise import Denoise, Objective, TeacherForcing

SHAPE = FrameShape(channels=3, height=4, width=6, patch_size=2)
BLOCK = BlockConfig(width=32, head_dim=16, rotary_axes=(4, 6, 6))
ACTIONS = ConditionSpec(num_actions=4)
PARTS = spaces.Dict(
    keys=spaces.MultiBinary(4),
    mouse=spaces.Box(-1, 1, (2,)),
    pad=spaces.Tuple([spaces.MultiDiscrete([3, 2]), spaces.Discrete(3, start=-1)]),
)
COMPOSITE = conditions_of(PARTS, {"keys": ("w", "a", "s", "d"), "mouse": ("x", "y")})
"""Keys, a mouse, and a pad with two dials and a switch."""


def shaken(model, amount=0.1):
    """Move all weights at random and return the model in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(amount * torch.randn(weight.shape, generator=generator))
    return model.eval()


def tiny_separable(
    join="token_concat",
    conditions=ACTIONS,
    predict="velocity",
    start_frame=True,
    block=BLOCK,
    cache=None,
    amount=0.1,
):
    config = SeparableConfig(
        shape=SHAPE,
        block=block,
        encoder=EncoderConfig(num_layers=2, start_frame=start_frame),
        decoder=DecoderConfig(num_layers=2, join=join, predict=predict),
        conditions=conditions,
        cache=cache or CacheConfig(window=16, num_sinks=1),
    )
    return shaken(build(config), amount)


def tiny_dense(
    conditions=ACTIONS, predict="velocity", block=BLOCK, cache=None, amount=0.1, **settings
):
    config = DenseConfig(
        shape=SHAPE,
        block=block,
        num_layers=3,
        predict=predict,
        conditions=conditions,
        cache=cache or CacheConfig(window=16, num_sinks=1),
        **settings,
    )
    return shaken(build(config), amount)


def random_conditions(spec, batch, num_frames, generator):
    actions = labels = None
    if spec.num_actions:
        actions = torch.randint(spec.num_actions, (batch, num_frames), generator=generator)
    if spec.is_composite:
        space = space_of(spec)
        space.seed(int(torch.randint(1000, (), generator=generator)))
        drawn = [flat(spec, space.sample()) for _ in range(batch * num_frames)]
        actions = torch.from_numpy(np.stack(drawn)).unflatten(0, (batch, num_frames))
    elif spec.action_dim:
        actions = torch.randn(batch, num_frames, spec.action_dim, generator=generator)
    if spec.num_labels:
        labels = torch.randint(spec.num_labels, (batch,), generator=generator)
    return Conditions(actions=actions, labels=labels)


def random_clips(model, batch=2, num_frames=5, num_draws=1, seed=0):
    """Clean frames, noisy frames of all that have a context, their times, conditions."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(batch, num_frames, *model.shape.shape, generator=generator)
    num_noisy = num_frames - model.needs_first_frame
    noisy = torch.randn(batch, num_draws, num_noisy, *model.shape.shape, generator=generator)
    time = torch.rand(batch, num_draws, num_noisy, generator=generator)
    conditions = random_conditions(model.config.conditions, batch, num_frames, generator)
    return clean, noisy, time, conditions


def stored_in(value):
    """The plain tensors of which one is made that a subclass keeps rounded."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def loss_of(objective, model, clean, conditions, generator):
    """Loss and logs of an objective on clips of latents."""
    batch = Batch(frames=clean, conditions=conditions, encoded=True)
    return objective.loss(model, batch, generator)


def denoising_loss(model, clean, conditions, config, generator, needs_first_frame=False):
    """Loss and logs of denoising."""
    objective = Denoise(config=config, needs_first_frame=needs_first_frame)
    return loss_of(objective, model, clean, conditions, generator)


def teacher_forced_loss(model, clean, conditions, config, generator, frames_per_block=1):
    """Loss and logs of teacher forcing on Wan's noise levels."""
    objective = TeacherForcing(config=config, frames_per_block=frames_per_block)
    return loss_of(objective, model, clean, conditions, generator)


def objective_of(loss):
    """An objective of a plain function (model, batch, generator) -> (loss, logs)."""
    objective = Objective()
    objective.loss = loss
    return objective
