"""Held-out clips while a world model trains: the loss by noise level, and pictures to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from scd.autoencoders.build import latents_of
from scd.common.runtime import derive_seed
from scd.data.clip import Batch, Conditions
from scd.data.loader import read_clips
from scd.data.prompts import is_prompts
from scd.data.source import Source
from scd.evaluation.grids import PictureRow, write_grid
from scd.models.checkpoint import World
from scd.objectives.denoise import validation_loss
from scd.streaming.rollout import Rollout
from scd.training.config import TrainConfig
from scd.training.fit import open_split


def read_held_out(config: TrainConfig, train: Source) -> list[Batch]:
    """Read the clips of the val split that validation and samples use; none if neither is on.

    They depend on the data and the settings alone, so runs can be compared. Prompts are held out
    and trained on alike: their source is `train`.

    Raises:
        ValueError, OSError: the split has no episode that is long enough, or cannot be read.
    """
    if not config.validate_every and not config.sample_every:
        return []
    source = train if is_prompts(config.data) else open_split(config, "val")
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    usable = [episode for episode, length in enumerate(lengths) if length >= config.num_frames]
    if not usable:
        raise ValueError(
            f"num_frames is {config.num_frames}, but the longest val episode of {config.data} "
            f"has {max(lengths)} frames"
        )
    places = []
    for index in range(config.num_validation_clips):
        episode = usable[index % len(usable)]
        num_starts = lengths[episode] - config.num_frames + 1
        places.append((episode, derive_seed(0, "held-out clip", index) % num_starts))
    clips = read_clips(source, places, config.num_frames, config.data_on_error)
    size = config.batch_size
    return [Batch.of(clips[first : first + size]) for first in range(0, len(clips), size)]


@torch.no_grad()
def validate(
    world: World,
    held_out: list[Batch],
    times: Sequence[float],
    accelerator: Accelerator,
    sharded: bool,
) -> dict[str, float]:
    """Return the loss of a model on held-out clips, by noise level, and how it listens.

    `action_gap` is how much the mean loss rises, on the same noise, where each clip is steered by
    the actions of another: 0 for a model that does not listen. Only of clips with actions, and of
    two or more.

    The clips and their noise are the same in every call. Processes share the clips; those that hold
    a part of the weights each (`sharded`) run the model equally often, and what is too much counts
    nothing.
    """
    model, num_processes = world.model, accelerator.num_processes
    totals: dict[str, float] = {}
    others = of_other_clips([batch.conditions for batch in held_out])
    mine = list(range(accelerator.process_index, len(held_out), num_processes))
    num_rounds = -(-len(held_out) // num_processes)
    spare = [0] * (num_rounds - len(mine)) if sharded else []
    for place, index in enumerate([*mine, *spare]):
        batch = held_out[index].to(accelerator.device)
        clean = latents_of(world.autoencoder, batch)
        seed = derive_seed(0, "validation", index)
        more = {"times": times, "seed": seed, "needs_first_frame": model.needs_first_frame}
        losses = validation_loss(model, clean, batch.conditions, **more)
        if others:
            theirs = others[index].to(accelerator.device)
            other = validation_loss(model, clean, theirs, **more)
            losses["action_gap"] = other["loss"] - losses["loss"]
        counted = len(batch.frames) if place < len(mine) else 0
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + loss * counted
    shares = gather_object([totals])
    num_clips = sum(len(batch.frames) for batch in held_out)
    return {name: sum(share.get(name, 0.0) for share in shares) / num_clips for name in shares[0]}


def of_other_clips(conditions: Sequence[Conditions]) -> list[Conditions]:
    """Return conditions with the actions of the next clip, those of the last with the first's; none
    if there are no actions, or only one clip."""
    actions = [one.actions for one in conditions if one.actions is not None]
    if sum(map(len, actions)) < 2:
        return []
    parts = torch.cat(actions).roll(-1, 0).split([len(one) for one in actions])
    return [replace(one, actions=part) for one, part in zip(conditions, parts, strict=True)]


@torch.no_grad()
def draw_samples(world: World, batch: Batch, path: Path | None, num_frames: int) -> None:
    """Write a picture: held-out clips above what the model makes of their first half, or a clip
    above the video of its prompt.

    Args:
        world: the model and what it takes.
        batch: held-out clips, on the model's device.
        path: the picture; None: only the model is run, for another process that holds a part of
            its weights.
        num_frames: latent frames that are made of a prompt, which may come without a clip.

    Raises:
        FileNotFoundError: the decoder of latents is not at hand; then nothing was made.
    """
    if world.model.config.conditions.has_text:
        _draw_video(world, batch, path, num_frames)
    else:
        _draw_rollouts(world, batch, path)


def _draw_rollouts(world: World, batch: Batch, path: Path | None) -> None:
    # The truth of stored latents is what the autoencoder makes of them.
    true = world.autoencoder.decode(batch.frames) if batch.encoded else batch.frames
    num_frames = true.shape[1]
    num_given = max(1, num_frames // 2)
    rollout = Rollout(world, seed=0)
    rollout.begin(true[:, :num_given], batch.conditions.frames(0, num_given))
    actions = batch.conditions.actions
    predicted = [
        rollout.step(None if actions is None else actions[:, index])
        for index in range(num_given, num_frames)
    ]
    if path is None:
        return
    frames = torch.cat([true[:, :num_given], torch.stack(predicted, dim=1)], dim=1)
    rows = []
    for clip in range(min(len(frames), 4)):
        rows.append(PictureRow(name="truth", frames=true[clip].float().cpu()))
        rows.append(PictureRow(name="model", frames=frames[clip].float().cpu()))
    labels = ["given"] * num_given + [f"+{n + 1}" for n in range(num_frames - num_given)]
    write_grid(rows, labels, path)


def _draw_video(world: World, batch: Batch, path: Path | None, num_frames: int) -> None:
    # One frame is shown of each latent frame, the last one that it stands for.
    assert batch.encoded and batch.conditions.text is not None
    frames, text = batch.frames[:1], batch.conditions.text[:1]
    # Opened before any frame is made: where it is not at hand nothing is made.
    world.autoencoder.load()
    rollout = Rollout(world, seed=0)
    rollout.begin(None, Conditions(text=text), can_reset=False)
    latents, actions = [], batch.conditions.actions
    for place in range(0, num_frames, rollout.block_size):
        made = rollout.step_latents(None if actions is None else actions[:1, place])
        latents.append(made[:, None] if made.ndim == 4 else made)
    if path is None:
        return
    shown = {"truth": frames, "model": torch.cat(latents, dim=1).float()}
    per_latent = world.autoencoder.config.frames_per_latent
    rows = [
        PictureRow(name=name, frames=world.autoencoder.decode(video)[0, ::per_latent].float().cpu())
        for name, video in shown.items()
        if video.shape[1]
    ]
    write_grid(rows, [f"{number}" for number in range(num_frames)], path)
