"""Frame decoder: a noisy frame, its time and its context to a velocity; it sees no other frame.

Source: paper, sections 1.1 and 1.4. The join "prefix" is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.data.clip import Conditions, ConditionSpec
from scd.models.attention import Rotary, attend, frame_positions, rotary_table
from scd.models.block import Block, BlockConfig, Stack
from scd.models.embed import (
    ConditionEmbedder,
    FrameHead,
    FrameShape,
    Prediction,
    TimeEmbedder,
    TokenEmbedder,
)
from scd.models.flow import CLEAN_TIME

Join = Literal["token_concat", "token_concat_projected", "channel_concat", "add", "prefix"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of the frame decoder."""

    num_layers: int = 2
    """Transformer blocks."""
    join: Join = "token_concat"
    """How the context meets the noisy frame: as more tokens in one sequence (the paper's); the
    same after a projection that starts at zero; one linear map of both side by side; a sum; or
    (ours) as a prefix that attends only to itself and does not know the time, so that its keys and
    values are computed once per frame and a step costs only the noisy tokens."""
    predict: Prediction = "velocity"
    """What the network's output means; it is turned into a velocity either way. Prefer "clean"
    where a token has more values than the model is wide, as with pixels."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be 1 or more, got {self.num_layers}")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All of a frame's context that does not change over its denoising steps."""

    tokens: Float[Tensor, "f 1 n d"]
    """Context tokens; f frames side by side, from any clips."""
    steering: Float[Tensor, "f 1 d"] | None
    """Embedded action and label of each frame."""
    keys_values: list[tuple[Float[Tensor, "f k n e"], Float[Tensor, "f k n e"]]]
    """Join "prefix": the context's keys and values in each layer; otherwise empty."""

    def repeat(self, num: int) -> Prepared:
        """Repeat each frame `num` times in a row, for several noise draws of it."""
        if num == 1:
            return self
        return Prepared(
            tokens=self.tokens.repeat_interleave(num, 0),
            steering=None if self.steering is None else self.steering.repeat_interleave(num, 0),
            keys_values=[
                (k.repeat_interleave(num, 0), v.repeat_interleave(num, 0))
                for k, v in self.keys_values
            ],
        )

    def concat(self, other: Prepared) -> Prepared:
        """Put other frames behind these."""
        steering = None
        if self.steering is not None and other.steering is not None:
            steering = torch.cat([self.steering, other.steering])
        return Prepared(
            tokens=torch.cat([self.tokens, other.tokens]),
            steering=steering,
            keys_values=[
                (torch.cat([mine[0], theirs[0]]), torch.cat([mine[1], theirs[1]]))
                for mine, theirs in zip(self.keys_values, other.keys_values, strict=True)
            ],
        )


class FrameDecoder(Stack):
    """Transformer over one frame at a time: `prepare` its context once, `denoise` it many times."""

    def __init__(
        self,
        config: DecoderConfig,
        shape: FrameShape,
        block: BlockConfig,
        conditions: ConditionSpec,
    ) -> None:
        super().__init__()
        self.config, self.shape, self.block = config, shape, block
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

    def prepare(self, context: Float[Tensor, "f n d"], conditions: Conditions) -> Prepared:
        """Do all that is the same for every step of a frame.

        Args:
            context: of f frames, side by side.
            conditions: of the same frames, as f clips of one frame.
        """
        tokens = context[:, None]
        steering = self.embed_conditions(conditions)
        if self.config.join == "token_concat_projected":
            tokens = self.align(self.align_norm(tokens))
        keys_values = []
        if self.config.join == "prefix":
            embedding = self.embed_time(tokens.new_full(tokens.shape[:2], CLEAN_TIME).float())
            embedding = embedding if steering is None else embedding + steering
            rotary = self._rotary(tokens.device)
            x = tokens
            for block in self.blocks:
                assert isinstance(block, Block)
                if block is self.blocks[-1]:
                    keys_values.append(block.keys_values(x, embedding, rotary))
                    break
                x, k, v = self.run(block.with_keys_values, x, embedding, rotary, attend)
                keys_values.append((k, v))
        return Prepared(tokens=tokens, steering=steering, keys_values=keys_values)

    def denoise(
        self,
        prepared: Prepared,
        noisy: Float[Tensor, "f c h w"],
        time: Float[Tensor, " f"],
    ) -> Float[Tensor, "f c h w"]:
        """Return the velocity of each noisy frame, towards noise.

        Args:
            prepared: context of the same f frames.
            noisy: latent frames at `time`.
            time: 0 clean to 1 noise.
        """
        embedding = self.embed_time(time[:, None])
        if prepared.steering is not None:
            embedding = embedding + prepared.steering
        rotary = self._rotary(noisy.device)
        x = self.embed_frame(noisy[:, None])
        join, num_tokens = self.config.join, self.shape.num_tokens
        if join in ("token_concat", "token_concat_projected"):
            # Both halves have the same places: rotary positions and time do not tell them apart.
            x = torch.cat([prepared.tokens.to(x.dtype), x], dim=2)
            rotary = rotary[0].repeat(2, 1), rotary[1].repeat(2, 1)
        elif join == "channel_concat":
            x = self.merge(torch.cat([x, prepared.tokens], dim=-1))
        elif join == "add":
            x = x + prepared.tokens
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            read = _with_prefix(*prepared.keys_values[layer]) if join == "prefix" else attend
            # Nobody reads the context's half after the last block.
            num_read = num_tokens if last else None
            x = self.run(block, x, embedding, rotary, read, num_read)
        return self.head(x, embedding, noisy[:, None], time[:, None])[:, 0]

    def _rotary(self, device: torch.device) -> Rotary:
        # Within one frame only differences of positions matter, so every frame is frame 0.
        frame = torch.zeros(1, dtype=torch.long, device=device)
        positions = frame_positions(frame, self.shape.rows, self.shape.columns)
        return rotary_table(positions, self.block.rotary_axes, self.block.rotary_theta)


def _with_prefix(keys: Tensor, values: Tensor):
    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(
            q,
            torch.cat([keys.to(k.dtype), k], dim=2),
            torch.cat([values.to(v.dtype), v], dim=2),
        )

    return read
