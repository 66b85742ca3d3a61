"""The noise of streams: of every frame a function of a seed and the frame's number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from scd.common.runtime import derive_seed, make_generator
from scd.data.given import Whole, as_whole

NoiseUse = Literal["frame", "context", "encoder"]
"""What noise is for: the start of a frame's denoising, the corruption of its context, or what an
encoder reads in the place of the frame."""


def frame_noise(seed: int, frame: int, use: NoiseUse, shape: tuple[int, ...]) -> Tensor:
    """Draw the noise of one frame of a stream, standard normal, on the CPU.

    It follows from the arguments alone, so that a fork, another number of steps, or a stream that
    shares its calls with others meets the same noise.
    """
    return torch.randn(*shape, generator=make_generator(seed, f"noise of a {use}", frame))


def step_noise(seed: int, frame: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the noises with which the first steps of one frame end, [number *shape]; as frame_noise.

    Fewer steps meet the first of the same draws.
    """
    generator = make_generator(seed, "noise of a step", frame)
    return torch.stack([torch.randn(*shape, generator=generator) for _ in range(number)])


def frame_noises(
    seeds: Sequence[int], frames: Sequence[int], use: NoiseUse, shape: tuple[int, ...]
) -> Tensor:
    """Draw `frame_noise` of all that a step makes.

    Args:
        seeds: of the futures of each stream.
        frames: numbers of the frames; of several, behind the batch stands an axis of frames.
        use: what it is for.
        shape: of a frame of the whole batch, which is streams times seeds: [b c h w].
    """
    size = _size_of_one(shape, seeds)
    return _together(lambda seed, frame: frame_noise(seed, frame, use, size), seeds, frames, 0)


def step_noises(
    seeds: Sequence[int], frames: Sequence[int], number: int, shape: tuple[int, ...]
) -> Tensor:
    """Draw `step_noise` of all that a step makes, [number b ...]; as frame_noises."""
    size = _size_of_one(shape, seeds)
    return _together(lambda seed, frame: step_noise(seed, frame, number, size), seeds, frames, 1)


def future_seeds(
    seeds: Sequence[int], num_futures: int, given: Sequence[Whole] | None = None
) -> tuple[int, ...]:
    """Return the seeds of futures, those of one seed in a row.

    Args:
        seeds: of what the futures follow.
        num_futures: of each.
        given: for all futures; None: the first keeps its seed, the others' follow from it.

    Raises:
        ValueError: another number of them.
    """
    number = num_futures * len(seeds)
    if given is None:
        # Their number tells futures of a future from those that were its siblings.
        return tuple(
            derive_seed(seed, "noise of a future", len(seeds), index) if index else seed
            for seed in seeds
            for index in range(num_futures)
        )
    if len(given) != number:
        raise ValueError(f"{number} futures need as many seeds, got {len(given)}")
    return tuple(as_whole(seed, "a seed") for seed in given)


def _size_of_one(shape: tuple[int, ...], seeds: Sequence[int]) -> tuple[int, ...]:
    return shape[0] // len(seeds), *shape[1:]


def _together(
    draw: Callable[[int, int], Tensor], seeds: Sequence[int], frames: Sequence[int], batch_axis: int
) -> Tensor:
    behind = batch_axis + 1
    drawn = []
    for frame in frames:
        each = [draw(seed, frame) for seed in seeds]
        # The futures of a stream stand in a row.
        drawn.append(
            each[0] if len(each) == 1 else torch.stack(each, behind).flatten(batch_axis, behind)
        )
    return drawn[0] if len(drawn) == 1 else torch.stack(drawn, behind)
