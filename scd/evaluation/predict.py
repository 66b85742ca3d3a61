"""Held-out clips, what a world makes of their rest, and how long that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.config import differences, to_json
from scd.common.runtime import make_generator
from scd.common.threads import ThreadChoice
from scd.data.clip import Batch, Conditions
from scd.data.frame_rate import check_rate
from scd.data.source import DataCard, Source
from scd.evaluation.protocols import NUM_CLIPS, Protocol
from scd.models.checkpoint import World
from scd.models.config import Guidance, SamplingConfig
from scd.streaming.rollout import Rollout, Timing

Window = tuple[int, int]
"""An episode and the frame at which a clip of it begins."""

TIMED = (
    "wall-clock seconds of one rollout step, synchronised with the device; encoder: causal work "
    "outside the denoising loop; decoder: all denoising steps; autoencoder: latent to pixels"
)
"""What the seconds of `summarize` mean, for result files."""


def check_fit(world: World, card: DataCard, data: str) -> None:
    """Refuse data of another size, steering or rate than the world was trained for (ValueError)."""
    ours, theirs = world.card, card
    if (ours.height, ours.width) != (theirs.height, theirs.width):
        raise ValueError(
            f"the model makes frames of {ours.height}x{ours.width}, "
            f"{data} has {theirs.height}x{theirs.width}"
        )
    different = differences(to_json(ours.conditions), to_json(theirs.conditions))
    if different:
        raise ValueError(
            f"{data} is not steered as the model is (the model's setting, then the data's): "
            f"{'; '.join(different[:3])}"
        )
    check_rate("the model", ours.fps, data, theirs.fps)


def count_windows(source: Source, num_frames: int) -> int:
    """Count the clips of a length that do not overlap."""
    lengths = (source.num_frames(episode) for episode in range(source.num_episodes))
    return sum(length // num_frames for length in lengths)


def choose_windows(source: Source, num_windows: int, num_frames: int, seed: int) -> list[Window]:
    """Draw clips that do not overlap, from as many different episodes as possible.

    Raises:
        ValueError: there are fewer such clips, or none is wanted.
    """
    if num_windows < 1:
        raise ValueError(f"the number of clips must be 1 or more, got {num_windows}")
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    places = [length // num_frames for length in lengths]
    if sum(places) < num_windows:
        raise ValueError(
            f"needed {num_windows} clips of {num_frames} frames that do not overlap, the data has "
            f"{sum(places)}; its longest episode has {max(lengths)} frames"
        )
    order = torch.randperm(len(lengths), generator=make_generator(seed, "episodes")).tolist()
    windows: list[Window] = []
    passes = 0
    while True:
        for episode in order:
            if passes < places[episode]:
                generator = make_generator(seed, "places", episode)
                place = int(torch.randperm(places[episode], generator=generator)[passes])
                windows.append((episode, place * num_frames))
                if len(windows) == num_windows:
                    return windows
        passes += 1


def read_windows(source: Source, windows: Sequence[Window], num_frames: int) -> Batch:
    return Batch.of([source.read(episode, start, num_frames) for episode, start in windows])


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a world made of the rest of some clips."""

    frames: Float[Tensor, "b m 3 h w"]
    """Predicted frames in [-1, 1], on the CPU."""
    timings: list[Timing]
    """Of each step, which made one frame of every clip."""


