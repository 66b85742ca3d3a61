"""Settings of training runs: what every run has, and what a world, an autoencoder and an inverse
dynamics model have besides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from scd.autoencoders.config import (
    FRAMES_PER_LATENT,
    VIDEO_NETWORK,
    AutoencoderConfig,
    NetworkName,
    PixelConfig,
)
from scd.common.config import (
    MAX_SIZE,
    PrecisionChoice,
    Threads,
    added,
    at_least,
    check_threads,
    within,
)
from scd.common.runlog import Tracker
from scd.data.spaces import OnError
from scd.models.config import SamplingConfig, SeparableConfig
from scd.models.kinds import ModelConfig
from scd.objectives.config import (
    DenoiseConfig,
    ObjectiveConfig,
)
from scd.optim.config import OptimConfig

MAX_WORKERS = 1024
"""Largest number of threads that read clips ahead."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has."""

    free_fields: ClassVar[tuple[str, ...]] = (
        "out",
        "validate_every",
        "save_every",
        "log_every",
        "keep_checkpoints",
        "num_validation_clips",
        "num_loader_workers",
        "threads",
        "tracker",
        "time_limit_s",
        "resume",
        "strict",
        "data_on_error",
        "data_changed",
        "from_step",
    )
    """Fields that may change when a run is continued."""

    data: str
    """What to learn from."""
    out: str
    """Run folder. Empty: nothing is kept but the result."""
    batch_size: int
    """Clips per step."""
    num_frames: int
    """Frames of a clip."""
    seed: int = 0
    """Seed of the initial weights, the batches and all noise."""
    precision: PrecisionChoice = "fp32"
    """Arithmetic of the network; its weights are kept in 32 bits either way. auto: bf16 where the
    device has instructions for it, and fp32 else; a continued run keeps what it began with."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    ema_decay: float = 0.9999
    """Weight of the past in the averaged weights, in [0, 1); rises to this from 0.1."""
    validate_every: int = 0
    """Steps between measurements on held-out clips. 0: never."""
    save_every: int = 0
    """Steps between checkpoints; the end of a run is saved anyway. 0: only the end."""
    log_every: int = 10
    """Steps between lines of the log."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    num_validation_clips: int = 16
    """Held-out clips that are measured, at most."""
    tracker: Tracker = "none"
    """Where numbers go besides the run folder's log.jsonl."""
    strict: bool = False
    """Stop at the first episode whose file cannot be opened, instead of leaving it out."""
    data_on_error: Annotated[OnError, tyro.conf.arg(name="data.on-error")] = added("stop")
    """What a clip does to the run that turns out damaged, or gone, when it is read. stop: save a
    checkpoint and stop with the file's name. skip: leave the clip out, say so once of each file,
    and learn from another, which is the same whenever and wherever the run is continued."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run in `out` if it has the same settings. never: refuse to."""
    from_step: Annotated[str, tyro.conf.arg(name="from")] = added("")
    """Checkpoint of the run in `out` to continue from, such as step_001000, where the newest is
    damaged; the steps after it are trained again. Empty: the newest."""
    data_changed: bool = added(False)
    """Continue a run although its data is not what it was trained on, which is refused else:
    episodes that are gone, new or cannot be opened any more, other actions, other videos."""
    time_limit_s: float = 0.0
    """Seconds after which to save and stop; counted once Python has loaded the program. 0: none."""
    num_loader_workers: int = 2
    """Threads that read clips ahead."""
    threads: Threads = added("auto")
    """CPU threads that compute. auto: as many as the first steps are fastest with, measured again
    when steps become slow; at most OMP_NUM_THREADS. A continued run equals the uninterrupted one
    bit for bit at one number of threads, which a number here makes sure of."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How its weights move."""

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, batch_size=self.batch_size, num_frames=self.num_frames)
        within(1, MAX_WORKERS, num_loader_workers=self.num_loader_workers)
        self.check_least(1, "log_every", "keep_checkpoints", "num_validation_clips")
        self.check_least(0, "validate_every", "save_every", "time_limit_s")
        check_threads(self.threads)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")

    def check_least(self, least: int, *names: str) -> None:
        """Refuse fields below a number, or not finite (ValueError)."""
        for name in names:
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """One training run."""

    free_fields = (*RunConfig.free_fields, "max_steps", "sample_every", "shard_weights")

    data: str = "toy:32"
    """What to learn: "toy:32", "toy:64", a folder of episodes or of their latents, a LeRobot
    dataset ("lerobot:PATH?camera=NAME", or lerobot:PATH --camera NAME), HDF5 files (hdf5:PATH
    --frames-key KEY --actions-key KEY), tars of videos ("wds:PATH"), or a published collection
    ("minecraft:PATH", "ucf101:PATH", "dmlab:PATH")."""
    out: str = "runs/train"
    """Run folder: checkpoints, log and sample pictures go there."""
    initial: str = added("")
    """World, run or step folder whose (averaged) weights the run starts from, instead of random
    ones. Its model must have the same settings, but for memory and skipped or diagonal layers."""
    lora: int = added(0)
    """Rank of low-rank additions (LoRA) to the linear maps of a Wan model's blocks, which move in
    the place of its weights. Each checkpoint is a world with the additions in its weights, and has
    them by themselves in lora/, as diffusers reads them. Needs peft. 0: all weights move."""
    max_steps: int = 1000
    """Optimiser steps of the whole run; the learning rate's decay ends there."""
    batch_size: int = 2
    """Clips per process and micro-batch."""
    num_frames: int = 16
    """Frames of a clip."""
    num_accumulation: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    device: Literal["auto", "cpu", "mps"] = "auto"
    """auto: a GPU of NVIDIA's or AMD's where there is one (accelerate chooses which), else the CPU.
    mps: Apple's."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more
    time."""
    shard_weights: bool = added(False)
    """Cut weights, gradients, averages and optimiser states up among the processes (FSDP2), instead
    of a whole copy in each. Also on where accelerate's configuration says fsdp_version 2."""
    validate_every: int = 1000
    """Steps between measurements of the loss on held-out clips. 0: never."""
    sample_every: int = 1000
    """Steps between sample pictures, truth above prediction. 0: never."""
    save_every: int = 1000
    """Steps between checkpoints; the end of a run is saved anyway. 0: only the end."""
    validation_times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels at which it is measured, in (0, 1]."""
    model: ModelConfig = field(default_factory=SeparableConfig)
    """The network."""
    objective: ObjectiveConfig = field(default_factory=DenoiseConfig)
    """What it learns to do."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How frames are denoised in sample pictures, and by whoever loads the result."""
    autoencoder: AutoencoderConfig = field(default_factory=PixelConfig)
    """Between pixels and latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(1, "max_steps")
        within(1, MAX_SIZE, num_accumulation=self.num_accumulation)
        within(0, MAX_SIZE, lora=self.lora)
        if self.lora and (self.shard_weights or not self.model.takes_text):
            raise ValueError("lora is for Wan models, and goes without shard_weights")
        self.check_least(0, "sample_every")
        if not self.validation_times or not all(0 < time <= 1 for time in self.validation_times):
            raise ValueError(f"validation_times must lie in (0, 1], got {self.validation_times}")


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig(RunConfig):
    """One autoencoder. Source of the recipe: FAR."""

    second_part: ClassVar[tuple[str, ...]] = (
        "adversarial_steps",
        "adversarial_weight",
        "edge_weight",
        "border_weight",
        "latent_noise",
    )
    """Fields that say nothing of the first part."""
    free_fields = (*RunConfig.free_fields, *second_part)

    data: str
    """Folder of episodes, "toy:32", "toy:64", or "minecraft:PATH", "ucf101:PATH", "dmlab:PATH"."""
    out: str
    """Folder of the training, which is the autoencoder too; one in it is continued."""
    network: Literal["auto", NetworkName] = "auto"
    """FAR's deep-compression networks with cells of 8, 16 or 32 pixels, or small ones, of 1.2 and
    3.4 million weights, for a CPU; small-wan: of Wan's kind, causal over time, of 2.6 million.
    auto: FAR's for frames of 64, 128 or 256, with 8x8 latents."""
    initial: str = added("", unwritten=True)
    """Autoencoder, or world with one, of the same network, whose weights the training starts from
    instead of random ones."""
    reconstruction_steps: int = 100_000
    """Steps of the first part: absolute and perceptual distance, all weights. 0, with `initial`:
    only the decoder learns on, and the latents stay what they were."""
    adversarial_steps: int = 100_000
    """Steps of the second part: the encoder frozen, a patch discriminator besides. 0: none. What is
    of this part may be set when a training goes on."""
    batch_size: int = 32
    """Clips per step."""
    num_frames: int = 4
    """Frames of a clip, one after another; of small-wan 1 and then 4 at a time: 5, 9, 13, ..."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance; that of the absolute one is 1."""
    adversarial_weight: float = 0.5
    """Pull of the discriminator at the decoder's last layer, over that of the distances. 0: the
    second part has none."""
    edge_weight: float = added(0.0)
    """Weight, in the second part, of the distance of differences between neighbouring pixels, which
    keeps edges."""
    border_weight: float = added(1.0)
    """How many times such a difference counts across a border of the latents' cells, where it would
    be seen as a grid."""
    latent_noise: float = added(0.0)
    """Noise on latents in the second part, over their deviation: the decoder learns what to make of
    latents that are not exact, as a world's are not."""
    alexnet: str = ""
    """File of torchvision's AlexNet: the perceptual distance is LPIPS on it. Empty: a normalised
    Laplacian pyramid, which needs no weights and is no LPIPS."""
    alexnet_sha256: str = ""
    """SHA-256 by which you identify another file for it, or how it begins."""
    lpips_heads: str = ""
    """File of LPIPS's linear heads; empty: that of the package torchmetrics, if it is
    installed."""
    lpips_heads_sha256: str = ""
    """SHA-256 by which you identify another file for it, or how it begins."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(decoder_lr_ratio=1.0, betas=(0.5, 0.9), warmup_steps=0)
    )
    """How the weights move. muon: for the convolutions that mix all channels; the rest, and the
    patch discriminator, have AdamW."""
    validate_every: int = 5000
    """Steps between measurements on held-out clips, with a picture; the end is measured anyway. 0:
    only the end."""
    save_every: int = 5000
    """Steps between checkpoints; the end is saved anyway. 0: only the end."""
    log_every: int = 50
    """Steps between lines of the log."""
    num_validation_clips: int = 64
    """Held-out clips that are measured, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(0 if self.initial else 1, "reconstruction_steps")
        self.check_least(1, "max_steps")
        if self.network == VIDEO_NETWORK and self.num_frames % FRAMES_PER_LATENT != 1:
            raise ValueError(
                f"{VIDEO_NETWORK} takes 1 frame and then {FRAMES_PER_LATENT} at a time: needed "
                f"num_frames 5, 9, 13, ..., got {self.num_frames}"
            )
        self.check_least(0, *self.second_part, "perceptual_weight")
        if self.border_weight != 1 and not self.edge_weight:
            raise ValueError("border_weight has no effect with edge_weight 0")
        if not self.adversarial_steps and (self.edge_weight or self.latent_noise):
            raise ValueError(
                "edge_weight and latent_noise are of the second part and have no effect with "
                "adversarial_steps 0"
            )
        if self.optim.decoder_lr_ratio != 1:
            raise ValueError(
                "an autoencoder is trained at one learning rate: optim.decoder_lr_ratio has no "
                "effect"
            )
        if self.alexnet_sha256 and not self.alexnet:
            raise ValueError("alexnet_sha256 identifies a file that alexnet does not name")
        if (self.lpips_heads or self.lpips_heads_sha256) and not self.alexnet:
            raise ValueError("LPIPS's heads have no effect without alexnet")

    @property
    def is_judged(self) -> bool:
        """Whether the second part has a discriminator."""
        return self.adversarial_steps > 0 and self.adversarial_weight > 0

    @property
    def max_steps(self) -> int:
        """Steps of both parts."""
        return self.reconstruction_steps + self.adversarial_steps


@dataclass(frozen=True, kw_only=True)
class TrainInverseDynamicsConfig:
    """One inverse dynamics model, which reads actions back from frames."""

    data: str
    """"toy:32", "toy:64", or a folder of episodes with actions."""
    out: str
    """Folder of the model; must not be there yet."""
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
    """auto, cpu, cuda, cuda:N or mps."""
    threads: Threads = "auto"
    """CPU threads that compute. auto: as many as the first steps are fastest with; at most
    OMP_NUM_THREADS."""
    strict: bool = False
    """Stop at the first episode whose file cannot be opened, instead of leaving it out."""
    data_on_error: Annotated[OnError, tyro.conf.arg(name="data.on-error")] = "stop"
    """What becomes of a clip that turns out damaged, or gone, when it is read: stop, or skip, which
    learns from another one."""

    def __post_init__(self) -> None:
        check_threads(self.threads)
        at_least(1, steps=self.steps)
        within(1, MAX_SIZE, batch_size=self.batch_size)
        within(2, MAX_SIZE, num_frames=self.num_frames)
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
