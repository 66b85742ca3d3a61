"""Causal encoder: clean past frames and actions to the context of the next frame.

It runs once per frame, outside the denoising loop. Source: paper (formulation, encoder).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.attention import FrameCausal
from scd.models.block import Block, Modulation, layer_norm
from scd.models.config import BlockConfig, EncoderConfig, FrameShape
from scd.models.embed import ConditionEmbedder, TimeEmbedder, TokenEmbedder, steered
from scd.models.flow import CLEAN_TIME
from scd.models.kv_cache import KVCache
from scd.models.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the encoder knows about frames before they are denoised."""

    tokens: Float[Tensor, "b t n d"]
    """Context tokens of each frame to be denoised, one for each token of the frame."""
    norm_scale: Float[Tensor, "b t 1 d"]
    """Factor by which the last norm's output was scaled: noise enters before it."""

    def with_noise(self, strength: float, noise: Float[Tensor, "b t n d"]) -> Context:
        """Corrupt the context as if before the scale and shift of the last norm.

        Source: paper, equation 7.
        """
        return replace(self, tokens=self.tokens + strength * noise * self.norm_scale)

    def last(self, num_frames: int) -> Context:
        return Context(
            tokens=self.tokens[:, -num_frames:], norm_scale=self.norm_scale[:, -num_frames:]
        )


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
        super().__init__(shape, block)
        self.config = config
        self.embed_frame = TokenEmbedder(shape, block.width, block.learned_positions)
        self.embed_time = TimeEmbedder(block.width)
        self.embed_conditions = ConditionEmbedder(conditions, block.width)
        self.start = (
            nn.Parameter(torch.empty(shape.num_tokens, block.width)) if config.start_frame else None
        )
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.output_modulation = Modulation(block.width, 2) if config.modulate_output else None

    def initialise(self) -> None:
        if self.start is not None:
            nn.init.normal_(self.start, std=0.02)

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
        x = self._rows(clean[:, :-1], with_start=self.config.start_frame)
        num_rows = x.shape[1]
        if num_rows == 0:
            raise ValueError("an encoder without a start frame needs 2 or more frames, got 1")
        visible = None
        if num_rows > 1:
            visible = FrameCausal(num_frames=num_rows, tokens_per_frame=self.shape.num_tokens)
        embedding = self.embedding(x, conditions.frames(self.first_row + 1, None))
        rows = range(self.first_row, self.first_row + num_rows)
        return self.finished(self.run_masked(x, embedding, rows, visible), embedding)

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
        x = self._rows(clean, with_start=first_row == -1)
        rows = list(range(first_row, first_row + x.shape[1]))
        cache.make_room()
        embedding = self.embedding(x, upcoming)
        x = self.run_cached(cache, x, embedding, self.rotary(rows), rows)
        if keep:
            cache.advance(rows)
        return self.finished(x, embedding)

    def _rows(self, clean: Tensor, with_start: bool) -> Float[Tensor, "b t n d"]:
        tokens = self.embed_frame(clean)
        if with_start:
            assert self.start is not None
            start = self.start.to(tokens.dtype).expand(clean.shape[0], 1, -1, -1)
            tokens = torch.cat([start, tokens], dim=1)
        return tokens

    def embedding(self, x: Float[Tensor, "b t n d"], upcoming: Conditions) -> Tensor:
        """Embed what modulates rows of tokens: the time of clean frames, the action after each."""
        time = x.new_full(x.shape[:2], CLEAN_TIME, dtype=torch.float32)
        return steered(self.embed_time(time), self.embed_conditions(upcoming))

    def finished(self, x: Float[Tensor, "b t n d"], embedding: Tensor) -> Context:
        """Turn the last block's tokens into contexts."""
        x = layer_norm(x)
        if self.output_modulation is None:
            return Context(tokens=x, norm_scale=torch.ones_like(x[:, :, :1]))
        scale, shift = self.output_modulation(embedding)
        norm_scale = (1 + scale).expand_as(x[:, :, :1])
        return Context(tokens=x * (1 + scale) + shift, norm_scale=norm_scale)
