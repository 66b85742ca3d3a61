"""Held-out clips while a model trains: the loss by noise level, and pictures to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from scd.autoencoders.build import Autoencoder, latents_of
from scd.common.runtime import derive_seed
from scd.data.clip import Batch, Conditions
from scd.evaluation.media import PictureRow, write_grid
from scd.models.checkpoint import World
from scd.objectives.denoise import validation_loss
from scd.streaming.rollout import Rollout
from scd.training.config import TrainConfig, open_training
from scd.training.state import Run


def read_held_out(config: TrainConfig) -> list[Batch]:
    """Read the clips of the val split that validation and samples use; none if neither is on.

    They depend on the data and the settings alone, so runs can be compared.

    Raises:
        ValueError, OSError: the split has no episode that is long enough, or cannot be read.
    """
    if not config.validate_every and not config.sample_every:
        return []
    source = open_training(config, "val")
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    usable = [episode for episode, length in enumerate(lengths) if length >= config.num_frames]
    if not usable:
        raise ValueError(
            f"num_frames is {config.num_frames}, but the longest val episode of {config.data} "
            f"has {max(lengths)} frames"
        )
    clips = []
    for index in range(config.num_validation_clips):
        episode = usable[index % len(usable)]
        num_starts = lengths[episode] - config.num_frames + 1
        start = derive_seed(0, "held-out clip", index) % num_starts
        clips.append(source.read(episode, start, config.num_frames))
    size = config.batch_size
    return [Batch.of(clips[first : first + size]) for first in range(0, len(clips), size)]


@torch.no_grad()
def validate(run: Run, held_out: list[Batch]) -> dict[str, float]:
    """Return the loss of the averaged weights on held-out clips, by noise level.

    The clips and their noise are the same in every call.
    """
    model, accelerator = run.world.model, run.accelerator
    totals: dict[str, float] = {}
    mine = list(range(run.rank, len(held_out), accelerator.num_processes))
    # Processes that share the weights run the model equally often; what is too much counts nothing.
    num_rounds = -(-len(held_out) // accelerator.num_processes)
    spare = [0] * (num_rounds - len(mine)) if run.sharded else []
    with _evaluating(run):
        for place, index in enumerate([*mine, *spare]):
            batch = held_out[index].to(accelerator.device)
            clean = latents_of(run.world.autoencoder, batch)
            seed = derive_seed(0, "validation", index)
            losses = validation_loss(
                model,
                clean,
                batch.conditions,
                run.config.validation_times,
                seed,
                model.needs_first_frame,
            )
            counted = len(batch.frames) if place < len(mine) else 0
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss * counted
    shares = gather_object([totals])
    num_clips = sum(len(batch.frames) for batch in held_out)
    return {name: sum(share.get(name, 0.0) for share in shares) / num_clips for name in shares[0]}


@contextmanager
def _evaluating(run: Run) -> Iterator[None]:
    """Put the averaged weights in the model, in eval mode, for the time of a with block."""
    run.world.model.eval()
    try:
        with run.ema.swap():
            yield
    finally:
        run.world.model.train()


@torch.no_grad()
def sample(run: Run, held_out: list[Batch]) -> None:
    """Write a picture: held-out clips above what the model makes of their first half."""
    writes = run.accelerator.is_main_process
    if writes or run.sharded:
        with _evaluating(run), run.accelerator.autocast():
            batch = held_out[0].to(run.accelerator.device)
            path = run.folder / "samples" / f"step_{run.step:06d}.png" if writes else None
            if run.world.model.config.conditions.has_text:
                try:
                    write_text_sample(run.world, batch, path, run.config.num_frames)
                except FileNotFoundError as error:
                    # Training needs latents only; pictures need their decoder too.
                    run.log.event("sample", {"step": run.step, "skipped": str(error)})
            else:
                write_sample(run.world, batch, path)
    run.accelerator.wait_for_everyone()


def write_sample(world: World, batch: Batch, path: Path | None, seed: int = 0) -> None:
    """Roll the second half of each clip out from the first, and write both as rows of a PNG.

    The truth of stored latents is what the autoencoder makes of them. Without a path only the model
    is run, for another process that holds a part of its weights.
    """
    true = world.autoencoder.decode(batch.frames) if batch.encoded else batch.frames
    num_frames = true.shape[1]
    num_given = max(1, num_frames // 2)
    rollout = Rollout(world, seed=seed)
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


def write_text_sample(
    world: World, batch: Batch, path: Path | None, num_frames: int, seed: int = 0
) -> None:
    """Write video of a held-out prompt, made from nothing, below the clip that it describes.

    One frame is shown of each latent frame, the last one that it stands for. A prompt may come
    without a clip: then `num_frames` latent frames are made of it. Without a path only the model is
    run, as in `write_sample`.

    Raises:
        FileNotFoundError: the world's decoder is not at hand.
    """
    assert batch.encoded and batch.conditions.text is not None
    frames, text = batch.frames[:1], batch.conditions.text[:1]
    # Opened before any frame is made: where it is not at hand nothing is made.
    decode = open_decoder(world.autoencoder)
    rollout = Rollout(world, seed=seed)
    rollout.begin(None, Conditions(text=text), can_reset=False)
    latents = []
    for _ in range(0, num_frames, rollout.block_size):
        made = rollout.step_latents()
        latents.append(made[:, None] if made.ndim == 4 else made)
    if path is None:
        return
    shown = {"truth": frames, "model": torch.cat(latents, dim=1).float()}
    per_latent = world.autoencoder.config.frames_per_latent
    rows = [
        PictureRow(name=name, frames=decode(video)[0, ::per_latent].float().cpu())
        for name, video in shown.items()
        if video.shape[1]
    ]
    write_grid(rows, [f"{number}" for number in range(num_frames)], path)


def open_decoder(autoencoder: Autoencoder) -> Callable[[Tensor], Tensor]:
    """Return what decodes latents, its weights read (FileNotFoundError: they are not at hand)."""
    autoencoder.load()
    return autoencoder.decode
