"""What every causal diffuser has: settings that all kinds share, and the interface they answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from scd.data.clip import ConditionSpec
from scd.models.embed import EncoderNoise, FrameShape
from scd.models.kv_cache import CacheConfig
from scd.models.pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class DiffuserConfig:
    """Settings that every causal diffuser has, and what its kind can do."""

    is_separable = False
    """Whether an encoder gives each frame a context, and only a decoder runs at every step."""
    takes_text = False
    """Whether it makes video from a text: trained from published weights, on latent frames that
    stand for several frames of video."""
    has_fast_engine = True
    """Whether `scd.engine` lays its weights out for the machine."""
    keeps_stored_type = False
    """Whether loaded weights stay in the type in which they are stored, not float32."""
    recomputes_streams = False
    """Whether gradient checkpointing reaches into frames made one after another."""
    frames_per_block = 1
    """Latent frames that are denoised together and see each other."""

    shape: FrameShape = field(default_factory=FrameShape)
    """Latent frames and their tokens."""
    conditions: ConditionSpec = field(default_factory=ConditionSpec)
    """What steers the frames."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """How much of the past a stream remembers."""


class CausalDiffuser(nn.Module, Pretrained):
    """The interface that all kinds share.

    Training: `model(clean, noisy, time, conditions)`. Streaming, for each frame: `context` once,
    `velocity` once per step, `observe` with the finished frame.
    """

    config: Any
    encoder: Any
    decoder: Any
    encoder_noise: EncoderNoise = "none"
    """What noise `context` needs."""
    needs_first_frame = False
    """Whether a stream must be given its first frame."""

    @property
    def shape(self) -> FrameShape:
        """Shape of a latent frame."""
        return self.config.shape

    @property
    def parts(self) -> list[Any]:
        """Stacks of blocks, the one that denoises last."""
        return [self.encoder, self.decoder] if self.config.is_separable else [self]

    def transformer_blocks(self) -> list[nn.Module]:
        """Return all blocks."""
        return [block for part in self.parts for block in part.blocks]

    def denoising_blocks(self) -> nn.ModuleList:
        """Return the blocks that run at every denoising step."""
        return self.parts[-1].blocks

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training recomputes each block instead of keeping what is inside it."""
        return all(part.recomputes for part in self.parts)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for part in self.parts:
            part.recomputes = value

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that train at the encoder's learning rate: none without an encoder."""
        return self.encoder.parameters() if self.config.is_separable else iter(())

    def with_noisy_branch(self, context: Any, strength: float, noise: Tensor) -> Any:
        """Return a context of twice the batch: with corrupted context first, then as it was.

        The unconditional branch of guidance by context noise. Source: paper, section 3.

        Raises:
            ValueError: a dense model has no context to corrupt.
        """
        raise ValueError("guidance by context noise needs a separable model")
