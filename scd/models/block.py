"""The modulated transformer block of which encoder, decoder and dense baseline are made.

Source: paper (block).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from scd.models.attention import Rotary, join_heads, rotate, split_heads
from scd.models.config import BlockConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values [b k s e] of a block to what its tokens read [b k s e]."""

LAYER_NORM_EPS = 1e-6
"""Source: the release."""


class Modulation(nn.Module):
    """Embedding of a frame to scales and shifts of its tokens; starts as no change."""

    def __init__(self, width: int, num_parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_parts * width)
        self.num_parts = num_parts

    def forward(self, embedding: Float[Tensor, "b t d"]) -> tuple[Tensor, ...]:
        """Return the parts, each [b t 1 d]: one value for all tokens of a frame."""
        parts = self.linear(functional.silu(embedding))[:, :, None]
        return parts.chunk(self.num_parts, dim=-1)


def layer_norm(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Normalise each token, without learned scale or shift."""
    return functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


class SelfAttention(nn.Module):
    """Queries, keys and values of a block, normalised per head and rotated; and the way back."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.to_q = nn.Linear(config.width, config.width)
        self.to_k = nn.Linear(config.width, config.width)
        self.to_v = nn.Linear(config.width, config.width)
        self.to_out = nn.Linear(config.width, config.width)
        self.q_norm = nn.Parameter(torch.ones(config.head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.head_dim))

    def queries(self, x: Tensor, rotary: Rotary) -> Float[Tensor, "b k s e"]:
        q = split_heads(self.to_q(x), self.head_dim)
        return rotate(self._normalise(q, self.q_norm), rotary)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Project tokens [b s d] to rotated keys and to values."""
        k = split_heads(self.to_k(x), self.head_dim)
        v = split_heads(self.to_v(x), self.head_dim)
        return rotate(self._normalise(k, self.k_norm), rotary), v

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        # A weight of another type than x would push the result, and attention, out of bfloat16.
        return functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps=LAYER_NORM_EPS)


class Block(nn.Module):
    """Self-attention and MLP, each behind a modulated norm and a modulated gate.

    What the tokens attend to is the caller's `attend`: its own sequence, a cache, a prefix.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attention_modulation = Modulation(config.width, 3)
        self.attention = SelfAttention(config)
        self.mlp_modulation = Modulation(config.width, 3)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        embedding: Float[Tensor, "b t d"],
        rotary: Rotary,
        attend: Attend,
        num_read: int | None = None,
    ) -> Float[Tensor, "b t n2 d"]:
        """Run the block.

        Args:
            x: tokens of one or more frames.
            embedding: of each frame's time and conditions.
            rotary: positions of all t * n tokens.
            attend: from rotated queries, keys and values to what is read.
            num_read: how many tokens of each frame, its last ones, somebody will read; the rest
                only gives keys and values (t must be 1). None: all.
        """
        shift, scale, gate = self.attention_modulation(embedding)
        normed = layer_norm(x) * (1 + scale) + shift
        k, v = self.attention.keys_values(normed.flatten(1, 2), rotary)
        if num_read is not None:
            x, normed = x[:, :, -num_read:], normed[:, :, -num_read:]
            rotary = rotary[0][-num_read:], rotary[1][-num_read:]
        q = self.attention.queries(normed.flatten(1, 2), rotary)
        read = self.attention.to_out(join_heads(attend(q, k, v)))
        x = x + gate * read.view(x.shape)
        shift, scale, gate = self.mlp_modulation(embedding)
        return x + gate * self.mlp(layer_norm(x) * (1 + scale) + shift)

    def keys_values(
        self, x: Float[Tensor, "b t n d"], embedding: Float[Tensor, "b t d"], rotary: Rotary
    ) -> tuple[Float[Tensor, "b k s e"], Float[Tensor, "b k s e"]]:
        """Return only keys and values: all that others need of tokens whose output is not read."""
        shift, scale, _ = self.attention_modulation(embedding)
        return self.attention.keys_values(
            (layer_norm(x) * (1 + scale) + shift).flatten(1, 2), rotary
        )


def with_keys_values(
    block: Callable[..., Tensor],
    x: Float[Tensor, "b t n d"],
    embedding: Tensor,
    rotary: Rotary,
    read: Attend,
    *text: tuple[Tensor, Tensor],
) -> tuple[Float[Tensor, "b t n d"], Float[Tensor, "b k s e"], Float[Tensor, "b k s e"]]:
    """Run any block and return the keys and values of its tokens too, for others to read."""
    seen: list[tuple[Tensor, Tensor]] = []

    def reading(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((k, v))
        return read(q, k, v)

    return block(x, embedding, rotary, reading, *text), *seen[0]
