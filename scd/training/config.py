"""A training run: its settings, its parts, and its folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scd.autoencoders.base import PixelConfig
from scd.autoencoders.build import AutoencoderConfig, build_autoencoder, fingerprint
from scd.autoencoders.text_encoder import text_fingerprint
from scd.common.config import added, differences, to_json
from scd.common.runlog import Tracker
from scd.common.runtime import Precision, derive_seed
from scd.data.clip import Batch
from scd.data.latents import PLACE, LatentSource
from scd.data.loader import Loader
from scd.data.prompts import PromptSource, is_prompts
from scd.data.source import DataCard, Source, Split, open_source
from scd.models.build import Diffuser, ModelConfig, SeparableConfig, build
from scd.models.checkpoint import read_world_parts, resolve
from scd.models.flow import SamplingConfig
from scd.objectives.denoise import DenoiseConfig
from scd.objectives.distill import ConsistencyConfig, RegressionConfig
from scd.objectives.distribution_matching import MatchConfig
from scd.objectives.teacher_forcing import TeacherForcingConfig
from scd.optim.optim import OptimConfig

Objective = Callable[
    [nn.Module, Batch, torch.Generator], tuple[Tensor, Mapping[str, Tensor | float]]
]
"""From the model, a batch of pixels and a generator of all draws to a loss and numbers to log."""

ObjectiveConfig = (
    DenoiseConfig | TeacherForcingConfig | ConsistencyConfig | RegressionConfig | MatchConfig
)
"""What a model can learn to do."""

logger = logging.getLogger(__name__)

FREE_FIELDS = (
    "out",
    "max_steps",
    "validate_every",
    "sample_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "num_validation_clips",
    "tracker",
    "time_limit_s",
    "shard_weights",
    "resume",
    "strict",
)
"""Fields of TrainConfig that may change when a run is continued."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: str = "toy:32"
    """What to learn: "toy:32", "toy:64", a folder of episodes or of their latents, or a published
    collection ("minecraft:PATH", "ucf101:PATH", "dmlab:PATH")."""
    out: str = "runs/train"
    """Run folder: checkpoints, log and sample pictures go there."""
    initial: str = added("")
    """World, run or step folder whose (averaged) weights the run starts from, instead of random
    ones. Its model must have the same settings, but for memory and skipped or diagonal layers."""
    max_steps: int = 1000
    """Optimiser steps of the whole run; the learning rate's decay ends there."""
    batch_size: int = 2
    """Clips per process and micro-batch."""
    num_frames: int = 16
    """Frames of a clip."""
    num_accumulation: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    seed: int = 0
    """Seed of the initial weights, the batches and all noise."""
    precision: Precision = "fp32"
    """Arithmetic of the network; its weights are kept in 32 bits either way."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one (accelerate chooses which)."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more
    time."""
    shard_weights: bool = added(False)
    """Cut weights, gradients, averages and optimiser states up among the processes (FSDP2), instead
    of a whole copy in each. Also on where accelerate's configuration says fsdp_version 2."""
    ema_decay: float = 0.9999
    """Weight of the past in the averaged weights, in [0, 1); rises to this from 0.1."""
    validate_every: int = 1000
    """Steps between measurements of the loss on held-out clips. 0: never."""
    sample_every: int = 1000
    """Steps between sample pictures, truth above prediction. 0: never."""
    save_every: int = 1000
    """Steps between checkpoints; the end of a run is saved anyway. 0: only the end."""
    log_every: int = 10
    """Steps between lines of the log."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    num_validation_clips: int = 16
    """Held-out clips on which the loss is measured."""
    validation_times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels at which it is measured, in (0, 1]."""
    tracker: Tracker = "none"
    """Where numbers go besides the run folder's log.jsonl."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run in `out` if it has the same settings. never: refuse to."""
    time_limit_s: float = 0.0
    """Seconds after which to save and stop; counted once Python has loaded the program. 0: none."""
    num_loader_workers: int = 2
    """Threads that read clips ahead."""
    model: ModelConfig = field(default_factory=SeparableConfig)
    """The network."""
    objective: ObjectiveConfig = field(default_factory=DenoiseConfig)
    """What it learns to do."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How its weights move."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How frames are denoised in sample pictures, and by whoever loads the result."""
    autoencoder: AutoencoderConfig = field(default_factory=PixelConfig)
    """Between pixels and latents."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "num_frames",
            "num_accumulation",
            "log_every",
            "keep_checkpoints",
            "num_validation_clips",
            "num_loader_workers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("validate_every", "sample_every", "save_every", "time_limit_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not self.validation_times or not all(0 < time <= 1 for time in self.validation_times):
            raise ValueError(f"validation_times must lie in (0, 1], got {self.validation_times}")


def build_model(config: TrainConfig, card: DataCard) -> Diffuser:
    """Build the run's model with its first weights, which depend on the seed alone.

    Raises:
        ValueError: the model does not fit the data.
    """
    check_fit(config, card)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        return build(config.model)


def check_window(config: TrainConfig) -> None:
    """Refuse a memory that is longer than the clips of the training (ValueError).

    A model that was trained before, and is only distilled, keeps the memory that it has.
    """
    window = config.model.cache.window
    from_data = isinstance(config.objective, DenoiseConfig | TeacherForcingConfig)
    if window > config.num_frames and from_data:
        raise ValueError(
            f"model.cache.window is {window}, but num_frames is {config.num_frames}: "
            "attention beyond num_frames is untrained"
        )


def check_fit(config: TrainConfig, card: DataCard) -> None:
    """Refuse a model for other frames, conditions or lengths than the data's (ValueError)."""
    check_window(config)
    shape = build_autoencoder(config.autoencoder).latent_shape(card.height, card.width)
    if config.model.shape.shape != shape:
        raise ValueError(
            f"{config.data} gives latent frames of {shape} (channels, rows, columns), "
            f"but model.shape is {config.model.shape.shape}"
        )
    if config.model.conditions != card.conditions:
        raise ValueError(
            f"{config.data} is steered by {card.conditions}, "
            f"but model.conditions is {config.model.conditions}"
        )


