"""Blocks in a row, and the three ways to run them: all frames of a clip under a mask, noisy frames
beside their clean history, and frames of a stream over its KV cache.

Source: paper (encoder); layers that are skipped, or that see their own frame only:
paper, figures 3 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.attention import (
    DistanceBias,
    FrameCausal,
    Rotary,
    TeacherForcing,
    Visibility,
    attend,
    frame_positions,
    rotary_table,
)
from scd.models.block import Attend, with_keys_values
from scd.models.config import CacheConfig, FrameShape, LayerSkip, SamplingConfig
from scd.models.flow import schedule
from scd.models.kv_cache import KVCache

Text = Sequence[tuple[Tensor, Tensor]] | None
"""Keys and values of a text in each layer; None: the blocks look at none."""


def skips(skip: LayerSkip, time: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Tell which frames of these times skip the layers; clean ones, of CLEAN_TIME, do not."""
    return (time >= 0) & (time < skip.below)


def skip_after(first: int, stop: int, full_steps: int, sampling: SamplingConfig) -> LayerSkip:
    """Skip layers in all steps of a schedule but the first ones.

    Between the last whole step and the first short one, the time at which it changes is in the
    middle, so that no rounding decides.

    Args:
        first: layer, from 0.
        stop: layer after the last one that is skipped.
        full_steps: steps that run all layers, 1 or more; all of them: no step of this schedule
            skips any, a longer one's last steps would.
        sampling: whose schedule it is.

    Raises:
        ValueError: no such steps or layers.
    """
    if not 1 <= full_steps <= sampling.num_steps:
        raise ValueError(
            f"full_steps must lie in 1 .. {sampling.num_steps}, the steps of a frame, "
            f"got {full_steps}"
        )
    times = schedule(sampling).tolist()
    below = (times[full_steps - 1] + times[full_steps]) / 2
    return LayerSkip(first=first, stop=stop, below=below)


