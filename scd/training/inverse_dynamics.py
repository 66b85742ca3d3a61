"""Training of an inverse dynamics model on recorded clips: `scd train-judge`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from scd.common.config import to_json
from scd.common.provenance import provenance
from scd.common.runtime import derive_seed
from scd.data.clip import Batch
from scd.data.loader import Loader
from scd.data.source import Source, open_source
from scd.data.spaces import ActionPart
from scd.evaluation.image import bootstrap
from scd.evaluation.inverse_dynamics import (
    InverseDynamics,
    InverseDynamicsConfig,
    TrainedInverseDynamics,
    error_of,
    load_inverse_dynamics,
    pairs,
    save_inverse_dynamics,
)
from scd.evaluation.predict import choose_windows, count_windows, read_windows
from scd.objectives.denoise import Logs, Objective
from scd.optim.config import OptimConfig
from scd.optim.optim import EMA
from scd.training.config import RunConfig, TrainInverseDynamicsConfig
from scd.training.state import OptimisationGroup, Task
from scd.training.trainer import train_task

BLUR, NOISE = 1.0, 0.3
"""The most that a frame is distorted: detail below 4 pixels gone, and noise of this deviation."""

BLUR_CELL = 4
"""Pixels that a blurred frame averages over, each way."""

MAX_HELD_OUT = 512
"""Held-out clips on which a model is measured at most."""

NUM_STANDARD = 16
"""Batches of real frames by which features are standardised."""


def train_inverse_dynamics(config: TrainInverseDynamicsConfig) -> TrainedInverseDynamics:
    """Train a model, measure it on held-out clips, and write its folder.

    Raises:
        FileExistsError: something is at `out` already.
        ValueError: data without actions, frames below 8 x 8, or episodes that are too short.
        OSError: the data cannot be read or the model not be written.
        Interrupted: a signal came; nothing is kept.
    """
    folder = Path(config.out)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: needed a new folder")
    run_config = RunConfig(
        data=config.data,
        out="",
        batch_size=config.batch_size,
        num_frames=config.num_frames,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        data_on_error=config.data_on_error,
        ema_decay=0.0,
        log_every=100,
        optim=OptimConfig(lr=config.lr, warmup_steps=0, decay_fraction=1.0, clip_norm=0.0),
    )
    task = train_task(run_config, partial(InverseDynamicsTask, config)).task
    assert isinstance(task, InverseDynamicsTask)
    network, loader = task.model.eval().requires_grad_(False), task.loader
    _standardise_features(network, loader, config.steps)
    measured = measure_held_out(network, task.held_out, config.num_frames, config.seed)
    trained = TrainedInverseDynamics(network=network, card=loader.source.card, held_out=measured)
    about = {"settings": to_json(config)} | provenance(task.accelerator.device)
    save_inverse_dynamics(trained, folder, about)
    return load_inverse_dynamics(folder, task.accelerator.device)


class InverseDynamicsTask(Task):
    """An inverse dynamics model, which takes a minute or three: it is never continued."""

    # One process, in 32 bits.
    is_wrapped = True

    def __init__(
        self, config: TrainInverseDynamicsConfig, run_config: RunConfig, accelerator: Accelerator
    ) -> None:
        if accelerator.num_processes > 1:
            raise ValueError("an inverse dynamics model is trained in one process")
        self.config, self.accelerator, self.max_steps = run_config, accelerator, config.steps
        source = open_source(config.data, "train", config.strict)
        self.held_out = open_source(config.data, "val", config.strict)
        if not count_windows(self.held_out, config.num_frames):
            held_out = self.held_out
            longest = max(held_out.num_frames(episode) for episode in range(held_out.num_episodes))
            raise ValueError(
                f"the model is measured on held-out clips of {config.num_frames} frames, but the "
                f"longest val episode of {config.data} has {longest}: lower --num-frames or record "
                "longer ones"
            )
        card = source.card
        shape = InverseDynamicsConfig(
            conditions=card.conditions, width=config.width, feature_dim=config.feature_dim
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "judge weights"))
            self.model: InverseDynamics = InverseDynamics(shape, card.height, card.width)
        self.loader = Loader(
            source,
            config.batch_size,
            config.num_frames,
            config.seed,
            workers=1,
            on_error=config.data_on_error,
        )
        _standardise_actions(self.model, self.loader)

    def make_groups(self, ema: EMA) -> list[OptimisationGroup]:
        """Return the model; all its weights decay, biases too."""
        optim = self.config.optim
        settings = {"params": list(self.model.parameters()), "base_lr": optim.lr}
        optimizer = torch.optim.AdamW([settings], lr=optim.lr, weight_decay=0.01)
        return [
            OptimisationGroup(
                network=self.model,
                wrapped=self.model,
                objective=InverseDynamicsObjective(),
                optim=optim,
                optimizers=[optimizer],
            )
        ]


class InverseDynamicsObjective(Objective):
    """To read actions and distortions of all pairs of frames.

    Half of the clips are distorted, each frame by another amount: generated frames are never as
    clean as recorded ones, and a model that fails on them would call a blurred turn no turn.
    """

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """Return the loss on clips of pixels."""
        frames, levels = distort(batch.frames, generator)
        features = model.raw_features(*pairs(frames))
        read, distortion = model.readings(features)
        actions = pair_actions(batch)
        # Each part is learnt as it would be alone.
        of_parts = model.losses(read, actions)
        of_actions = of_parts.sum()
        errors = [error_of(*one).mean() for one in model.by_part(read.detach(), actions)]
        of_distortions = F.mse_loss(distortion, rearrange(levels[:, 1:], "b t two -> (b t) two"))
        logs = {"right": 1 - torch.stack(errors).mean(), "actions": of_actions.detach()}
        if len(model.parts) > 1:
            names = (f"actions/{part.name}" for part in model.parts)
            logs |= dict(zip(names, of_parts.detach(), strict=True))
        return of_actions + of_distortions, logs | {"distortions": of_distortions.detach()}


def distort(
    frames: Float[Tensor, "b t 3 h w"], generator: torch.Generator
) -> tuple[Float[Tensor, "b t 3 h w"], Float[Tensor, "b t 2"]]:
    """Blur and add noise to half of the clips.

    Returns:
        The frames, and how much each is blurred and noisy, 0 to 1.
    """
    b, t, _, h, w = frames.shape
    levels = torch.rand(b, t, 2, generator=generator, device=frames.device)
    levels *= (torch.rand(b, 1, 1, generator=generator, device=frames.device) < 0.5).float()
    flat = rearrange(frames, "b t c h w -> (b t) c h w")
    coarse = F.avg_pool2d(flat, BLUR_CELL, ceil_mode=True, count_include_pad=False)
    coarse = F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)
    blur, noise = levels[..., None, None, None].unbind(2)
    blurred = frames.lerp(coarse.unflatten(0, (b, t)), BLUR * blur)
    draw = torch.randn(frames.shape, generator=generator, device=frames.device)
    return blurred + NOISE * noise * draw, levels


def pair_actions(batch: Batch) -> Tensor:
    """Return the action that led to the second frame of each pair."""
    assert batch.conditions.actions is not None
    return batch.conditions.actions[:, 1:].flatten(0, 1)


def _standardise_actions(network: InverseDynamics, loader: Loader) -> None:
    if any(part.space == "Box" for part in network.parts):
        batches = [loader.batch(index) for index in range(NUM_STANDARD)]
        actions = torch.cat([pair_actions(batch) for batch in batches])
        network.standardise(None, actions)


def _standardise_features(network: InverseDynamics, loader: Loader, first: int) -> None:
    features = []
    for index in range(first, first + NUM_STANDARD):
        batch = loader.batch(index).to(network.feature_mean.device)
        features.append(network.raw_features(*pairs(batch.frames)))
    network.standardise(torch.cat(features), None)


@torch.no_grad()
def measure_held_out(
    network: InverseDynamics, source: Source, num_frames: int, seed: int
) -> dict[str, Any]:
    """Measure how well a model reads the actions of real clips that it has not seen.

    Returns:
        Of choices and keys: accuracy with its interval over clips, and the share of the most
        frequent one, which is what guessing gives. Of boxes: error, as `InverseDynamics.errors`.
        Where an action has several parts, these by their names.
    """
    num_clips = min(MAX_HELD_OUT, count_windows(source, num_frames))
    windows = choose_windows(source, num_clips, num_frames, seed)
    errors, seen = [], []
    for first in range(0, num_clips, 16):
        batch = read_windows(source, windows[first : first + 16], num_frames)
        batch = batch.to(network.feature_mean.device)
        features, actions = network.features(*pairs(batch.frames)), pair_actions(batch)
        of_pairs = network.errors(features, actions)
        errors.append(of_pairs.unflatten(0, (len(batch.frames), -1)).mean(1).cpu())
        seen.append(actions.cpu())
    of_clips, first, found = torch.cat(errors), 0, {}
    entries = torch.cat(seen).unflatten(0, (-1, 1)).flatten(1)
    for at, part in enumerate(network.parts):
        own, first = entries[:, first : first + part.size], first + part.size
        found[part.name] = _measured(part, of_clips[:, at], own, seed)
    clips = {"clips": num_clips, "pairs": num_clips * (num_frames - 1)}
    return ({"parts": found} if len(found) > 1 else found[network.parts[0].name]) | clips


def _measured(part: ActionPart, errors: Tensor, entries: Tensor, seed: int) -> dict[str, Any]:
    """Return how well a part is read, of its errors by clip and its true entries."""
    if part.space == "Box":
        return {"error": to_json(bootstrap(errors, seed=seed))}
    counts = [one.long().bincount() for one in entries.unbind(1)]
    most = [(one.max() / one.sum()).item() for one in counts]
    estimate = to_json(bootstrap(1 - errors, seed=seed))
    return {"accuracy": estimate, "most_frequent": sum(most) / len(most)}


def readable(held_out: Mapping[str, Any]) -> str:
    """Say for people how well a model reads, in a line for each part of an action."""
    parts = held_out.get("parts", {"": held_out})
    lines = [_line(name, values) for name, values in parts.items()]
    lines[-1] += f"; {held_out['clips']} clips, {held_out['pairs']} pairs"
    return "\n".join(lines)


def _line(part: str, values: Mapping[str, Any]) -> str:
    name = "accuracy" if "accuracy" in values else "error"
    value, of = values[name], f" of {part}" if part else ""
    line = f"held-out {name}{of} {value['mean']:.3f}"
    line += f" [{value['ci_low']:.3f}, {value['ci_high']:.3f}]"
    if "most_frequent" in values:
        line += f", always the most frequent action: {values['most_frequent']:.3f}"
    return line
