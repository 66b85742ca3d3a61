"""Dense causal Wan model: all layers at every step, frame by frame or in blocks of frames.

The form of CausVid and Self-Forcing. Its weights are those of diffusers' WanTransformer3DModel,
name by name. Source: paper, sections 6.3, 7.1 and 7.6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.attention import Rotary
from scd.models.augment import Augmentation
from scd.models.base import CausalDiffuser
from scd.models.cost import FrameCost, Load
from scd.models.embed import Field
from scd.models.kv_cache import KVCache
from scd.models.visibility import FrameCausal
from scd.models.wan.block import TextKeysValues
from scd.models.wan.config import WanConfig
from scd.models.wan.cost import wan_cost
from scd.models.wan.text import TextMemory, remember_text, text_of
from scd.models.wan.transformer import WanTransformer


@dataclass(kw_only=True)
class WanState:
    """A batch of streams: the clean frames so far, and the text that holds now."""

    cache: KVCache
    """Keys and values of all clean frames, at their absolute positions."""
    next_frame: int
    """Position of the frame, or of the first frame of the block, that comes next."""
    text: TextMemory | None = None
    """Keys and values of the text; None: no frame has asked for it."""

    def fork(self) -> WanState:
        """Return an independent copy."""
        return replace(self, cache=self.cache.fork())


@dataclass(frozen=True, kw_only=True)
class WanContext:
    """What a denoising step of one frame needs: the memory itself, to attend to."""

    cache: KVCache
    """Memory; the noisy frame's place in it is overwritten at each step."""
    frame: int
    """Position of the frame, or of the first one of its block."""
    text: list[TextKeysValues]
    """Keys and values of the text in each layer."""
    rotary: Rotary
    """Positions of its tokens."""


