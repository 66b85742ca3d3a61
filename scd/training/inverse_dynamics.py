"""Training of a judge on recorded clips: `scd train-judge`.

The loop is not the trainer's: it takes a minute or three, is never continued, and needs neither
averaged weights nor several processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from scd.common.config import to_json
from scd.common.provenance import provenance
from scd.common.runtime import choose_device, derive_seed, make_generator
from scd.data.clip import Batch
from scd.data.loader import Loader
from scd.data.source import Source, open_source
from scd.evaluation.image import bootstrap
from scd.evaluation.inverse_dynamics import (
    InverseDynamics,
    InverseDynamicsConfig,
    TrainedInverseDynamics,
    load_inverse_dynamics,
    pairs,
    save_inverse_dynamics,
)
from scd.evaluation.predict import choose_windows, count_windows, read_windows

BLUR, NOISE = 1.0, 0.3
"""The most that a frame is distorted: detail below 4 pixels gone, and noise of this deviation."""

BLUR_CELL = 4
"""Pixels that a blurred frame averages over, each way."""

MAX_HELD_OUT = 512
"""Held-out clips on which a judge is measured at most."""

NUM_STANDARD = 16
"""Batches of real frames by which features are standardised."""


@dataclass(frozen=True, kw_only=True)
class TrainJudgeConfig:
    """One judge."""

    data: str
    """"toy:32", "toy:64", or a folder of episodes with actions."""
    out: str
    """Folder of the judge; must not be there yet."""
    steps: int = 800
    """Optimiser steps."""
    batch_size: int = 32
    """Clips per step. Short clips of many episodes teach faster than long ones of few."""
    num_frames: int = 5
    """Frames of a clip: one pair fewer."""
    lr: float = 2e-3
    """Highest learning rate of AdamW; falls linearly to 0."""
    seed: int = 0
    """Seed of weights, clips and distortions."""
    width: int = 32
    """Channels of the network at full resolution."""
    feature_dim: int = 32
    """Features of a pair of frames."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("num_frames", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


def train_judge(config: TrainJudgeConfig) -> TrainedInverseDynamics:
    """Train a judge, measure it on held-out clips, and write its folder.

    Raises:
        FileExistsError: something is at `out` already.
        ValueError: data without actions, frames below 8 x 8, or episodes that are too short.
        OSError: the data cannot be read or the judge not be written.
    """
    folder = Path(config.out)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: a judge is trained once, into a new one")
    device = choose_device(config.device)
    source = open_source(config.data, "train", config.strict)
    held_out = open_source(config.data, "val", config.strict)
    if not count_windows(held_out, config.num_frames):
        longest = max(held_out.num_frames(episode) for episode in range(held_out.num_episodes))
        raise ValueError(
            f"a judge is measured on held-out clips of {config.num_frames} frames, but the longest "
            f"val episode of {config.data} has {longest}: lower --num-frames or record longer ones"
        )
    card = source.card
    shape = InverseDynamicsConfig(
        conditions=card.conditions, width=config.width, feature_dim=config.feature_dim
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "judge weights"))
        judge = InverseDynamics(shape, card.height, card.width).to(device)
    loader = Loader(source, config.batch_size, config.num_frames, config.seed, workers=1)
    _standardise_actions(judge, loader)
    _learn(judge, loader, config)
    judge.eval().requires_grad_(False)
    _standardise_features(judge, loader, config.steps)
    measured = measure_judge(judge, held_out, config.num_frames, config.seed)
    trained = TrainedInverseDynamics(network=judge, card=card, held_out=measured)
    save_inverse_dynamics(trained, folder, {"settings": to_json(config)} | provenance(device))
    return load_inverse_dynamics(folder, device)


