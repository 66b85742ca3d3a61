"""A student's rollout on its own frames, with gradient where the loss can use it.

Each frame is denoised as in streaming: from noise, estimate and fresh noise in turns, with the
memory of the clean frames before. But the loop is left at one drawn step, whose estimate is the
frame; only that step, and the encoder pass that made the frame's context, carry gradient. Source:
paper, sections 7.1 and 7.7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.build import Diffuser
from scd.models.flow import clean_from_velocity


def draw_exit(num_steps: int, generator: torch.Generator) -> int:
    """Draw the step at which all frames of a rollout leave the loop, in 0 .. num_steps - 1."""
    return int(torch.randint(num_steps, (), generator=generator, device=generator.device))


def self_forced(
    model: Diffuser,
    given: Float[Tensor, "b t c h w"],
    conditions: Conditions,
    num_generated: int,
    times: Sequence[float],
    exit_step: int,
    generator: torch.Generator,
    num_with_gradient: int | None = None,
) -> Float[Tensor, "b t2 c h w"]:
    """Roll a student out after given frames.

    Args:
        model: student; its own window holds for the memory, whatever the length of the rollout.
        given: clean first frames, 0 or more.
        conditions: of all frames, given and generated.
        num_generated: frames to generate, 1 or more.
        times: of the student's steps, descending, all above 0.
        exit_step: index of the time at which each frame is finished.
        generator: of all noise.
        num_with_gradient: how many of the last frames carry gradient; None: all, 0: none.

    Returns:
        The generated frames. Nothing of a frame's gradient reaches the frames before.
    """
    num_given = given.shape[1]
    if num_with_gradient is None:
        num_with_gradient = num_generated
    first_with_gradient = num_given + num_generated - num_with_gradient
    shape = (given.shape[0], *given.shape[2:])

    def noise() -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return drawn.to(given.device, given.dtype)

    with torch.no_grad():
        past = conditions.frames(0, num_given)
        state: Any = model.begin(given if num_given else None, past, given.shape[0])
    generated = []
    for index in range(num_given, num_given + num_generated):
        now = conditions.frames(index, index + 1)
        carries = torch.is_grad_enabled() and index >= first_with_gradient
        if carries and index == first_with_gradient:
            _forget_copies()
        noisy = noise()
        with torch.set_grad_enabled(carries):
            context: Any = _context(model, state, now, noisy, noise)
        clean = noisy
        for step in range(exit_step + 1):
            exits = step == exit_step
            if carries and exits and step > 0:
                _forget_copies()
            with torch.set_grad_enabled(carries and exits):
                time = noisy.new_full(shape[:1], times[step])
                clean = clean_from_velocity(noisy, model.velocity(context, noisy, time), time)
            if not exits:
                noisy = (1 - times[step + 1]) * clean + times[step + 1] * noise()
        with torch.no_grad():
            model.observe(state, clean.detach(), now)
        generated.append(clean)
    return torch.stack(generated, dim=1)


def _context(
    model: Diffuser,
    state: Any,
    now: Conditions,
    start: Tensor,
    noise: Callable[[], Tensor],
) -> Any:
    """Return the context of a frame, of a model whose encoder may read noise."""
    if model.encoder_noise != "none":
        return model.context(state, now, start if model.encoder_noise == "same" else noise())
    return model.context(state, now)


def _forget_copies() -> None:
    """Drop autocast's copies of weights: those made without gradient must not be used with it."""
    torch.clear_autocast_cache()