class Stack(nn.Module):
    """Blocks in a row over frames of one shape, each kept or, in the backward pass, recomputed."""

    blocks: nn.ModuleList
    embed_frame: Any
    recomputes = False
    """Whether training recomputes a block instead of keeping what is inside it."""
    recomputes_streams = False
    """Whether it does so over a KV cache too: then no frame may leave the window meanwhile."""
    skip: LayerSkip | None = None
    """Layers that noisy frames pass by once they are nearly clean."""
    num_diagonal = 0
    """Last layers in which a frame sees itself only; nothing is cached for them."""

    def __init__(self, shape: FrameShape, block: Any) -> None:
        super().__init__()
        self.shape, self.block = shape, block

    @property
    def num_seeing(self) -> int:
        """Layers that see other frames, the first ones."""
        return len(self.blocks) - self.num_diagonal

    @property
    def like(self) -> Tensor:
        """A weight in the type, and on the device, in which tokens are computed."""
        return self.embed_frame.project.weight

    def rotary(self, frames: Sequence[int]) -> Rotary:
        """Return the rotary embedding of the tokens of frames at positions."""
        positions = frame_positions(
            torch.tensor(list(frames), dtype=torch.long, device=self.like.device),
            self.shape.rows,
            self.shape.columns,
        )
        return rotary_table(positions, self.block.rotary_axes, self.block.rotary_theta)

    def distance_bias(self, queries: Sequence[int], keys: Sequence[int]) -> DistanceBias | None:
        """Return the bias over the distance of frames at positions, if the blocks have one."""
        if self.block.distance_bias == 0:
            return None
        return DistanceBias(
            slope=self.block.distance_bias,
            query_frames=tuple(queries),
            key_frames=tuple(keys),
            tokens_per_frame=self.shape.num_tokens,
        )

    def new_cache(self, config: CacheConfig, batch: int, frames_per_block: int = 1) -> KVCache:
        """Allocate the KV cache of a batch of streams, for the layers that see other frames.

        Args:
            config: its size in frames.
            batch: streams side by side.
            frames_per_block: frames that are cached, and leave the window, together.
        """
        return KVCache(
            config.in_blocks(frames_per_block),
            self.block,
            num_layers=self.num_seeing,
            batch=batch,
            tokens_per_frame=self.shape.num_tokens * frames_per_block,
            like=self.like,
        )

    def run_block(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block, or a function of one; training may recompute it in the backward pass."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def run_masked(
        self,
        x: Float[Tensor, "b t n d"],
        embedding: Tensor,
        frames: Sequence[int],
        visible: Visibility | None,
        text: Text = None,
        time: Float[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t n d"]:
        """Run all layers over frames in one sequence.

        Args:
            x: tokens of the frames.
            embedding: what modulates each frame.
            frames: their positions.
            visible: what they see of each other; None: all.
            text: that they look at.
            time: of each, where layers are skipped.
        """
        bias, rotary = self.distance_bias(frames, frames), self.rotary(frames)

        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, visible, bias)

        for layer in range(len(self.blocks)):
            x = self._layer(layer, x, embedding, rotary, read, text, time)
        return x

    def run_teacher_forced(
        self,
        past: Float[Tensor, "b t n d"],
        past_embedding: Tensor,
        x: Float[Tensor, "br m n d"],
        embedding: Tensor,
        text: Text = None,
        time: Float[Tensor, "br m"] | None = None,
        frames_per_block: int = 1,
    ) -> Float[Tensor, "br m n d"]:
        """Run all layers over noisy frames, each beside the clean frames before it.

        Args:
            past: tokens of the clean frames of a clip, but for its last block, which is no frame's
                past: each sees those up to itself.
            past_embedding: what modulates them.
            x: tokens of r draws of the last m frames, the r of a clip in a row; each sees the clean
                frames before it and itself, and stands where the clean one stands.
            embedding: what modulates them.
            text: of each clip, that all look at.
            time: of each noisy frame, where layers are skipped.
            frames_per_block: frames that see each other.
        """
        num_past, num_noisy, size = past.shape[1], x.shape[1], frames_per_block
        num_draws = x.shape[0] // past.shape[0]
        first = num_past + size - num_noisy
        before, now = list(range(num_past)), list(range(first, first + num_noisy))
        past_rotary, rotary = self.rotary(before), self.rotary(now)
        past_bias = self.distance_bias(before, before)
        bias = self.distance_bias(now, before + now)
        frame = {"tokens_per_frame": self.shape.num_tokens, "frames_per_block": size}
        past_visible = FrameCausal(num_frames=num_past, **frame)
        visible = None
        if num_noisy > size:
            visible = TeacherForcing(
                num_clean=num_past, first_noisy=first, num_noisy=num_noisy, **frame
            )

        def read_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, past_visible, past_bias)

        for layer, block in enumerate(self.blocks):
            read = attend
            if layer < self.num_seeing:
                inputs = (block, past, past_embedding, past_rotary)
                if layer == self.num_seeing - 1 or num_past == 0:
                    keys, values = block.keys_values(*inputs[1:])  # type: ignore[operator]
                else:
                    past, keys, values = self.run_block(
                        with_keys_values, *inputs, read_past, *_text_of(text, layer)
                    )
                keys, values = (part.repeat_interleave(num_draws, 0) for part in (keys, values))
                read = attend_also(keys, values, visible, bias)
            x = self._layer(layer, x, embedding, rotary, read, text, time)
        return x

    def run_cached(
        self,
        cache: KVCache,
        x: Float[Tensor, "b t n d"],
        embedding: Tensor,
        rotary: Rotary,
        places: Sequence[int],
        text: Text = None,
        time: Float[Tensor, "b t"] | None = None,
        only_cache: bool = False,
    ) -> Float[Tensor, "b t n d"]:
        """Run the next frames of streams over their KV cache, and write them into it.

        What all of them skip is not computed.

        Args:
            cache: has room for them; the caller advances it to keep them.
            x: their tokens; of several places, each sees those up to its own.
            embedding: what modulates them.
            rotary: of their tokens.
            places: their positions in the cache.
            text: of each stream.
            time: of each frame, where layers are skipped.
            only_cache: nobody reads what is returned: the last layer only writes its keys and
                values.
        """
        bias = None
        if self.block.distance_bias:
            bias = self.distance_bias(places, cache.positions_with(list(places)))
        # The cached frames come first, then these, unless the ring has wrapped: then there is one
        # place only, and it sees everything.
        visible = None
        if len(places) > 1:
            visible = FrameCausal(
                num_frames=cache.num_frames + len(places),
                num_past=cache.num_frames,
                tokens_per_frame=self.shape.num_tokens,
            )
        skipped = range(0)
        if self.skip is not None and time is not None and bool(skips(self.skip, time).all()):
            skipped = self.skip.layers
        for layer, block in enumerate(self.blocks):
            if only_cache and layer == self.num_seeing - 1:
                cache.write(layer, *block.keys_values(x, embedding, rotary))  # type: ignore[operator]
                break
            if layer not in skipped:
                read = _attend_cached(cache, layer, visible, bias)
                x = self._layer(layer, x, embedding, rotary, read, text, time, in_stream=True)
        return x

    def _layer(
        self,
        layer: int,
        x: Tensor,
        embedding: Tensor,
        rotary: Rotary,
        read: Attend,
        text: Text,
        time: Tensor | None,
        in_stream: bool = False,
    ) -> Tensor:
        block = self.blocks[layer]
        inputs = (x, embedding, rotary, read if layer < self.num_seeing else self.attend_own)
        inputs = (*inputs, *_text_of(text, layer))
        # A block recomputed in the backward pass would find a cache that has moved on.
        recomputes = self.recomputes_streams or not in_stream
        after = self.run_block(block, *inputs) if recomputes else block(*inputs)
        if self.skip is None or time is None or layer not in self.skip.layers:
            return after
        return torch.where(skips(self.skip, time)[..., None, None], x, after)

    def attend_own(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within each frame: the attention of a diagonal layer."""
        size = self.shape.num_tokens
        num_frames = q.shape[2] // size
        q, k, v = (rearrange(part, "b k (t n) e -> (b t) k n e", n=size) for part in (q, k, v))
        return rearrange(attend(q, k, v), "(b t) k n e -> b k (t n) e", t=num_frames)


def check_blocks(num_clean: int, num_noisy: int, frames_per_block: int = 1) -> None:
    """Refuse numbers of clean and noisy frames of a clip that do not fit (ValueError)."""
    size, first = frames_per_block, num_clean - num_noisy
    if first < 0 or first % size or num_noisy % size:
        raise ValueError(
            f"needed whole blocks of {size} frames and no more noisy than clean ones, got "
            f"{num_noisy} noisy and {num_clean} clean ones"
        )


def _text_of(text: Text, layer: int) -> tuple:
    return () if text is None else (text[layer],)


def attend_also(
    keys: Tensor,
    values: Tensor,
    visible: Visibility | None = None,
    bias: DistanceBias | None = None,
) -> Attend:
    """Return the attention of tokens to others, whose keys and values are given, and themselves."""

    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = torch.cat([keys.to(k.dtype), k], dim=2), torch.cat([values.to(v.dtype), v], dim=2)
        return attend(q, *both, visible, bias)

    return read


def _attend_cached(
    cache: KVCache, layer: int, visible: Visibility | None, bias: DistanceBias | None
) -> Attend:
    write = cache.writer(layer)
    return lambda q, k, v: attend(q, *write(k, v), visible, bias)
