"""Separable causal diffuser: causal reasoning once per frame, rendering in every step.

Source: paper (architecture).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.base import Augmentation, CausalDiffuser, State
from scd.models.config import SeparableConfig
from scd.models.decoder import FrameDecoder, Prepared
from scd.models.embed import Field, initialise
from scd.models.encoder import CausalEncoder, Context


@dataclass(kw_only=True)
class SeparableState(State):
    """A batch of streams: the cached past, and the newest frame, which waits for the action that
    follows it: its row, at `next_position`, is -1 for the start frame."""

    newest: Tensor
    """Newest frame, [b 1 c h w], or [b 0 c h w] for the start frame."""
    encoded_for: Conditions | None = None
    """Conditions with which the newest row lies in the cache already, though it is not kept yet:
    so a context can be computed again, for another action. None: it does not."""

    def fork(self, num: int = 1) -> SeparableState:
        cache = self.cache.fork(num)
        newest = self.newest.repeat_interleave(num, 0)
        return replace(self, cache=cache, newest=newest, encoded_for=None)

    def keep(self, clean: Float[Tensor, "b c h w"]) -> None:
        """Keep the row that was encoded last; a finished frame waits in its place."""
        self.cache.advance([self.next_position])
        self.newest, self.encoded_for = clean[:, None].detach(), None
        self.next_position += 1


@dataclass(frozen=True, kw_only=True)
class SeparableContext:
    """All that the decoder needs about one frame of each stream."""

    prepared: Prepared
    """What is the same in every denoising step."""
    encoded: Context
    """What the encoder gave."""
    conditions: Conditions
    """Of this frame."""


class SeparableDiffuser(CausalDiffuser):
    """A causal encoder, run once per frame, and a frame decoder, run at every step."""

    config_class = SeparableConfig

    def __init__(self, config: SeparableConfig) -> None:
        super().__init__()
        self.config, self.shape = config, config.shape
        parts = (config.shape, config.block, config.conditions)
        self.encoder = CausalEncoder(config.encoder, *parts)
        self.decoder = FrameDecoder(config.decoder, *parts)
        self.needs_first_frame = not config.encoder.start_frame
        initialise(self, config.block)

    def forward(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        noisy: Float[Tensor, "b r m c h w"],
        time: Float[Tensor, "b r m"],
        conditions: Conditions,
        augment: Augmentation | None = None,
    ) -> Float[Tensor, "b r m2 c h w"]:
        """Return the velocity of noisy frames, all at once.

        Args:
            clean: frames of the clip, the history; None: the noisy frames are their own history,
                one encoder pass per draw (an ablation of the release).
            noisy: r draws of the last m frames of the clip; without `clean`, of all its frames.
            time: of each noisy frame, 0 clean to 1 noise.
            conditions: of all t frames of the clip.
            augment: random changes for training; None: a pure function of the input.

        Returns:
            One velocity per noisy frame; without `clean` and start frame, none for the first.

        Raises:
            ValueError: more frames to denoise than have a context.
        """
        num_draws = noisy.shape[1]
        if clean is None:
            history = rearrange(noisy, "b r t c h w -> (b r) t c h w")
            velocity = self(
                history,
                history[:, None, int(self.needs_first_frame) :],
                rearrange(time, "b r t -> (b r) 1 t")[:, :, int(self.needs_first_frame) :],
                conditions.repeat(num_draws),
                augment,
            )
            return rearrange(velocity, "(b r) 1 t c h w -> b r t c h w", r=num_draws)
        num_frames, num_noisy = clean.shape[1], noisy.shape[2]
        if num_noisy > num_frames - self.needs_first_frame:
            raise ValueError(
                f"{num_frames} clean frames give context to "
                f"{num_frames - self.needs_first_frame} frames, got {num_noisy} noisy ones"
            )
        prepared = self._prepared(clean, conditions, num_noisy, augment).repeat(num_draws)
        return self._denoised(prepared, noisy, time)

    def field(
        self,
        clean: Float[Tensor, "b t c h w"],
        conditions: Conditions,
        num_noisy: int,
        num_draws: int = 1,
        noise: Float[Tensor, "b r2 m c h w"] | None = None,
    ) -> Field:
        """Return `forward` as a function of noisy frames and times; the encoder runs once, here."""
        prepared = self._prepared(clean, conditions, num_noisy, None).repeat(num_draws)
        return lambda noisy, time: self._denoised(prepared, noisy, time)

    def _prepared(
        self, clean: Tensor, conditions: Conditions, num_noisy: int, augment: Augmentation | None
    ) -> Prepared:
        num_frames = clean.shape[1]
        past, present = conditions, conditions.frames(num_frames - num_noisy, num_frames)
        if augment is not None:
            spec = self.config.conditions
            past, present = augment.drop(past, spec), augment.drop(present, spec)
        context = self.encoder(clean, past).last(num_noisy)
        if augment is not None and augment.context_noise > 0:
            noise = augment.noise_like(context.tokens)
            context = context.with_noise(augment.context_noise, noise)
        tokens = rearrange(context.tokens, "b m n d -> (b m) n d")
        return self.decoder.prepare(tokens, present.split(num_noisy))

    def _denoised(self, prepared: Prepared, noisy: Tensor, time: Tensor) -> Tensor:
        num_draws, num_noisy = noisy.shape[1:3]
        velocity = self.decoder.denoise(
            prepared,
            rearrange(noisy, "b r m c h w -> (b m r) c h w"),
            rearrange(time, "b r m -> (b m r)"),
        )
        return rearrange(velocity, "(b m r) c h w -> b r m c h w", m=num_noisy, r=num_draws)

    def begin(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> SeparableState:
        """Start a batch of streams.

        Args:
            clean: given first frames; None: from nothing.
            conditions: of the given frames.
            batch: number of streams, where no frames are given.
            window: frames in the KV cache of these streams; None: the model's own.

        Raises:
            ValueError: no frames given to a model without a start frame.
        """
        if clean is None:
            like = self.encoder.like
            clean = torch.empty(batch, 0, *self.shape.shape, dtype=like.dtype, device=like.device)
        num_given = clean.shape[1]
        if num_given == 0 and self.needs_first_frame:
            raise ValueError("this model has no start frame: it needs 1 or more first frames")
        cache = self.stream_cache(clean.shape[0], window)
        row = self.encoder.first_row
        # The row of the last given frame waits: it carries an action that is not known yet.
        while row < num_given - 1:
            stop = min(row + max(cache.num_free, 1), num_given - 1)
            upcoming = conditions.frames(row + 1, stop + 1)
            self.encoder.extend(cache, clean[:, max(row, 0) : stop], upcoming, row)
            row = stop
        return SeparableState(cache=cache, newest=clean[:, max(row, 0) :], next_position=row)

    def context(
        self, state: SeparableState, conditions: Conditions, noise: Tensor | None = None
    ) -> SeparableContext:
        """Run the encoder for the next frame, whose conditions are given as [b 1].

        It may be called again, for other conditions of the same frame; the last call counts.
        """
        encoded = self.encoder.extend(
            state.cache, state.newest, conditions, state.next_position, keep=False
        )
        state.encoded_for = conditions
        return self._context(encoded, conditions)

    def _context(self, encoded: Context, conditions: Conditions) -> SeparableContext:
        prepared = self.decoder.prepare(encoded.tokens[:, 0], conditions)
        return SeparableContext(prepared=prepared, encoded=encoded, conditions=conditions)

    def with_noisy_branch(
        self, context: SeparableContext, strength: float, noise: Float[Tensor, "b 1 n d"]
    ) -> SeparableContext:
        """Return a context of twice the batch: with corrupted context first, then as it was."""
        encoded = context.encoded
        noisy = self._context(encoded.with_noise(strength, noise), context.conditions)
        return SeparableContext(
            prepared=noisy.prepared.concat(context.prepared),
            encoded=Context(
                tokens=torch.cat([noisy.encoded.tokens, encoded.tokens]),
                norm_scale=torch.cat([encoded.norm_scale, encoded.norm_scale]),
            ),
            conditions=context.conditions.concat(context.conditions),
        )

    def velocity(
        self,
        context: SeparableContext,
        noisy: Float[Tensor, "b c h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        """Run the decoder once: the velocity of each stream's noisy frame."""
        return self.decoder.denoise(context.prepared, noisy, time)

    def observe(
        self, state: SeparableState, clean: Float[Tensor, "b c h w"], conditions: Conditions
    ) -> None:
        """Make a frame part of the past: the one just denoised, or a given one.

        No gradient of later frames reaches it.
        """
        if state.encoded_for is not conditions:
            self.context(state, conditions)
        state.keep(clean)
