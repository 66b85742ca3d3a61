"""Settings of the training of an autoencoder. Source of the recipe: paper, section 8."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from scd.autoencoders.deep_compression import DeepName
from scd.common.runlog import Tracker
from scd.common.runtime import Precision
from scd.optim.optim import OptimConfig

FREE_FIELDS = (
    "out",
    "adversarial_steps",
    "validate_every",
    "save_every",
    "log_every",
    "keep_checkpoints",
    "num_validation_clips",
    "num_loader_workers",
    "tracker",
    "time_limit_s",
    "resume",
    "strict",
)
"""Fields that may change when a training is continued."""


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig:
    """One autoencoder."""

    data: str
    """Folder of episodes, "toy:32", "toy:64", or "minecraft:PATH", "ucf101:PATH", "dmlab:PATH"."""
    out: str
    """Folder of the training, which is the autoencoder too; one in it is continued."""
    network: Literal["auto", DeepName] = "auto"
    """FAR's deep-compression networks with cells of 8, 16 or 32 pixels, or small ones, of 1.2 and
    3.4 million weights, for a CPU. auto: FAR's for frames of 64, 128 or 256, with 8x8 latents."""
    reconstruction_steps: int = 100_000
    """Steps of the first part: absolute and perceptual distance, all weights."""
    adversarial_steps: int = 100_000
    """Steps of the second part: a judge of patches besides, and the encoder frozen. 0: none."""
    batch_size: int = 32
    """Clips per step."""
    num_frames: int = 4
    """Frames of a clip, one after another."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance; that of the absolute one is 1."""
    adversarial_weight: float = 0.5
    """Pull of the judge at the decoder's last layer, over that of the distances."""
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
    judge of patches, have AdamW."""
    ema_decay: float = 0.9999
    """Weight of the past in the averaged weights, in [0, 1); rises to this from 0.1."""
    seed: int = 0
    """Seed of weights and clips."""
    precision: Precision = "fp32"
    """Arithmetic of the network; its weights are kept in 32 bits either way."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    validate_every: int = 5000
    """Steps between measurements on held-out clips, with a picture; the end is measured anyway. 0:
    only the end."""
    save_every: int = 5000
    """Steps between checkpoints; the end is saved anyway. 0: only the end."""
    log_every: int = 50
    """Steps between lines of the log."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    num_validation_clips: int = 64
    """Held-out clips that are measured, at most."""
    num_loader_workers: int = 2
    """Threads that read clips ahead."""
    tracker: Tracker = "none"
    """Where numbers go besides log.jsonl."""
    time_limit_s: float = 0.0
    """Seconds after which to save and stop; counted once Python has loaded the program. 0: none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the training in `out` if it has the same settings. never: refuse to."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""

    def __post_init__(self) -> None:
        for name in (
            "reconstruction_steps",
            "batch_size",
            "num_frames",
            "log_every",
            "keep_checkpoints",
            "num_validation_clips",
            "num_loader_workers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in (
            "adversarial_steps",
            "perceptual_weight",
            "adversarial_weight",
            "validate_every",
            "save_every",
            "time_limit_s",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
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
    def max_steps(self) -> int:
        """Steps of both parts."""
        return self.reconstruction_steps + self.adversarial_steps
