"""Flow matching between a clean frame and noise: paths, times, schedules, solvers, guidance.

Pure functions; the network is passed in as a callable. Time 0 is clean and 1 is noise, velocity is
noise - clean. Source: paper (objective, sampling, distillation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from scd.models.config import Prediction, SamplingConfig, Solver

CLEAN_TIME = -1 / 1000
"""Time code of a frame that is known to be clean; just below every time that can be drawn.
Source: FAR and the paper's release, which write it as -1 on a scale of 1000."""

SMALLEST_TIME = 0.05
"""Divisor's floor where a clean estimate becomes a velocity: below it the loss would weigh errors
of the nearly clean frame by more than 400."""


def interpolate(
    clean: Float[Tensor, "..."], noise: Float[Tensor, "..."], time: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Return the noisy frame at `time` on the straight path; `time` lacks the last three axes."""
    weight = _like_frames(time, clean)
    return (1 - weight) * clean + weight * noise


def velocity_between(
    clean: Float[Tensor, "..."], noise: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Return the velocity of the straight path from clean (time 0) to noise (time 1)."""
    return noise - clean


def clean_from_velocity(
    noisy: Float[Tensor, "..."], velocity: Float[Tensor, "..."], time: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Estimate the clean frame by following `velocity` back from `time` to 0."""
    return noisy - _like_frames(time, noisy) * velocity


def velocity_from_clean(
    noisy: Float[Tensor, "..."], clean: Float[Tensor, "..."], time: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Return the velocity that leads to an estimate of the clean frame.

    Times under 0.05 are divided as 0.05: see SMALLEST_TIME.
    """
    return (noisy - clean) / _like_frames(time, noisy).clamp(min=SMALLEST_TIME)


def _like_frames(time: Tensor, frames: Tensor) -> Tensor:
    return time[..., None, None, None].to(frames.dtype)


def draw_times(
    shape: Sequence[int],
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.0,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "..."]:
    """Draw logit-normal times, strictly inside (0, 1), independently for each entry of `shape`.

    Source: paper (objective): mean 0, standard deviation 1, a fresh draw per frame.
    """
    normal = torch.randn(*shape, generator=generator, device=generator.device).to(device)
    # float32's sigmoid reaches exactly 1 at 17: keep the draw off the ends of the interval.
    return torch.sigmoid(mean + std * normal).clamp(1e-4, 1 - 1e-4)


def first_schedule(sampling: SamplingConfig) -> Float[Tensor, " steps"]:
    """Return the times of the first frame of a stream that begins from nothing, as `schedule`."""
    if not sampling.first_times:
        return schedule(sampling)
    return torch.tensor([*sampling.first_times, 0.0], dtype=torch.float64)


def schedule(sampling: SamplingConfig) -> Float[Tensor, " steps"]:
    """Return the num_steps + 1 descending times of a sampling run, from 1 to 0, as float64.

    "reference" is the release's grid, linspace(1000, 1, num_steps) / 1000 and then 0, whose last
    step is nearly wasted; it is kept for parity. Source: paper (sampling).
    """
    if sampling.schedule == "listed":
        return torch.tensor([*sampling.times, 0.0], dtype=torch.float64)
    if sampling.schedule == "reference":
        # Rounded to float32 as in the release: at 1000 its ticks are these to the last digit.
        grid = torch.linspace(1000, 1, sampling.num_steps, dtype=torch.float64) / 1000
        grid = grid.float().double()
        return torch.cat([grid, grid.new_zeros(1)])
    grid = torch.linspace(1, 0, sampling.num_steps + 1, dtype=torch.float64)
    return sampling.shift * grid / (1 + (sampling.shift - 1) * grid)


def with_num_steps(sampling: SamplingConfig, num_steps: int | None) -> SamplingConfig:
    """Return the same with another number of steps; None: with as many as it has.

    Of listed times others are taken in between: with half as many steps every other one. A first
    frame keeps its own times where they are still more.
    """
    if num_steps is None:
        return sampling
    if len(sampling.first_times) <= num_steps:
        sampling = replace(sampling, first_times=())
    if sampling.schedule != "listed" or num_steps < 1:
        return replace(sampling, num_steps=num_steps)
    ends = [*sampling.times, 0.0]
    times = []
    for step in range(num_steps):
        index, part = divmod(step * sampling.num_steps, num_steps)
        times.append(ends[index] + (ends[index + 1] - ends[index]) * part / num_steps)
    return replace(sampling, num_steps=num_steps, times=tuple(times))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One call of the network on the way from noise to a frame, and what its velocity is for.

    The next frame is keep * that at the start of the step + gain * velocity + gain_before * the
    velocity of the call before + step_noise * new noise.
    """

    index: int
    """Place of its time in the schedule."""
    gain: float
    """Weight of its velocity: a distance in time, so below 0."""
    gain_before: float = 0.0
    """Weight of the velocity before; 0: it is not used."""
    ends_step: bool = True
    """Whether the next frame is where the next step starts."""
    keep: float = 1.0
    """Weight of the frame at the start of the step."""
    step_noise: float = 0.0
    """Weight of the step's own noise; 0: it has none."""


def evaluations(times: Sequence[float], solver: Solver) -> list[Evaluation]:
    """List the calls of the network for one frame; see `solve`."""
    calls = []
    for index, (time, next_time) in enumerate(pairwise(times)):
        step = next_time - time
        if solver == "heun" and next_time > 0:
            calls.append(Evaluation(index=index, gain=step, ends_step=False))
            calls.append(Evaluation(index=index + 1, gain=step / 2, gain_before=step / 2))
        elif solver == "renoise":
            # The clean estimate, frame - time * velocity, on its way to other noise.
            keep = 1 - next_time
            calls.append(
                Evaluation(index=index, gain=-time * keep, keep=keep, step_noise=next_time)
            )
        else:
            calls.append(Evaluation(index=index, gain=step))
    return calls


def num_step_noises(times: Sequence[float], solver: Solver) -> int:
    """Count the noises that `solve` needs besides the one it starts from."""
    return sum(call.step_noise > 0 for call in evaluations(times, solver))


def check_step_noise(step_noise: Tensor | None, times: Sequence[float], solver: Solver) -> None:
    """Refuse another number of step noises than the steps need (ValueError)."""
    needed, given = num_step_noises(times, solver), 0 if step_noise is None else len(step_noise)
    if given != needed:
        raise ValueError(
            f"{len(times) - 1} steps of solver {solver!r} need {needed} step noises, got {given}"
        )


def solve(
    predicted_at: Callable[[Tensor, float], Tensor],
    noise: Float[Tensor, "..."],
    times: Sequence[float],
    solver: Solver = "euler",
    step_noise: Float[Tensor, "..."] | None = None,
    predicts: Prediction = "velocity",
) -> Float[Tensor, "..."]:
    """Lead frames from noise to clean ones by a velocity field.

    Args:
        predicted_at: network; takes noisy frames and a time in [0, 1].
        noise: standard normal frames.
        times: descending times, the first that of `noise`.
        solver: Euler is of order 1, Heun of order 2 (its last step to time 0 is an Euler step,
            since a velocity at time 0 is not trained). "renoise" follows no path: each step goes to
            the clean estimate at once and, but for the last, back to the next time with noise of
            its own. Source: Self-Forcing (rollout).
        step_noise: of "renoise": standard normal, one like `noise` for each step but the last.
        predicts: what the network returns.

    Raises:
        ValueError: another number of step noises than needed.
    """
    check_step_noise(step_noise, times, solver)
    frames = start = noise
    before: Tensor | None = None
    for call in evaluations(times, solver):
        predicted = predicted_at(frames, times[call.index])
        # Of many frames each pass over memory counts: no velocity where none is needed, and a
        # weight is part of its sum.
        if predicts == "clean" and solver != "heun":
            frames = _towards(predicted, start, times[call.index], call)
        else:
            if predicts == "clean":
                predicted = (frames - predicted) / max(times[call.index], SMALLEST_TIME)
            kept = start if call.keep == 1 else call.keep * start
            frames = torch.add(kept, predicted, alpha=call.gain)
            if call.gain_before:
                assert before is not None
                frames = frames.add_(before, alpha=call.gain_before)
            before = predicted
        if call.step_noise:
            assert step_noise is not None
            frames = frames.add_(step_noise[call.index], alpha=call.step_noise)
        if call.ends_step:
            start = frames
    return frames


def _towards(clean: Tensor, start: Tensor, time: float, call: Evaluation) -> Tensor:
    """Do a step from `start` whose velocity is (start - clean) / time without the velocity."""
    part = -call.gain / (call.keep * max(time, SMALLEST_TIME))
    moved = clean if math.isclose(part, 1) else torch.lerp(start, clean, part)
    return moved if call.keep == 1 else call.keep * moved


def guide(
    unconditional: Float[Tensor, "..."],
    conditional: Float[Tensor, "..."],
    scale: float | Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """Push a prediction away from the unconditional one; scale 1 returns the conditional one."""
    return unconditional + scale * (conditional - unconditional)


def guided(
    predicted_at: Callable[[Tensor, float], Tensor], scale: float | None
) -> Callable[[Tensor, float], Tensor]:
    """Return the guided field of a network that sees [unconditional ; conditional] frames.

    A clean frame is linear in the velocity, so either prediction can be guided.

    Args:
        predicted_at: network; takes noisy frames [2b ...] and a time in [0, 1].
        scale: of the guidance; None: none, the network sees the b frames as they are.
    """
    if scale is None:
        return predicted_at

    def field(noisy: Tensor, time: float) -> Tensor:
        unconditional, conditional = predicted_at(torch.cat([noisy, noisy]), time).chunk(2)
        return guide(unconditional, conditional, scale)

    return field