def open_training(config: TrainConfig, split: Split) -> Source:
    """Open a split as training sees it: stored latents where the data holds such, else videos.

    Raises:
        ValueError, OSError: the data cannot be read, or its latents are of another autoencoder.
    """
    if is_prompts(config.data):
        return open_prompts(config)
    source = open_source(config.data, split, config.strict, latents=True)
    if isinstance(source, LatentSource):
        _check_autoencoder(config, source)
        _check_text_encoder(config, source)
    elif isinstance(config.objective, TeacherForcingConfig):
        raise ValueError(
            f"{config.data} holds no latents: write them first (scd encode {config.data} "
            "--autoencoder RUN --text-encoder RUN --out LATENTS), and name those"
        )
    return source


def open_prompts(config: TrainConfig) -> PromptSource:
    """Open a folder of embedded prompts, which train and hold out the same ones.

    Raises:
        ValueError, OSError: it cannot be read, another text encoder embedded them, or the run needs
            recorded clips.
    """
    objective = config.objective
    if not isinstance(objective, MatchConfig) or objective.needs_clips or config.validate_every:
        raise ValueError(
            f"{config.data} holds prompts without frames: only rollouts from nothing learn from "
            "them (num_given_frames=0, method 'dmd' or 'sid'), and validate_every must be 0"
        )
    if not config.initial:
        raise ValueError("a run on prompts starts from a world: initial must name it")
    card = read_world_parts(resolve(config.initial))["card"]
    source = PromptSource(config.data, card, config.model.shape.shape, config.num_frames)
    _check_text_encoder(config, source)
    return source


def _check_autoencoder(config: TrainConfig, source: LatentSource) -> None:
    """Refuse latents of another autoencoder than the run's (ValueError)."""
    theirs, ours = (
        {name: value for name, value in settings.items() if name != PLACE}
        for settings in (source.info.autoencoder, to_json(config.autoencoder))
    )
    different = differences(theirs, ours)
    if different:
        raise ValueError(
            f"{config.data} holds latents of another autoencoder than the run's (its setting, then "
            f"the run's): {'; '.join(different)}"
        )
    try:
        found = fingerprint(build_autoencoder(config.autoencoder))
    except FileNotFoundError as error:
        # Latents need no autoencoder to be trained on: only the comparison does.
        logger.warning("whether the run's autoencoder made %s was not seen: %s", source.path, error)
        return
    if found != source.info.fingerprint:
        raise ValueError(
            f"{config.data} holds latents of an autoencoder with other weights: it was encoded by "
            f"{source.info.fingerprint}, the one that the settings name is now {found}"
        )


def _check_text_encoder(config: TrainConfig, source: LatentSource | PromptSource) -> None:
    """Refuse prompts that another text encoder embedded than the one beside the run's autoencoder
    (ValueError), which is what the result will be steered by."""
    autoencoder: Any = config.autoencoder
    if not source.info.text or not autoencoder.has_text_encoder:
        return
    try:
        found = text_fingerprint(autoencoder.source)
    except FileNotFoundError as error:
        logger.warning("whether its text encoder made %s was not seen: %s", source.path, error)
        return
    # The arithmetic of the text encoder stands behind its name, and may be another.
    if found != source.info.text.rpartition("-")[0]:
        raise ValueError(
            f"{config.data} holds prompts that another text encoder embedded: {source.info.text}, "
            f"the one at {autoencoder.source} is {found}"
        )


def open_loader(config: TrainConfig, rank: int, num_processes: int) -> Loader:
    """Open the training split as a stream of this process's batches.

    Raises:
        ValueError, OSError: no episode is long enough, fewer episodes than processes, or the data
            cannot be read.
    """
    source = open_training(config, "train")
    return Loader(
        source,
        config.batch_size,
        config.num_frames,
        config.seed,
        rank=rank,
        num_ranks=num_processes,
        workers=config.num_loader_workers,
    )