def predict(
    world: World,
    batch: Batch,
    context: int,
    seed: int = 0,
    number: int = 0,
    actions: Conditions | None = None,
    sampling: SamplingConfig | None = None,
    guidance: Guidance | None = None,
    threads: ThreadChoice | None = None,
) -> Prediction:
    """Roll out the rest of clips from their first frames.

    Args:
        world: what predicts.
        batch: whole clips; of the frames after the context only the actions are used.
        context: frames of each clip that the model is given; 0: it begins from nothing.
        seed: of the noise.
        number: other batches of the same seed have other noise.
        actions: steer the predicted frames by these, of the same length, instead of the clips'.
        sampling: how frames are denoised; None: as the world says.
        guidance: how predictions are pushed away from an unconditional branch; None: not.
        threads: of the CPU, for each frame; None: those that the process has.
    """
    assert context < batch.frames.shape[1]
    # A rollout hashes its seed: other batches, up to 10,000 of a seed, have unrelated noise.
    rollout = Rollout(world, sampling, guidance, seed * 10_000 + number)
    if context:
        rollout.begin(batch.frames[:, :context], batch.conditions.frames(0, context))
    else:
        lasting = batch.conditions.lasting
        rollout.begin(None, lasting, batch=len(batch.frames))
    steering = (actions or batch.conditions).actions
    frames, timings = [], []
    for index in range(context, batch.frames.shape[1]):
        with threads.piece(len(batch.frames)) if threads else nullcontext():
            step = rollout.step(None if steering is None else steering[:, index])
        frames.append(step.cpu())
        timings.append(rollout.timing)
    return Prediction(frames=torch.stack(frames, dim=1), timings=timings)


def step_in_turns(
    rollouts: Mapping[str, Rollout], actions: Sequence[Tensor | None]
) -> tuple[dict[str, Float[Tensor, "m 3 h w"]], dict[str, list[Timing]]]:
    """Step streams that have begun, by name, one frame of each in turn: A B A B.

    Whatever else the machine does meanwhile then hits all of them alike.

    Returns:
        The generated frames of the first stream of each, and the timing of each.
    """
    frames: dict[str, list[Tensor]] = {name: [] for name in rollouts}
    timings: dict[str, list[Timing]] = {name: [] for name in rollouts}
    for now in actions:
        for name, rollout in rollouts.items():
            frames[name].append(rollout.step(now)[0].cpu())
            timings[name].append(rollout.timing)
    return {name: torch.stack(made) for name, made in frames.items()}, timings


def summarize(timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """Return mean, p50 and p99 of the seconds per frame of each part and of their total.

    With fewer than a hundred frames p99 lies between the slowest two.
    """
    parts = {
        "encoder": [timing.encoder_s for timing in timings],
        "decoder": [timing.decoder_s for timing in timings],
        "autoencoder": [timing.autoencoder_s for timing in timings],
        "total": [timing.total_s for timing in timings],
    }
    summary = {}
    for name, seconds in parts.items():
        values = torch.tensor(seconds, dtype=torch.float64)
        p50, p99 = torch.quantile(values, torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
        summary[name] = {"mean": values.mean().item(), "p50": p50, "p99": p99}
    return summary


def reduced_to(protocol: Protocol, source: Source) -> Protocol:
    """Say how many clips these are where it was left open: as many as there are, at most 64.

    A source without any changes nothing: choosing them says what is missing.
    """
    if protocol.num_clips is not None:
        return protocol
    if protocol.clips == "spread":
        available = count_windows(source, protocol.num_frames)
    else:
        episodes = range(0, source.num_episodes, protocol.every)
        available = sum(source.num_frames(one) >= protocol.num_frames for one in episodes)
    return replace(protocol, num_clips=min(NUM_CLIPS, available or NUM_CLIPS))


def choose_clips(source: Source, protocol: Protocol, data: str) -> tuple[list[Window], list[int]]:
    """Return the clips of a protocol, and the episodes that were too short for one.

    Raises:
        ValueError: the data has fewer clips than the protocol needs.
    """
    assert protocol.num_clips is not None
    length = protocol.num_frames
    if protocol.clips == "spread":
        return choose_windows(source, protocol.num_clips, length, protocol.seed), []
    windows: list[Window] = []
    short: list[int] = []
    for episode in range(0, source.num_episodes, protocol.every):
        if len(windows) == protocol.num_clips:
            break
        if source.num_frames(episode) < length:
            short.append(episode)
        else:
            windows.append((episode, 0))
    if len(windows) < protocol.num_clips:
        which = f"every {protocol.every}th of " if protocol.every > 1 else ""
        raise ValueError(
            f"protocol {protocol.name} needs {protocol.num_clips} clips of {length} frames, one "
            f"from each episode; {which}the {source.num_episodes} {protocol.split} episodes of "
            f"{data} give {len(windows)}, {len(short)} are too short"
            + (f"; --num-clips {len(windows)} measures those, and says so" if windows else "")
        )
    return windows, short
