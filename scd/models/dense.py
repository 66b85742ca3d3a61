"""Dense causal diffuser, the baseline: causal attention in all layers, at every denoising step.

It has every saving that the separable model has: a cache of clean frames, no mask where all is
visible, one modulation per frame, no row that nobody reads. Source: FAR; layers that are skipped or
that see their own frame only: paper, figures 3 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from scd.data.clip import Conditions
from scd.models.attention import FrameCausal, Rotary
from scd.models.base import Augmentation, CausalDiffuser, State
from scd.models.block import Block
from scd.models.config import DenseConfig
from scd.models.embed import (
    ConditionEmbedder,
    FrameHead,
    TimeEmbedder,
    TokenEmbedder,
    initialise,
    steered,
)
from scd.models.flow import CLEAN_TIME
from scd.models.kv_cache import KVCache
from scd.models.stack import Stack, Text, check_blocks


@dataclass(frozen=True, kw_only=True)
class DenseContext:
    """What a denoising step of one frame, or of one block of frames, needs."""

    cache: KVCache
    """What it attends to; the noisy frame's place in it is overwritten at each step."""
    frame: int
    """Position of the frame, or of the first one of its block."""
    rotary: Rotary
    """Of its tokens."""
    steering: Float[Tensor, "b 1 d"] | None
    """Embedded conditions of the frame."""
    text: Text
    """That its tokens look at."""


