"""The noise of streams: of every frame a function of a seed and the frame's number alone."""

from __future__ import annotations

from collections.abc import Sequence
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
    return _drawn(seeds, frames, f"noise of a {use}", 1, shape)[0]


def step_noises(
    seeds: Sequence[int], frames: Sequence[int], number: int, shape: tuple[int, ...]
) -> Tensor:
    """Draw `step_noise` of all that a step makes, [number b ...]; as frame_noises."""
    return _drawn(seeds, frames, "noise of a step", number, shape)


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


def _drawn(
    seeds: Sequence[int], frames: Sequence[int], purpose: str, number: int, shape: tuple[int, ...]
) -> Tensor:
    """Draw in place, each seed and frame by a generator of its own."""
    size = (shape[0] // len(seeds), *shape[1:])
    drawn = torch.empty(len(seeds), len(frames), number, *size)

    for seed, of_seed in zip(seeds, drawn, strict=True):
        for frame, target in zip(frames, of_seed, strict=True):
            _fill(target, make_generator(seed, purpose, frame))
    # The futures of a stream stand in a row.
    together = drawn.permute(2, 3, 0, 1, *range(4, drawn.ndim)).flatten(1, 2)
    return together.squeeze(2) if len(frames) == 1 else together


def _fill(target: Tensor, generator: torch.Generator) -> None:
    """Draw tensors [number ...] one after another."""
    if target[0].numel() % 16:
        for one in target:
            one.normal_(generator=generator)
    else:
        # PyTorch draws 16 numbers at a time: all at once are the same, and take one call.
        target.normal_(generator=generator)
