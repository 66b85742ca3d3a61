"""Settings of Wan2.1's transformer as a causal diffuser: dense, and cut into encoder and decoder.

Source: paper (Wan2.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scd.common.config import MAX_LAYERS, MAX_SIZE, within
from scd.data.spaces import ConditionSpec
from scd.models.config import CacheConfig, DiffuserConfig, EncoderNoise, FrameShape

NUM_TIMES = 1000
"""Entries of Wan's table of times."""
FEW_STEPS = (1000, 750, 500, 250)
"""Steps of a distilled model, counted on an unbent scale. Source: paper (distillation)."""


@dataclass(frozen=True, kw_only=True)
class WanBlockConfig:
    """Settings that all blocks of a Wan model share; the values of Wan2.1 1.3B."""

    distance_bias = 0.0
    """There is no attention bias over frame distance."""

    num_heads: int = 12
    """Attention heads."""
    head_dim: int = 128
    """Width of one attention head."""
    ffn_dim: int = 8960
    """Width inside the MLP."""
    freq_dim: int = 256
    """Sinusoids of a time, cosines and sines together."""
    norm_before_text: bool = True
    """Normalise tokens, with learned scale and shift, before they look at the text."""
    eps: float = 1e-6
    """Added to the variance in all norms."""

    def __post_init__(self) -> None:
        within(
            1,
            MAX_SIZE,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            ffn_dim=self.ffn_dim,
            freq_dim=self.freq_dim,
        )
        if self.head_dim % 2 or self.head_dim < 6 or self.freq_dim % 2:
            raise ValueError(
                "head_dim must be even and 6 or more and freq_dim even, got "
                f"{self.head_dim} and {self.freq_dim}"
            )
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must lie between 0 and 1, got {self.eps}")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def rotary_axes(self) -> tuple[int, int, int]:
        """Entries of a head that carry the frame, row and column position."""
        space = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * space, space, space

    @property
    def rotary_theta(self) -> float:
        """Longest wavelength of a position over 2 pi."""
        return 1e4


def _wan_shape() -> FrameShape:
    return FrameShape(channels=16, height=60, width=104, patch_size=2)


def _wan_conditions() -> ConditionSpec:
    return ConditionSpec(text_length=512, text_dim=4096)


def _wan_cache() -> CacheConfig:
    return CacheConfig(window=21, num_sinks=0, rebase_sinks=False)


@dataclass(frozen=True, kw_only=True)
class _VideoConfig(DiffuserConfig):
    """What both kinds of Wan models share, with the sizes of Wan2.1 1.3B."""

    takes_text = keeps_stored_type = recomputes_streams = True

    shape: FrameShape = field(default_factory=_wan_shape)
    """Latent frames and their tokens; 60x104 latent cells are 480x832 pixels."""
    block: WanBlockConfig = field(default_factory=WanBlockConfig)
    """Transformer blocks."""
    conditions: ConditionSpec = field(default_factory=_wan_conditions)
    """The embedded text that steers a clip, and actions of its latent frames, if there are any."""
    cache: CacheConfig = field(default_factory=_wan_cache)
    """KV cache of a stream: how much of the past it keeps; 21 latent frames are 81 of video."""

    def __post_init__(self) -> None:
        conditions = self.conditions
        if not conditions.has_text or conditions.num_labels:
            raise ValueError(
                "a Wan model is steered by an embedded text, and by actions if it has any, got "
                f"{conditions}"
            )


@dataclass(frozen=True, kw_only=True)
class WanConfig(_VideoConfig):
    """Settings of a dense causal Wan model: all layers at every denoising step."""

    num_layers: int = 30
    """Transformer blocks."""
    frames_per_block: int = 1
    """Latent frames that are denoised together and see each other. 1: frame by frame."""
    num_local_frames: int = 0
    """Newest frames, its own included, that a frame sees in training on noisy history. 0: all. With
    clean history it sees all, whatever this says, as in Self-Forcing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, MAX_LAYERS, num_layers=self.num_layers)
        within(1, MAX_SIZE, frames_per_block=self.frames_per_block)
        within(0, MAX_SIZE, num_local_frames=self.num_local_frames)
        size, cache = self.frames_per_block, self.cache
        if cache.window % size or cache.num_sinks % size or (size > 1 and cache.rebase_sinks):
            raise ValueError(
                f"blocks of {size} frames need a window and sinks of whole blocks, and sinks that "
                f"stay at their positions (rebase_sinks off), got {cache}"
            )


@dataclass(frozen=True, kw_only=True)
class WanEncoderConfig:
    """Settings of the causal encoder: the first layers of the source."""

    num_layers: int = 25
    """Transformer blocks, the first ones of the source."""
    noise: EncoderNoise = "fresh"
    """What the encoder reads of the frame to come: noise of its own, or the very noise from which
    the decoder starts ("same"). The paper does not say. Beware of "same" in training with velocity
    targets: context that tells the noise turns every noisy frame x below time 1 into its target,
    (noise - x) / (1 - time), and nothing is learnt there but to subtract."""
    lowest_time: float = 0.8
    """Lowest time, before the shift, of the noisy frame that the encoder reads in training: the
    upper fifth of noise levels. Without training draws, and in streaming, it is 1: pure noise."""
    shift: float = 5.0
    """Bend of these times towards noise: 5 as in Wan's schedule, so 0.95 to 1; 1: none."""

    def __post_init__(self) -> None:
        within(1, MAX_LAYERS, num_layers=self.num_layers)
        if self.noise == "none":
            raise ValueError("the encoder reads noise: it is 'fresh' or the 'same'")
        if not 0 <= self.lowest_time <= 1 or not 0 < self.shift < 1e3:
            raise ValueError(
                "lowest_time must lie in [0, 1] and shift from 0 to 1000, got "
                f"{self.lowest_time} and {self.shift}"
            )


@dataclass(frozen=True, kw_only=True)
class WanDecoderConfig:
    """Settings of the frame decoder: the first and the last layers of the source."""

    num_first: int = 5
    """First layers of the source; only their initial values are the encoder's."""
    num_last: int = 5
    """Last layers of the source."""
    join: Literal["input", "middle"] = "input"
    """Where the context's tokens join those of the noisy frame: before the first layer, or between
    the first and the last ones of the source. The paper does not say."""
    context_time: Literal["same", "clean"] = "same"
    """Time by which the context's tokens are modulated: that of the noisy frame, or 0."""

    def __post_init__(self) -> None:
        if min(self.num_first, self.num_last) < 0 or self.num_layers < 1:
            raise ValueError(
                f"a decoder needs 1 layer or more, got {self.num_first} first and "
                f"{self.num_last} last ones"
            )
        within(1, MAX_LAYERS, num_layers=self.num_layers)
        if self.join == "middle" and self.num_last < 1:
            raise ValueError("join 'middle' needs last layers in which context and noise meet")

    @property
    def num_layers(self) -> int:
        return self.num_first + self.num_last


@dataclass(frozen=True, kw_only=True)
class WanSeparableConfig(_VideoConfig):
    """Settings of a separable Wan model: encoder once per frame, decoder at every step."""

    is_separable = True

    encoder: WanEncoderConfig = field(default_factory=WanEncoderConfig)
    """The causal encoder, run once per frame, and once more on the finished frame."""
    decoder: WanDecoderConfig = field(default_factory=WanDecoderConfig)
    """The frame decoder, run at every step."""


SHIFT = 5.0
"""Bend of the table towards noise, in the released configurations of Self-Forcing."""
