"""Frame decoder: a noisy frame, its time and its context to a velocity; it sees no other frame.

Source: paper (formulation, decoder). The join "prefix" is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.attention import attend
from scd.models.block import Block, with_keys_values
from scd.models.config import BlockConfig, DecoderConfig, FrameShape
from scd.models.embed import ConditionEmbedder, FrameHead, TimeEmbedder, TokenEmbedder, steered
from scd.models.flow import CLEAN_TIME
from scd.models.stack import Stack, attend_also


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All of a frame's context that does not change over its denoising steps."""

    tokens: Float[Tensor, "f 1 n d"]
    """Context tokens; f frames side by side, from any clips."""
    steering: Float[Tensor, "f 1 d"] | None
    """Embedded action and label of each frame."""
    keys_values: list[tuple[Float[Tensor, "f k n e"], Float[Tensor, "f k n e"]]]
    """Join "prefix": the context's keys and values in each layer; otherwise empty."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Prepared:
        return Prepared(
            tokens=change(self.tokens),
            steering=None if self.steering is None else change(self.steering),
            keys_values=[(change(k), change(v)) for k, v in self.keys_values],
        )

    def repeat(self, num: int) -> Prepared:
        """Repeat each frame `num` times in a row, for several noise draws of it."""
        return self if num == 1 else self.map(lambda part: part.repeat_interleave(num, 0))

    def concat(self, other: Prepared) -> Prepared:
        theirs = iter(other.parts())
        return self.map(lambda part: torch.cat([part, next(theirs)]))

    def parts(self) -> list[Tensor]:
        steering = [] if self.steering is None else [self.steering]
        return [self.tokens, *steering, *(part for pair in self.keys_values for part in pair)]


class FrameDecoder(Stack):
    """Transformer over one frame at a time: `prepare` its context once, `denoise` it many times."""

    def __init__(
        self,
        config: DecoderConfig,
        shape: FrameShape,
        block: BlockConfig,
        conditions: ConditionSpec,
    ) -> None:
        super().__init__(shape, block)
        self.config = config
        self.embed_frame = TokenEmbedder(shape, block.width, block.learned_positions)
        self.embed_time = TimeEmbedder(block.width)
        self.embed_conditions = ConditionEmbedder(conditions, block.width)
        if config.join == "channel_concat":
            self.merge = nn.Linear(2 * block.width, block.width)
        if config.join == "token_concat_projected":
            self.align_norm = nn.LayerNorm(block.width)
            self.align = nn.Linear(block.width, block.width)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.head = FrameHead(shape, block.width, config.predict)

    def initialise(self) -> None:
        """Let the join begin as a sum, or without the context. Source: paper (decoder)."""
        if self.config.join == "channel_concat":
            identity = torch.eye(self.block.width)
            self.merge.weight.data.copy_(torch.cat([identity, identity], dim=1))
        if self.config.join == "token_concat_projected":
            nn.init.zeros_(self.align.weight)

    def prepare(self, context: Float[Tensor, "f n d"], conditions: Conditions) -> Prepared:
        """Do all that is the same for every step of a frame.

        Args:
            context: of f frames, side by side.
            conditions: of the same frames, as f clips of one frame.
        """
        x = context[:, None]
        steering = self.embed_conditions(conditions)
        if self.config.join == "token_concat_projected":
            x = self.align(self.align_norm(x))
        prepared = Prepared(tokens=x, steering=steering, keys_values=[])
        if self.config.join == "prefix":
            time = x.new_full(x.shape[:2], CLEAN_TIME).float()
            inputs = (steered(self.embed_time(time), steering), self.rotary([0]))
            *blocks, last = self.blocks
            for block in blocks:
                x, k, v = self.run_block(with_keys_values, block, x, *inputs, attend)
                prepared.keys_values.append((k, v))
            prepared.keys_values.append(last.keys_values(x, *inputs))  # type: ignore[operator]
        return prepared

    def denoise(
        self,
        prepared: Prepared,
        noisy: Float[Tensor, "f c h w"],
        time: Float[Tensor, " f"],
        ticks: Float[Tensor, " f"] | None = None,
    ) -> Float[Tensor, "f c h w"]:
        """Return the velocity of each noisy frame, towards noise.

        Args:
            prepared: context of the same f frames.
            noisy: latent frames at `time`.
            time: 0 clean to 1 noise.
            ticks: as TimeEmbedder takes them.
        """
        embedded = self.embed_time(time[:, None], None if ticks is None else ticks[:, None])
        embedding = steered(embedded, prepared.steering)
        # Within one frame only differences of positions matter, so every frame is frame 0.
        rotary = self.rotary([0])
        x = self.embed_frame(noisy[:, None])
        join = self.config.join
        if join in ("token_concat", "token_concat_projected"):
            # Both halves have the same places: rotary positions and time do not tell them apart.
            x = torch.cat([prepared.tokens.to(x.dtype), x], dim=2)
            rotary = rotary[0].repeat(2, 1), rotary[1].repeat(2, 1)
        elif join == "channel_concat":
            x = self.merge(torch.cat([x, prepared.tokens], dim=-1))
        elif join == "add":
            x = x + prepared.tokens
        for layer, block in enumerate(self.blocks):
            read = attend_also(*prepared.keys_values[layer]) if join == "prefix" else attend
            # Nobody reads the context's half after the last block.
            num_read = self.shape.num_tokens if layer == len(self.blocks) - 1 else None
            x = self.run_block(block, x, embedding, rotary, read, num_read)
        return self.head(x, embedding, noisy[:, None], time[:, None])[:, 0]
