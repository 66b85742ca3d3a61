"""Causal encoder: clean past frames and actions to the context of the next frame.

It runs once per frame, outside the denoising loop. Source: paper, sections 1.1 and 1.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.data.clip import Conditions, ConditionSpec
from scd.models.attention import attend, frame_positions, rotary_table
from scd.models.block import Block, BlockConfig, Modulation, Stack, layer_norm
from scd.models.embed import ConditionEmbedder, FrameShape, TimeEmbedder, TokenEmbedder
from scd.models.flow import CLEAN_TIME
from scd.models.kv_cache import CacheConfig, KVCache
from scd.models.visibility import DistanceBias, FrameCausal


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Settings of the causal encoder."""

    num_layers: int = 4
    """Transformer blocks."""
    start_frame: bool = True
    """Put learned tokens before the first frame, so that a stream can begin from nothing. False:
    the first frame has no context and must be given, as in the release."""
    modulate_output: bool = True
    """Scale and shift the context by time and action after its last norm, as in the paper."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be 1 or more, got {self.num_layers}")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the encoder knows about frames before they are denoised."""

    tokens: Float[Tensor, "b t n d"]
    """Context tokens of each frame to be denoised, one for each token of the frame."""
    gain: Float[Tensor, "b t 1 d"]
    """Factor by which the last norm's output was scaled: noise enters before it."""

    def with_noise(self, strength: float, noise: Float[Tensor, "b t n d"]) -> Context:
        """Corrupt the context as if before the scale and shift of the last norm.

        Source: paper, section 2.3 (equation 7).
        """
        return replace(self, tokens=self.tokens + strength * noise * self.gain)

    def last(self, num_frames: int) -> Context:
        """Return the context of the last frames only."""
        return Context(tokens=self.tokens[:, -num_frames:], gain=self.gain[:, -num_frames:])


class CausalEncoder(Stack):
    """Frame-causal transformer over [start frame, frame 0, frame 1, ...].

    The row of frame i carries the action of frame i + 1, and its output is the context of frame
    i + 1: so the context of a frame knows every earlier frame and its own action, never the frame.
    """

    def __init__(
        self,
        config: EncoderConfig,
        shape: FrameShape,
        block: BlockConfig,
        conditions: ConditionSpec,
    ) -> None:
        super().__init__()
        self.config, self.shape, self.block = config, shape, block
        self.embed_frame = TokenEmbedder(shape, block.width, block.learned_positions)
        self.embed_time = TimeEmbedder(block.width)
        self.embed_conditions = ConditionEmbedder(conditions, block.width)
        self.start = (
            nn.Parameter(torch.empty(shape.num_tokens, block.width)) if config.start_frame else None
        )
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.output_modulation = Modulation(block.width, 2) if config.modulate_output else None

    @property
    def first_row(self) -> int:
        """Frame position of the first row: -1 with a start frame, else 0."""
        return -1 if self.config.start_frame else 0

    def forward(self, clean: Float[Tensor, "b t c h w"], conditions: Conditions) -> Context:
        """Compute the context of all frames of a clip in one masked pass.

        Args:
            clean: latent frames; the last one is no frame's past, so it is not read.
            conditions: of the same t frames.

        Returns:
            The context of frames 0 .. t - 1, or of 1 .. t - 1 without a start frame.

        Raises:
            ValueError: without a start frame, a clip of fewer than two frames.
        """
        tokens = self._rows(clean[:, :-1], with_start=self.config.start_frame)
        num_rows = tokens.shape[1]
        if num_rows == 0:
            raise ValueError("an encoder without a start frame needs 2 or more frames, got 1")
        upcoming = conditions.frames(self.first_row + 1, None)
        frames = list(range(self.first_row, self.first_row + num_rows))
        visible = FrameCausal(num_frames=num_rows, tokens_per_frame=self.shape.num_tokens)
        bias = self._bias(frames, frames)

        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, visible if num_rows > 1 else None, bias)

        return self._run(tokens, upcoming, frames, [read] * len(self.blocks))

    def new_cache(self, batch: int, config: CacheConfig) -> KVCache:
        """Allocate the memory of a batch of streams."""
        weight = self.embed_frame.project.weight
        return KVCache.for_blocks(
            config, self.block, len(self.blocks), batch, self.shape.num_tokens, weight
        )

    def extend(
        self,
        cache: KVCache,
        clean: Float[Tensor, "b t c h w"],
        upcoming: Conditions,
        first_row: int,
        keep: bool = True,
    ) -> Context:
        """Append rows to the cache and return what each is the context of.

        Args:
            cache: changed in place.
            clean: frames of the rows after the start frame; t may be 0 at the start frame.
            upcoming: conditions of the frame after each row.
            first_row: frame position of the first row; -1 is the start frame.
            keep: False leaves it to the caller to advance the cache, or to replace the rows.
        """
        tokens = self._rows(clean, with_start=first_row == -1)
        num_rows = tokens.shape[1]
        frames = list(range(first_row, first_row + num_rows))
        cache.make_room()
        bias = self._bias(frames, cache.positions_with(frames))
        # The frames in memory come first, then the rows, unless the ring has wrapped: then there
        # is one row only, and it sees everything.
        visible = None
        if num_rows > 1:
            visible = FrameCausal(
                num_frames=cache.num_frames + num_rows,
                num_past=cache.num_frames,
                tokens_per_frame=self.shape.num_tokens,
            )

        def reader(layer: int):
            def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return attend(q, *cache.write(layer, k, v), visible, bias)

            return read

        readers = [reader(layer) for layer in range(len(self.blocks))]
        # A block recomputed in the backward pass would write into a memory that has moved on.
        context = self._run(tokens, upcoming, frames, readers, can_recompute=False)
        if keep:
            cache.advance(frames)
        return context

    def _rows(self, clean: Tensor, with_start: bool) -> Float[Tensor, "b t n d"]:
        tokens = self.embed_frame(clean)
        if with_start:
            assert self.start is not None
            start = self.start.to(tokens.dtype).expand(clean.shape[0], 1, -1, -1)
            tokens = torch.cat([start, tokens], dim=1)
        return tokens

    def _bias(self, queries: list[int], keys: list[int]) -> DistanceBias | None:
        if self.block.distance_bias == 0:
            return None
        return DistanceBias(
            slope=self.block.distance_bias,
            query_frames=tuple(queries),
            key_frames=tuple(keys),
            tokens_per_frame=self.shape.num_tokens,
        )

    def _run(
        self,
        x: Tensor,
        upcoming: Conditions,
        frames: list[int],
        readers: list,
        can_recompute: bool = True,
    ) -> Context:
        embedding = self.embed_time(x.new_full(x.shape[:2], CLEAN_TIME, dtype=torch.float32))
        steering = self.embed_conditions(upcoming)
        if steering is not None:
            embedding = embedding + steering
        positions = frame_positions(
            torch.tensor(frames, device=x.device), self.shape.rows, self.shape.columns
        )
        rotary = rotary_table(positions, self.block.rotary_axes, self.block.rotary_theta)
        for block, read in zip(self.blocks, readers, strict=True):
            inputs = (x, embedding, rotary, read)
            x = self.run(block, *inputs) if can_recompute else block(*inputs)
        x = layer_norm(x)
        if self.output_modulation is None:
            return Context(tokens=x, gain=torch.ones_like(x[:, :, :1]))
        scale, shift = self.output_modulation(embedding)
        return Context(tokens=x * (1 + scale) + shift, gain=(1 + scale).expand_as(x[:, :, :1]))
