"""Settings of `scd encode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from scd.common.config import Precision, Threads, at_least, check_threads, parse_shard
from scd.data.spaces import OnError, Split, Stored


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """One process's share of the encoding of a collection."""

    data: str
    """Folder of episodes, or "lerobot:PATH", "hdf5:PATH", "wds:PATH", "minecraft:PATH",
    "ucf101:PATH", "dmlab:PATH"."""
    autoencoder: str
    """Folder of an autoencoder, or its name on the hub; a world or run, whose autoencoder is taken;
    or "pixels", which are only brought to mean 0 and deviation 1."""
    out: str
    """Folder to write; an encoding by the same autoencoder in it is continued."""
    shard: str = "0/1"
    """i/n: the i-th, from 0, of n processes that share the work and are started one by one. Those
    that torchrun starts share it by themselves."""
    splits: tuple[Split, ...] = ("train", "val", "test")
    """Parts of the collection; those without episodes are passed over."""
    text_encoder: str = ""
    """Folder with text_encoder/ and tokenizer/, its name on the hub, or a world, whose text encoder
    is taken: embeds each episode's prompt, from the manifest or the .txt beside the video. Empty:
    no texts."""
    text_length: int = 512
    """Tokens of an embedded prompt, those that fill it up included."""
    latent_scale: float = 1.0
    """What published latents are multiplied by to be of unit scale: 0.2889 for TECO-Minecraft's.
    Videos have no use for it."""
    statistics: Literal["given", "measured"] = "given"
    """Mean and deviation that bring an autoencoder's latents to unit scale, channel by channel:
    those that come with its weights, or those of this data. Only for autoencoders of pictures."""
    stored: Stored = "fp16"
    """Arithmetic in which latents are kept."""
    episodes_per_file: int = 32
    """Episodes of a file; what an interruption costs at most."""
    batch_size: int = 64
    """Frames that the autoencoder encodes at once; one that looks back in time takes whole
    episodes."""
    precision: Precision = "fp32"
    """Arithmetic of the autoencoder; pixels have none to choose."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: Threads = "auto"
    """CPU threads that compute. auto: as many as the first calls are fastest with, measured again
    when they become slow; at most OMP_NUM_THREADS. Latents differ by rounding only."""
    strict: bool = False
    """Stop at the first episode that cannot be used, instead of leaving it out."""
    data_on_error: Annotated[OnError, tyro.conf.arg(name="data.on-error")] = "stop"
    """What becomes of an episode that turns out damaged, or gone, when it is read. stop: name its
    file; what was written is kept. skip: name it and store it without frames, so that training
    passes it over."""

    def __post_init__(self) -> None:
        at_least(
            1,
            episodes_per_file=self.episodes_per_file,
            batch_size=self.batch_size,
            text_length=self.text_length,
        )
        if not 0 < self.latent_scale < float("inf"):
            raise ValueError(f"latent_scale must be above 0, got {self.latent_scale}")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits must be named once each, got {list(self.splits)}")
        parse_shard(self.shard)
        check_threads(self.threads)
