"""Separable Wan model: the first layers as causal encoder, the first and the last as decoder.

The encoder reads the frame to come as noise, beside the cached clean frames; so each frame takes it
two passes, one that gives the context and one that caches the finished frame. Source: paper
(composition, encoder input, teacher forcing).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.attention import attend
from scd.models.base import Augmentation, CausalDiffuser
from scd.models.config import EncoderNoise, FrameShape
from scd.models.embed import Field
from scd.models.flow import interpolate
from scd.models.stack import Text, check_blocks
from scd.models.wan.config import WanBlockConfig, WanDecoderConfig, WanSeparableConfig
from scd.models.wan.transformer import WanState, WanTransformer, text_in, text_of


class WanFrameDecoder(WanTransformer):
    """The first and the last layers of a Wan model over one frame and its context."""

    def __init__(
        self,
        config: WanDecoderConfig,
        shape: FrameShape,
        block: WanBlockConfig,
        conditions: ConditionSpec,
    ) -> None:
        super().__init__(shape, block, conditions, config.num_layers)
        self.config = config

    def denoise(
        self,
        context: Float[Tensor, "f n d"],
        text: Text,
        noisy: Float[Tensor, "f c h w"],
        time: Float[Tensor, " f"],
        steering: Float[Tensor, "f 1 d"] | None = None,
    ) -> Float[Tensor, "f c h w"]:
        """Return the velocity of noisy frames, each by itself.

        Args:
            context: of the same f frames.
            text: of each frame, or of fewer rows which as many frames in a row share.
            noisy: latent frames at `time`.
            time: 0 clean to 1 noise.
            steering: embedded actions of each frame; None: no actions steer this model.
        """
        embedding, modulation = self.condition_embedder.times(time[:, None], steering)
        # Within one frame only differences of positions matter, so every frame is frame 0.
        rotary = self.rotary([0])
        x = self.tokens(noisy[:, None])
        join = self.config.num_first if self.config.join == "middle" else 0
        for layer, (block, words) in enumerate(zip(self.blocks, text or (), strict=True)):
            if layer == join:
                # Context and noise have the same places, and stand as two frames side by side.
                x = torch.cat([context[:, None].to(x.dtype), x], dim=1)
                modulation = torch.cat(
                    [self._of_context(modulation, time, steering), modulation], dim=1
                )
                rotary = rotary[0].repeat(2, 1), rotary[1].repeat(2, 1)
            last = layer == len(self.blocks) - 1
            # Nobody reads the context's half after the last block.
            x = self.run_block(block, x, modulation, rotary, attend, words, 1 if last else None)
        return self.head(x, embedding)[:, 0]

    def _of_context(self, modulation: Tensor, time: Tensor, steering: Tensor | None) -> Tensor:
        if self.config.context_time == "same":
            return modulation
        return self.condition_embedder.times(torch.zeros_like(time)[:, None], steering)[1]


@dataclass(frozen=True, kw_only=True)
class WanFrameContext:
    """All that the decoder needs about one frame of each stream."""

    tokens: Float[Tensor, "b n d"]
    """What the encoder knows of the frame."""
    text: Text
    """The decoder's keys and values of the text in each layer."""
    steering: Float[Tensor, "b 1 d"] | None = None
    """The decoder's embedded actions of the frame; None: no actions steer this model."""


