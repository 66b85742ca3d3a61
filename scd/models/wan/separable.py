"""Separable Wan model: the first layers as causal encoder, the first and the last as decoder.

The encoder reads the frame to come as noise, beside the clean frames in its memory; so each frame
takes it two passes, one that gives the context and one that remembers the finished frame. Source:
paper, sections 6.1 to 6.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.models.augment import Augmentation
from scd.models.base import CausalDiffuser
from scd.models.cost import FrameCost, Load
from scd.models.embed import EncoderNoise, Field
from scd.models.flow import interpolate
from scd.models.kv_cache import KVCache
from scd.models.wan.block import TextKeysValues
from scd.models.wan.config import WanSeparableConfig
from scd.models.wan.cost import wan_separable_cost
from scd.models.wan.decoder import WanFrameDecoder
from scd.models.wan.text import TextMemory, remember_text, text_of
from scd.models.wan.transformer import WanTransformer


@dataclass(kw_only=True)
class WanSeparableState:
    """A batch of streams: the clean frames so far, and the text that holds now."""

    cache: KVCache
    """Keys and values of all clean frames in the encoder's layers, at their absolute positions."""
    next_frame: int
    """Position of the frame that comes next."""
    encoder_text: TextMemory | None = None
    """The encoder's keys and values of the text; None: no frame has asked for it."""
    decoder_text: TextMemory | None = None
    """The decoder's."""

    def fork(self) -> WanSeparableState:
        """Return an independent copy."""
        return replace(self, cache=self.cache.fork())


@dataclass(frozen=True, kw_only=True)
class WanFrameContext:
    """All that the decoder needs about one frame of each stream."""

    tokens: Float[Tensor, "b n d"]
    """What the encoder knows of the frame."""
    text: list[TextKeysValues]
    """The decoder's keys and values of the text in each layer."""


