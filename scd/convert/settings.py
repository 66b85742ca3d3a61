"""Settings of `scd convert` and `scd export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scd.autoencoders.config import FAR_SCALE
from scd.models.config import CacheConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Settings that cannot be inferred from a state dict of the release or of FAR."""

    channels: int = 32
    """Channels of a latent frame."""
    height: int = 8
    """Rows of a latent frame."""
    width: int = 8
    """Columns of a latent frame."""
    join: Literal["token_concat", "add"] = "token_concat"
    """How the decoder is given the context, if no weight tells; the other joins are recognised."""
    rotary_axes: tuple[int, int, int] | None = None
    """Entries of a head for frame, row and column. None: a quarter and twice three eighths."""
    distance_bias: float = 0.0
    """Slope of the attention bias over frame distance."""
    key: str = ""
    """Name of the state dict inside the file, where it holds several. Empty: the averaged one."""
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(window=300, num_sinks=0))
    """KV cache of a stream; the release keeps all frames."""


@dataclass(frozen=True, kw_only=True)
class ConvertAutoencoderConfig:
    """One state dict of an autoencoder."""

    file: str = ""
    """State dict of FAR's deep-compression autoencoder: .safetensors, what torch.save wrote, the
    index of several files, or a folder with one of these."""
    out: str = ""
    """Folder to write, as diffusers and `scd encode` read it; it must not exist, or be empty."""
    scale: float = FAR_SCALE
    """Factor that brings its latents to unit scale; FAR uses the same for every collection."""
    key: str = ""
    """Name of the state dict inside the file, where it holds several. Empty: the averaged one."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be above 0, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class ConvertWanConfig:
    """Which weights become which world."""

    model: str = ""
    """Folder of diffusers, or its name on the hub; or a file with a state dict of a causal model,
    as of CausVid and Self-Forcing."""
    out: str = ""
    """Folder of the world; it must not exist, or be empty."""
    split: str = "25,5+5"
    """First layers that become the encoder, then how many first and last ones become the decoder;
    or a probe.json with a proposed split; or "dense": all layers, at every step."""
    unrecommended: bool = False
    """Take the split of a probe that recommends none, because its model predicts too little."""
    height: int = 480
    """Rows of a frame, in pixels."""
    width: int = 832
    """Columns of a frame, in pixels."""
    text_length: int = 512
    """Tokens of an embedded text, those that fill it up included."""
    dtype: Literal["source", "fp32", "bf16"] = "source"
    """Type of the stored weights; source: as in the source."""
    window: int = 21
    """Latent frames in the KV cache."""
    num_sinks: int = 0
    """First latent frames that always stay in the KV cache; part of the window."""
    frames_per_block: int = 1
    """Latent frames that a dense model denoises together; 3 in chunk-wise causal checkpoints."""
    num_steps: int = 50
    """Denoising steps per frame of a source that was not distilled."""
    encoder_noise: Literal["fresh", "same"] = "fresh"
    """What the encoder reads for the frame to come: noise of its own, or the decoder's."""
    lowest_time: float = 0.8
    """Lowest time, before the shift, of the noisy frame that the encoder reads in training."""
    encoder_shift: float = 5.0
    """Timestep shift of these times towards noise; 1: none."""
    join: Literal["input", "middle"] = "input"
    """Where the decoder's context joins the noisy frame: before the first layer, or between the
    first and the last ones."""
    context_time: Literal["same", "clean"] = "same"
    """Time by which the context is modulated: that of the noisy frame, or 0."""
    copy_parts: bool = False
    """Copy autoencoder, text encoder and tokenizer into the world; else store their path."""
    actions: str = ""
    """Actions that steer the world besides its text: clips or their latents, or a world, as whose
    they are; or how many there are to choose from. Empty: none."""
    dry_run: bool = False
    """Print size, memory and operations of the world as JSON, and write nothing. Of a folder of
    diffusers only its config.json are needed, of a name on the hub only those are downloaded."""
    lora: str = ""
    """File of LoRA that is merged into the weights, or a folder that has one, as diffusers writes
    it. Empty: none."""
    key: str = ""
    """Name of the state dict in a file; empty: the averaged weights if there are any."""
    head_dim: int = 128
    """Width of an attention head, which a state dict does not tell."""

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.text_length, self.num_steps, self.head_dim) < 1:
            raise ValueError("sizes, lengths and num_steps must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which world is written where."""

    run: str = ""
    """World or run folder."""
    out: str = ""
    """Folder to write; it must not exist, or be empty."""

    def __post_init__(self) -> None:
        if not self.run or not self.out:
            raise ValueError("scd export diffusers needs a run and --out")