class WanDiffuser(WanTransformer, CausalDiffuser):
    """Wan's transformer made causal, behind the interface that all models share.

    Streaming, for each frame: `context`, `velocity` once per step, `observe`. With blocks of frames
    (`frames_per_block`), what is denoised and observed has an axis of frames behind that of the
    batch: [b frames c h w].
    """

    config_class = WanConfig

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config.shape, config.block, config.conditions, config.num_layers)
        self.config = config

    def frame_cost(self, load: Load) -> FrameCost:
        """Count one frame; `wan_cost` states the formula."""
        return wan_cost(self.config, load)

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
            clean: frames of the clip, the history: see `WanTransformer.teacher_forced`. None: one
                sequence in which a noisy frame sees the noisy frames before it.
            noisy: r draws of the last m frames of the clip.
            time: of each noisy frame, 0 clean to 1 noise.
            conditions: text of the clip.
            augment: random changes for training; None: a pure function of the input. It may not
                ask for context noise, since this model has no context to corrupt.
            clean_time: of the history, where noise was added to it; None: 0.
        """
        if augment is not None:
            if augment.context_noise > 0:
                raise ValueError("a dense model has no context: context_noise must be 0")
            conditions = augment.drop(conditions)
        batch, num_draws = noisy.shape[:2]
        frames = rearrange(noisy, "b r m c h w -> (b r) m c h w")
        times = rearrange(time, "b r m -> (b r) m")
        embedding, modulation = self.condition_embedder.times(times)
        size = self.config.frames_per_block
        if clean is None:
            visible = FrameCausal(
                num_frames=frames.shape[1],
                tokens_per_frame=self.shape.num_tokens,
                frames_per_block=size,
                num_local=self.config.num_local_frames,
            )
            text = self.text_memory(text_of(conditions.repeat(num_draws), batch * num_draws))
            x = self.masked(frames, modulation, text, visible)
        else:
            if clean_time is None:
                clean_time = torch.zeros(clean.shape[:2], device=clean.device)
            past = self.condition_embedder.times(clean_time)[1]
            text = self.text_memory(text_of(conditions, batch))
            x = self.teacher_forced(clean, past, frames, modulation, text, size)
        velocity = self.head(x, embedding)
        return rearrange(velocity, "(b r) m c h w -> b r m c h w", r=num_draws)

    def bidirectional(
        self,
        noisy: Float[Tensor, "b t c h w"],
        time: Float[Tensor, "b t"],
        conditions: Conditions,
    ) -> Float[Tensor, "b t c h w"]:
        """Return the velocity of noisy frames that all see each other: Wan as it is published."""
        embedding, modulation = self.condition_embedder.times(time)
        text = self.text_memory(text_of(conditions, noisy.shape[0]))
        return self.head(self.masked(noisy, modulation, text, None), embedding)

    def field(
        self,
        clean: Float[Tensor, "b t c h w"],
        conditions: Conditions,
        num_noisy: int,
        num_draws: int = 1,
    ) -> Field:
        """Return `forward` as a function of noisy frames and times; each call runs all of it."""

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            assert noisy.shape[1:3] == (num_draws, num_noisy)
            return self(clean, noisy, time, conditions)

        return velocity

    def begin(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        conditions: Conditions,
        batch: int = 1,
        num_frames_in_memory: int | None = None,
    ) -> WanState:
        """Start a batch of streams, from given first frames or (None) from nothing.

        Raises:
            ValueError: given frames that are no whole blocks, or without a text.
        """
        size = self.config.frames_per_block
        if clean is not None:
            batch = clean.shape[0]
        config = replace(self.config, cache=self.config.cache.with_window(num_frames_in_memory))
        cache = self.new_cache(config.cache, batch, size)
        state = WanState(cache=cache, next_frame=0)
        if clean is None:
            return state
        if clean.shape[1] % size:
            raise ValueError(f"needed whole blocks of {size} frames, got {clean.shape[1]} frames")
        for start in range(0, clean.shape[1], size):
            self._remember(state, clean[:, start : start + size], conditions)
        return state

    def context(
        self, state: WanState, conditions: Conditions, noise: Tensor | None = None
    ) -> WanContext:
        """Return what every step of the next frame needs; `noise` is not read."""
        state.cache.make_room()
        state.text = remember_text(self, conditions, state.cache.keys.shape[1], state.text)
        return WanContext(
            cache=state.cache,
            frame=state.next_frame,
            text=state.text.layers,
            rotary=self._places(state),
        )

    def velocity(
        self,
        context: WanContext,
        noisy: Float[Tensor, "b *m c h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b *m c h w"]:
        """Run the layers once, each over the whole memory and the noisy frame or block."""
        frames = self._as_block(noisy)
        times = time[:, None].expand(frames.shape[:2])
        embedding, modulation = self.condition_embedder.times(times)
        x = self.extend(context.cache, frames, modulation, context.text, context.rotary)
        assert x is not None
        return self.head(x, embedding).view(noisy.shape)

    def observe(
        self, state: WanState, clean: Float[Tensor, "b *m c h w"], conditions: Conditions
    ) -> None:
        """Make a frame or block part of the past: one pass at time 0 writes its memory."""
        self._remember(state, self._as_block(clean), conditions)

    def _remember(self, state: WanState, frames: Tensor, conditions: Conditions) -> None:
        cache = state.cache
        cache.make_room()
        state.text = remember_text(self, conditions, frames.shape[0], state.text)
        time = torch.zeros(frames.shape[:2], device=frames.device)
        modulation = self.condition_embedder.times(time)[1]
        places, size = self._places(state), self.config.frames_per_block
        self.extend(cache, frames, modulation, state.text.layers, places, only_remember=True)
        cache.advance([state.next_frame // size])
        state.next_frame += size

    def _places(self, state: WanState) -> Rotary:
        first = state.next_frame
        return self.rotary(range(first, first + self.config.frames_per_block))

    def _as_block(self, frames: Tensor) -> Tensor:
        """Return frames [b frames c h w] of one block."""
        size = self.config.frames_per_block
        block = frames[:, None] if frames.ndim == 4 else frames
        if block.shape[1] != size:
            raise ValueError(f"needed blocks of {size} frames, got {block.shape[1]}")
        return block