class DenseBase(CausalDiffuser, Stack):
    """One stack of frame-causal blocks behind the interface that all models share.

    A frame may look at the clean frames before it and at itself; the first frame has no past. With
    blocks of frames (`frames_per_block`), what is denoised and observed has an axis of frames
    behind that of the batch: [b frames c h w].

    A kind of model says how frames become tokens, and tokens velocities: `tokens`, `embeddings`,
    `velocities`, and what its blocks look at besides: `text_of`, `text_in`.
    """

    state_class: type[State] = State
    clean_time = CLEAN_TIME
    """Time of a clean frame."""
    num_local_frames = 0
    """Newest frames that a frame sees in training on noisy history. 0: all."""
    begins_at_once = True
    """Whether all given frames of a stream that fit its cache are read in one pass."""

    def tokens(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t n d"]:
        """Cut frames into tokens."""
        raise NotImplementedError

    def steering(self, conditions: Conditions) -> Float[Tensor, "b t d"] | None:
        """Embed what steers frames, but for a text; None: nothing does."""
        return None

    def embeddings(
        self, time: Float[Tensor, "b t"], steering: Float[Tensor, "#b #t d"] | None
    ) -> tuple[Tensor, Tensor]:
        """Return what modulates frames at the end, and what modulates them in all blocks."""
        raise NotImplementedError

    def velocities(
        self,
        x: Float[Tensor, "b t n d"],
        embedding: Tensor,
        noisy: Float[Tensor, "b t c h w"],
        time: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b t c h w"]:
        """Turn tokens into the velocity of noisy frames."""
        raise NotImplementedError

    def text_of(self, conditions: Conditions, batch: int) -> Text:
        """Return keys and values of the text of some clips; None: the blocks look at none."""
        return None

    def text_in(self, state: Any, conditions: Conditions) -> Text:
        """Return the same for streams, which keep them."""
        return None

    def forward(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        noisy: Float[Tensor, "b r m c h w"],
        time: Float[Tensor, "b r m"],
        conditions: Conditions,
        augment: Augmentation | None = None,
        clean_time: Float[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b r m c h w"]:
        """Return the velocity of noisy frames, all at once.

        Args:
            clean: frames of the clip, the history: clean frame j sees clean frames up to j, noisy
                frame i sees clean frames before i and itself. None: one sequence in which a noisy
                frame sees the noisy frames before it (FAR's training).
            noisy: r draws of the last m frames of the clip.
            time: of each noisy frame, 0 clean to 1 noise.
            conditions: of all t frames of the clip.
            augment: random changes for training; None: a pure function of the input. It may not
                ask for context noise, since this model has no context to corrupt.
            clean_time: of the history, where noise was added to it; None: that of clean frames.
        """
        if augment is not None:
            if augment.context_noise > 0:
                raise ValueError("a dense model has no context: context_noise must be 0")
            conditions = augment.drop(conditions, self.config.conditions)
        batch, num_draws, num_noisy = noisy.shape[:3]
        size = self.config.frames_per_block
        frames = rearrange(noisy, "b r m c h w -> (b r) m c h w")
        time = rearrange(time, "b r m -> (b r) m")
        if clean is None:
            conditions = conditions.repeat(num_draws)
            embedding, modulation = self.embeddings(time, self.steering(conditions))
            visible = FrameCausal(
                num_frames=num_noisy,
                tokens_per_frame=self.shape.num_tokens,
                frames_per_block=size,
                num_local=self.num_local_frames,
            )
            text = self.text_of(conditions, batch * num_draws)
            x = self.tokens(frames)
            x = self.run_masked(x, modulation, range(num_noisy), visible, text, time)
        else:
            check_blocks(clean.shape[1], num_noisy, size)
            # The last block of clean frames is no frame's past.
            num_past, first = clean.shape[1] - size, clean.shape[1] - num_noisy
            if clean_time is None:
                clean_time = self._clean_times(clean)
            before, now = conditions.frames(0, num_past), conditions.frames(first, clean.shape[1])
            _, past = self.embeddings(clean_time[:, :num_past], self.steering(before))
            steering = self.steering(now)
            if steering is not None:
                steering = steering.repeat_interleave(num_draws, 0)
            embedding, modulation = self.embeddings(time, steering)
            x = self.run_teacher_forced(
                self.tokens(clean[:, :num_past]),
                past,
                self.tokens(frames),
                modulation,
                self.text_of(conditions, batch),
                time,
                size,
            )
        velocity = self.velocities(x, embedding, frames, time)
        return rearrange(velocity, "(b r) m c h w -> b r m c h w", r=num_draws)

    def begin(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> State:
        """Start a batch of streams, from given first frames or (None) from nothing.

        Raises:
            ValueError: given frames that are no whole blocks, or without a text that is needed.
        """
        size = self.config.frames_per_block
        num_given = 0 if clean is None else clean.shape[1]
        if num_given % size:
            raise ValueError(f"needed whole blocks of {size} frames, got {num_given} frames")
        batch = batch if clean is None else clean.shape[0]
        state = self.state_class(cache=self.stream_cache(batch, window), next_position=0)
        while clean is not None and state.next_position < num_given:
            start = state.next_position
            num = max(state.cache.num_free, 1) if self.begins_at_once else size
            stop = min(start + num, num_given)
            self._cache_frames(state, clean[:, start:stop], conditions.frames(start, stop))
        return state

    def context(
        self, state: State, conditions: Conditions, noise: Tensor | None = None
    ) -> DenseContext:
        """Return what every step of the next frame needs; conditions are [b 1]."""
        state.cache.make_room()
        first = state.next_position
        return DenseContext(
            cache=state.cache,
            frame=first,
            rotary=self.rotary(range(first, first + self.config.frames_per_block)),
            steering=self.steering(conditions),
            text=self.text_in(state, conditions),
        )

    def velocity(
        self,
        context: DenseContext,
        noisy: Float[Tensor, "b *m c h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b *m c h w"]:
        """Run the layers once, each over the whole cache and the noisy frame or block."""
        frames = self._as_block(noisy)
        times = time[:, None].expand(frames.shape[:2])
        embedding, modulation = self.embeddings(times, context.steering)
        x = self.run_cached(
            context.cache,
            self.tokens(frames),
            modulation,
            context.rotary,
            [context.frame // self.config.frames_per_block],
            context.text,
            times,
        )
        return self.velocities(x, embedding, frames, times).reshape(noisy.shape)

    def observe(
        self, state: State, clean: Float[Tensor, "b *m c h w"], conditions: Conditions
    ) -> None:
        """Make a frame or block part of the past: one pass over it, clean, fills the cache.

        Carrying the clean frame along with the next frame's first step would cost the same.
        """
        self._cache_frames(state, self._as_block(clean), conditions)

    def _cache_frames(self, state: State, frames: Tensor, conditions: Conditions) -> None:
        state.cache.make_room()
        size, first = self.config.frames_per_block, state.next_position
        stop = first + frames.shape[1]
        _, modulation = self.embeddings(self._clean_times(frames), self.steering(conditions))
        places = list(range(first // size, stop // size))
        self.run_cached(
            state.cache,
            self.tokens(frames),
            modulation,
            self.rotary(range(first, stop)),
            places,
            self.text_in(state, conditions),
            only_cache=True,
        )
        state.cache.advance(places)
        state.next_position = stop

    def _clean_times(self, frames: Tensor) -> Tensor:
        return frames.new_full(frames.shape[:2], self.clean_time, dtype=torch.float32)

    def _as_block(self, frames: Tensor) -> Tensor:
        size = self.config.frames_per_block
        block = frames[:, None] if frames.ndim == 4 else frames
        if block.shape[1] != size:
            raise ValueError(f"needed blocks of {size} frames, got {block.shape[1]}")
        return block


class DenseDiffuser(DenseBase):
    """A dense model of plain blocks. The token of frame i carries action i, clean or noisy."""

    config_class = DenseConfig

    def __init__(self, config: DenseConfig) -> None:
        block = config.block
        Stack.__init__(self, config.shape, block)
        self.config = config
        self.skip, self.num_diagonal = config.skip, config.num_diagonal
        self.embed_frame = TokenEmbedder(config.shape, block.width, block.learned_positions)
        self.embed_time = TimeEmbedder(block.width)
        self.embed_conditions = ConditionEmbedder(config.conditions, block.width)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.head = FrameHead(config.shape, block.width, config.predict)
        initialise(self, block)

    def tokens(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t n d"]:
        return self.embed_frame(frames)

    def steering(self, conditions: Conditions) -> Float[Tensor, "b t d"] | None:
        return self.embed_conditions(conditions)

    def embeddings(
        self, time: Float[Tensor, "b t"], steering: Float[Tensor, "#b #t d"] | None
    ) -> tuple[Tensor, Tensor]:
        embedding = steered(self.embed_time(time), steering)
        return embedding, embedding

    def velocities(
        self,
        x: Float[Tensor, "b t n d"],
        embedding: Tensor,
        noisy: Float[Tensor, "b t c h w"],
        time: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b t c h w"]:
        return self.head(x, embedding, noisy, time)