class WanSeparableDiffuser(CausalDiffuser):
    """Encoder and decoder behind the interface that all models share; `context` needs noise."""

    config_class = WanSeparableConfig

    def __init__(self, config: WanSeparableConfig) -> None:
        super().__init__()
        self.config, self.shape = config, config.shape
        parts = (config.shape, config.block, config.conditions)
        self.encoder = WanTransformer(*parts, config.encoder.num_layers, has_head=False)
        self.decoder = WanFrameDecoder(config.decoder, *parts)
        self.encoder_noise: EncoderNoise = config.encoder.noise

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
            conditions = augment.drop(conditions, self.config.conditions)
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
        noise: Float[Tensor, "b r2 m c h w"] | None = None,
    ) -> Field:
        """Return `forward` as a function of noisy frames and times, for many steps on one history.

        The encoder runs once, here, unless it is to read the noise within those frames.
        """
        context = None
        if noise is None and self.encoder_noise == "fresh":
            noise = _drawn(clean[:, None, -num_noisy:], None)
        if noise is not None:
            context = self._contexts(clean, noise, conditions, None, None)

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
        check_blocks(clean.shape[1], num_noisy)
        time = self._encoder_times(noise, augment)
        frames = interpolate(clean[:, None, -num_noisy:].expand_as(noise), noise, time)
        if clean_time is None:
            clean_time = torch.zeros(clean.shape[:2], device=clean.device)
        embed, num_past = self.encoder.condition_embedder, clean.shape[1] - 1
        before, now = conditions.frames(0, num_past), _last(conditions, clean.shape[1], num_noisy)
        tokens = self.encoder.run_teacher_forced(
            self.encoder.tokens(clean[:, :-1]),
            embed.times(clean_time[:, :-1], embed.steering(before))[1],
            self.encoder.tokens(frames.flatten(0, 1)),
            embed.times(time.flatten(0, 1), _of_draws(embed.steering(now), num_draws))[1],
            self.encoder.text_keys_values(text_of(conditions, batch)),
        )
        if augment is not None and augment.context_noise > 0:
            tokens = corrupted(tokens, augment.context_noise, augment.noise_like(tokens))
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
        steering = self.decoder.condition_embedder.steering(conditions)
        if steering is not None:
            steering = _of_draws(steering[:, -num_noisy:], num_draws)
            assert steering is not None
            steering = steering.flatten(0, 1)[:, None]
        velocity = self.decoder.denoise(
            rearrange(context.expand(-1, num_draws, -1, -1, -1), "b r m n d -> (b r m) n d"),
            self.decoder.text_keys_values(text_of(conditions, batch)),
            rearrange(noisy, "b r m c h w -> (b r m) c h w"),
            rearrange(time, "b r m -> (b r m)"),
            steering,
        )
        return rearrange(velocity, "(b r m) c h w -> b r m c h w", r=num_draws, m=num_noisy)

    def begin(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> WanState:
        batch = batch if clean is None else clean.shape[0]
        state = WanState(cache=self.stream_cache(batch, window), next_position=0)
        for place, frame in enumerate(() if clean is None else clean.unbind(1)):
            self.observe(state, frame, conditions.frames(place, place + 1))
        return state

    def context(
        self,
        state: WanState,
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
        tokens = self._encode(state, noise, 1.0, conditions)
        text = text_in(state, conditions, self.encoder, self.decoder)
        return WanFrameContext(
            tokens=tokens[:, 0],
            text=text[len(self.encoder.blocks) :],
            steering=self.decoder.condition_embedder.steering(conditions),
        )

    def with_noisy_branch(
        self, context: WanFrameContext, strength: float, noise: Float[Tensor, "b 1 n d"]
    ) -> WanFrameContext:
        """Return a context of twice the batch: with corrupted context first, then as it was."""
        noisy = corrupted(context.tokens, strength, noise[:, 0])
        return WanFrameContext(
            tokens=torch.cat([noisy, context.tokens]),
            text=[(k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)) for k, v in context.text or ()],
            steering=None if context.steering is None else context.steering.repeat(2, 1, 1),
        )

    def velocity(
        self,
        context: WanFrameContext,
        noisy: Float[Tensor, "b c h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        """Run the decoder once: the velocity of each stream's noisy frame."""
        return self.decoder.denoise(context.tokens, context.text, noisy, time, context.steering)

    def observe(
        self, state: WanState, clean: Float[Tensor, "b c h w"], conditions: Conditions
    ) -> None:
        """Make a frame part of the past: one pass of the encoder at time 0 fills the cache."""
        self._encode(state, clean, 0.0, conditions, only_cache=True)
        state.cache.advance([state.next_position])
        state.next_position += 1

    def _encode(
        self,
        state: WanState,
        frames: Tensor,
        time: float,
        conditions: Conditions,
        only_cache: bool = False,
    ) -> Tensor:
        state.cache.make_room()
        encoder, place = self.encoder, [state.next_position]
        embed = encoder.condition_embedder
        times = torch.full((frames.shape[0], 1), time, device=frames.device)
        return encoder.run_cached(
            state.cache,
            encoder.tokens(frames[:, None]),
            embed.times(times, embed.steering(conditions))[1],
            encoder.rotary(place),
            place,
            text_in(state, conditions, encoder, self.decoder),
            only_cache=only_cache,
        )


def _last(conditions: Conditions, num_frames: int, num: int) -> Conditions:
    """Return the conditions of the last frames of a clip."""
    return conditions.frames(num_frames - num, num_frames)


def _of_draws(steering: Tensor | None, num_draws: int) -> Tensor | None:
    """Repeat embedded actions [b m d] for each draw of a clip's frames, [b * r m d]."""
    return None if steering is None else steering.repeat_interleave(num_draws, 0)


def _drawn(frames: Tensor, augment: Augmentation | None) -> Tensor:
    """Draw noise like some frames; without a generator always the same."""
    generator = make_generator(0, "noise of an encoder")
    return (augment or Augmentation(generator=generator)).noise_like(frames)


def corrupted(tokens: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Add noise to context tokens; they come from no norm, so it has the scale of each token."""
    return tokens + strength * noise * tokens.std(dim=-1, keepdim=True)


def places_of(name: str, num_layers: int, config: WanSeparableConfig) -> list[str]:
    """Return the names under which a weight of the dense model lies in the separable one.

    Both parts have embedders of their own, equal at first; a layer may lie in both, in one, or in
    none.
    """
    found = re.match(r"blocks\.(\d+)\.(.+)", name)
    if found is None:
        is_head = name.startswith("proj_out.") or name == "scale_shift_table"
        return [f"decoder.{name}"] if is_head else [f"encoder.{name}", f"decoder.{name}"]
    layer, rest = int(found[1]), found[2]
    places = [f"encoder.blocks.{layer}.{rest}"] if layer < config.encoder.num_layers else []
    for place, own in enumerate(decoder_layers(num_layers, config)):
        if own == layer:
            places.append(f"decoder.blocks.{place}.{rest}")
    return places


def decoder_layers(num_layers: int, config: WanSeparableConfig) -> list[int]:
    """Return the layers of the dense model, from 0, that the decoder is made of."""
    first, last = config.decoder.num_first, config.decoder.num_last
    return [*range(first), *range(num_layers - last, num_layers)]