class WanSeparableDiffuser(CausalDiffuser):
    """Encoder and decoder behind the interface that all models share.

    Streaming, for each frame: `context` once, with noise, `velocity` once per step, `observe`.
    """

    config_class = WanSeparableConfig

    def __init__(self, config: WanSeparableConfig) -> None:
        super().__init__()
        self.config = config
        parts = (config.shape, config.block, config.conditions)
        self.encoder = WanTransformer(*parts, config.encoder.num_layers, has_head=False)
        self.decoder = WanFrameDecoder(config.decoder, *parts)

    @property
    def encoder_noise(self) -> EncoderNoise:
        """What noise `context` needs: see `WanEncoderConfig.noise`."""
        return self.config.encoder.noise

    def frame_cost(self, load: Load) -> FrameCost:
        """Count one frame; `wan_separable_cost` states the formula."""
        return wan_separable_cost(self.config, load)

    def forward(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        noisy: Float[Tensor, "b r m c h w"],
        time: Float[Tensor, "b r m"],
        conditions: Conditions,
        augment: Augmentation | None = None,
        noise: Float[Tensor, "b r2 m c h w"] | None = None,
        clean_time: Float[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b r m c h w"]:
        """Return the velocity of noisy frames, all at once.

        Args:
            clean: frames of the clip, the history of the encoder's layers.
            noisy: r draws of the last m frames of the clip.
            time: of each noisy frame, 0 clean to 1 noise.
            conditions: text of the clip.
            augment: random changes for training, among them how noisy the frame is that the
                encoder reads; None: pure noise, and a function of the input alone.
            noise: what the encoder reads, for one draw or for all r. None: as the settings say,
                drawn (without `augment` always the same), or that within `noisy`.
            clean_time: of the history, where noise was added to it; None: 0.

        Raises:
            ValueError: no clean history.
        """
        if clean is None:
            raise ValueError("a separable Wan model needs clean frames as history")
        if augment is not None:
            conditions = augment.drop(conditions)
        if noise is None:
            noise = self._noise(clean, noisy, time, augment)
        context = self._contexts(clean, noise, conditions, augment, clean_time)
        return self._denoised(context, conditions, noisy, time)

    def field(
        self,
        clean: Float[Tensor, "b t c h w"],
        conditions: Conditions,
        num_noisy: int,
        num_draws: int = 1,
    ) -> Field:
        """Return `forward` as a function of noisy frames and times, for many steps on one history.

        The encoder runs once, here, unless it is to read the noise within those frames.
        """
        context = None
        if self.encoder_noise == "fresh":
            frames = clean[:, None, -num_noisy:]
            context = self._contexts(clean, _drawn(frames, None), conditions, None, None)

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            assert noisy.shape[1:3] == (num_draws, num_noisy)
            if context is None:
                return self(clean, noisy, time, conditions)
            return self._denoised(context, conditions, noisy, time)

        return velocity

    def _noise(
        self, clean: Tensor, noisy: Tensor, time: Tensor, augment: Augmentation | None
    ) -> Float[Tensor, "b r2 m c h w"]:
        if self.encoder_noise == "fresh":
            # One pass of the encoder serves all draws.
            return _drawn(noisy[:, :1], augment)
        weight = time[..., None, None, None].to(noisy.dtype)
        frames = clean[:, None, -noisy.shape[2] :]
        return (noisy - (1 - weight) * frames) / weight.clamp(min=1e-4)

    def _contexts(
        self,
        clean: Tensor,
        noise: Tensor,
        conditions: Conditions,
        augment: Augmentation | None,
        clean_time: Tensor | None,
    ) -> Float[Tensor, "b r2 m n d"]:
        """Run the encoder over clean frames and, beside them, those to be denoised as noise."""
        batch, num_draws, num_noisy = noise.shape[:3]
        time = self._encoder_times(noise, augment)
        frames = interpolate(clean[:, None, -num_noisy:].expand_as(noise), noise, time)
        if clean_time is None:
            clean_time = torch.zeros(clean.shape[:2], device=clean.device)
        times = self.encoder.condition_embedder.times
        tokens = self.encoder.teacher_forced(
            clean,
            times(clean_time)[1],
            frames.flatten(0, 1),
            times(time.flatten(0, 1))[1],
            self.encoder.text_memory(text_of(conditions, batch)),
        )
        if augment is not None and augment.context_noise > 0:
            tokens = _corrupted(tokens, augment.context_noise, augment.noise_like(tokens))
        return rearrange(tokens, "(b r) m n d -> b r m n d", r=num_draws)

    def _encoder_times(self, noise: Tensor, augment: Augmentation | None) -> Tensor:
        config, shape = self.config.encoder, noise.shape[:3]
        if augment is None:
            return torch.ones(shape, device=noise.device)
        generator = augment.generator
        part = torch.rand(shape, generator=generator, device=generator.device).to(noise.device)
        time = config.lowest_time + (1 - config.lowest_time) * part
        return config.shift * time / (1 + (config.shift - 1) * time)

    def _denoised(
        self, context: Tensor, conditions: Conditions, noisy: Tensor, time: Tensor
    ) -> Tensor:
        batch, num_draws, num_noisy = noisy.shape[:3]
        velocity = self.decoder.denoise(
            rearrange(context.expand(-1, num_draws, -1, -1, -1), "b r m n d -> (b r m) n d"),
            self.decoder.text_memory(text_of(conditions, batch)),
            rearrange(noisy, "b r m c h w -> (b r m) c h w"),
            rearrange(time, "b r m -> (b r m)"),
        )
        return rearrange(velocity, "(b r m) c h w -> b r m c h w", r=num_draws, m=num_noisy)

    def begin(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        conditions: Conditions,
        batch: int = 1,
        num_frames_in_memory: int | None = None,
    ) -> WanSeparableState:
        """Start a batch of streams, from given first frames or (None) from nothing."""
        config = self.config.cache.with_window(num_frames_in_memory)
        cache = self.encoder.new_cache(config, batch if clean is None else clean.shape[0])
        state = WanSeparableState(cache=cache, next_frame=0)
        for number in range(0 if clean is None else clean.shape[1]):
            assert clean is not None
            self.observe(state, clean[:, number], conditions)
        return state

    def context(
        self,
        state: WanSeparableState,
        conditions: Conditions,
        noise: Float[Tensor, "b c h w"] | None = None,
    ) -> WanFrameContext:
        """Run the encoder for the next frame, which it reads as pure noise.

        It may be called again, for another text or noise; the last call counts.

        Raises:
            ValueError: no noise, or no text.
        """
        if noise is None:
            raise ValueError("the encoder of a separable Wan model reads noise: none was given")
        batch = noise.shape[0]
        state.decoder_text = remember_text(self.decoder, conditions, batch, state.decoder_text)
        tokens = self._extend(state, noise, 1.0, conditions, only_remember=False)
        assert tokens is not None
        return WanFrameContext(tokens=tokens[:, 0], text=state.decoder_text.layers)

    def with_noisy_branch(
        self, context: WanFrameContext, strength: float, noise: Float[Tensor, "b 1 n d"]
    ) -> WanFrameContext:
        """Return a context of twice the batch: with corrupted context first, then as it was."""
        noisy = _corrupted(context.tokens, strength, noise[:, 0])
        return WanFrameContext(
            tokens=torch.cat([noisy, context.tokens]),
            text=[(k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)) for k, v in context.text],
        )

    def velocity(
        self,
        context: WanFrameContext,
        noisy: Float[Tensor, "b c h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        """Run the decoder once: the velocity of each stream's noisy frame."""
        return self.decoder.denoise(context.tokens, context.text, noisy, time)

    def observe(
        self, state: WanSeparableState, clean: Float[Tensor, "b c h w"], conditions: Conditions
    ) -> None:
        """Make a frame part of the past: one pass of the encoder at time 0 writes its memory."""
        self._extend(state, clean, 0.0, conditions, only_remember=True)
        state.cache.advance([state.next_frame])
        state.next_frame += 1

    def _extend(
        self,
        state: WanSeparableState,
        frames: Tensor,
        time: float,
        conditions: Conditions,
        only_remember: bool,
    ) -> Tensor | None:
        state.cache.make_room()
        text = remember_text(self.encoder, conditions, frames.shape[0], state.encoder_text)
        state.encoder_text = text
        times = torch.full((frames.shape[0], 1), time, device=frames.device)
        modulation = self.encoder.condition_embedder.times(times)[1]
        rotary = self.encoder.rotary([state.next_frame])
        return self.encoder.extend(
            state.cache, frames[:, None], modulation, text.layers, rotary, only_remember
        )


def _drawn(frames: Tensor, augment: Augmentation | None) -> Tensor:
    """Draw noise like some frames; without a generator always the same."""
    generator = make_generator(0, "noise of an encoder")
    return (augment or Augmentation(generator=generator)).noise_like(frames)


def _corrupted(tokens: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Add noise to context tokens; they come from no norm, so it has the scale of each token."""
    return tokens + strength * noise * tokens.std(dim=-1, keepdim=True)