def _learn(judge: InverseDynamics, loader: Loader, config: TrainJudgeConfig) -> None:
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.lr, weight_decay=0.01)
    device, console = judge.feature_mean.device, Console(stderr=True, highlight=False)
    stream = loader.stream()
    try:
        for step in range(config.steps):
            batch = next(stream).to(device)
            generator = make_generator(config.seed, "judge", step, device=device)
            loss, logs = judge_loss(judge, batch, generator)
            if not torch.isfinite(loss):
                raise ValueError(f"step {step}: the judge's loss is {loss.item()}; lower lr")
            for group in optimizer.param_groups:
                group["lr"] = config.lr * (1 - step / config.steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (step + 1) % 100 == 0 or step + 1 == config.steps:
                words = "  ".join(f"{name} {value:.3f}" for name, value in logs.items())
                console.print(f"step {step + 1} of {config.steps}  {words}")
    finally:
        stream.close()


def judge_loss(
    judge: InverseDynamics, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of reading actions and distortions of all pairs of a batch, and logs.

    Half of the clips are distorted, each frame by another amount: generated frames are never as
    clean as recorded ones, and a judge that fails on them would call a blurred turn no turn.
    """
    frames, levels = distort(batch.frames, generator)
    features = judge.raw_features(*pairs(frames))
    read, distortion = judge.readings(features)
    actions = pair_actions(batch)
    if judge.config.conditions.num_actions:
        of_actions = F.cross_entropy(read, actions)
        right = (read.argmax(-1) == actions).float().mean().item()
    else:
        of_actions = F.mse_loss(read, judge.standard_actions(actions))
        right = 1 - of_actions.item()
    of_distortions = F.mse_loss(distortion, rearrange(levels[:, 1:], "b t two -> (b t) two"))
    logs = {"right": right, "actions": of_actions.item(), "distortions": of_distortions.item()}
    return of_actions + of_distortions, logs


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


def _standardise_actions(judge: InverseDynamics, loader: Loader) -> None:
    if judge.config.conditions.action_dim:
        batches = [loader.batch(index) for index in range(NUM_STANDARD)]
        actions = torch.cat([pair_actions(batch) for batch in batches])
        judge.standardise(None, actions)


def _standardise_features(judge: InverseDynamics, loader: Loader, first: int) -> None:
    features = []
    for index in range(first, first + NUM_STANDARD):
        batch = loader.batch(index).to(judge.feature_mean.device)
        features.append(judge.raw_features(*pairs(batch.frames)))
    judge.standardise(torch.cat(features), None)


@torch.no_grad()
def measure_judge(
    judge: InverseDynamics, source: Source, num_frames: int, seed: int
) -> dict[str, Any]:
    """Measure how well a judge reads the actions of real clips that it has not seen.

    Returns:
        Discrete actions: accuracy with its interval over clips, and the share of the most frequent
        action, which is what guessing gives. Continuous ones: error, as `InverseDynamics.errors`.
    """
    num_clips = min(MAX_HELD_OUT, count_windows(source, num_frames))
    windows = choose_windows(source, num_clips, num_frames, seed)
    errors, seen = [], []
    for first in range(0, num_clips, 16):
        batch = read_windows(source, windows[first : first + 16], num_frames)
        batch = batch.to(judge.feature_mean.device)
        features, actions = judge.features(*pairs(batch.frames)), pair_actions(batch)
        of_pairs = judge.errors(features, actions)
        errors.append(of_pairs.unflatten(0, (len(batch.frames), -1)).mean(1).cpu())
        seen.append(actions.cpu())
    of_clips, clips = torch.cat(errors), {"clips": num_clips, "pairs": num_clips * (num_frames - 1)}
    if judge.config.conditions.num_actions:
        estimate = bootstrap(1 - of_clips, seed=seed)
        counts = torch.cat(seen).bincount(minlength=judge.config.conditions.num_actions)
        most = (counts.max() / counts.sum()).item()
        return {"accuracy": to_json(estimate), "most_frequent": most} | clips
    return {"error": to_json(bootstrap(of_clips, seed=seed))} | clips


def readable(held_out: Mapping[str, Any]) -> str:
    """Say in one line for people how well a judge reads."""
    name = "accuracy" if "accuracy" in held_out else "error"
    value = held_out[name]
    line = f"held-out {name} {value['mean']:.3f} [{value['ci_low']:.3f}, {value['ci_high']:.3f}]"
    if "most_frequent" in held_out:
        line += f", always the most frequent action: {held_out['most_frequent']:.3f}"
    return f"{line}; {held_out['clips']} clips, {held_out['pairs']} pairs"
