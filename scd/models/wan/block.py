"""Wan's transformer block under the names of diffusers' weights; what is read is passed in.

Source: paper, section 6.1; names as in diffusers' WanTransformer3DModel.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from scd.models.attention import Rotary, attend, join_heads, rotate, split_heads
from scd.models.block import Attend
from scd.models.wan.config import WanBlockConfig

KeysValues = tuple[Float[Tensor, "b k s e"], Float[Tensor, "b k s e"]]
"""Keys and values of some tokens."""

TextKeysValues = tuple[Float[Tensor, "b k l e"], Float[Tensor, "b k l e"]]
"""Keys and values of a text in one layer."""


class WanAttention(nn.Module):
    """Queries, keys and values, normalised over all heads together; and the way back."""

    def __init__(self, config: WanBlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.to_q = nn.Linear(config.width, config.width)
        self.to_k = nn.Linear(config.width, config.width)
        self.to_v = nn.Linear(config.width, config.width)
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])
        self.norm_q = nn.RMSNorm(config.width, config.eps)
        self.norm_k = nn.RMSNorm(config.width, config.eps)

    def queries(
        self, x: Float[Tensor, "b s d"], rotary: Rotary | None = None
    ) -> Float[Tensor, "b k s e"]:
        """Project tokens to queries, rotated if there are positions."""
        return self._placed(self.norm_q(self.to_q(x)), rotary)

    def keys_values(self, x: Float[Tensor, "b s d"], rotary: Rotary | None = None) -> KeysValues:
        """Project tokens to keys, rotated if there are positions, and to values."""
        k = self._placed(self.norm_k(self.to_k(x)), rotary)
        return k, split_heads(self.to_v(x), self.head_dim)

    def out(self, read: Float[Tensor, "b k s e"]) -> Float[Tensor, "b s d"]:
        """Project what was read back to the width of the model."""
        return self.to_out[0](join_heads(read))

    def _placed(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        heads = split_heads(x, self.head_dim)
        return heads if rotary is None else rotate(heads, rotary)


def _read_text(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    num_sharing = q.shape[0] // k.shape[0]
    queries = rearrange(q, "(b f) k s e -> b k (f s) e", f=num_sharing)
    return rearrange(attend(queries, k, v), "b k (f s) e -> (b f) k s e", f=num_sharing)


class WanRise(nn.Module):
    """Linear map and tanh-GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d2"]:
        """Map tokens."""
        return functional.gelu(self.proj(x), approximate="tanh")


class WanFeedForward(nn.Module):
    """The MLP; the middle place of its list has no weights, and is there for the names."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([WanRise(width, inner), nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Map tokens."""
        for layer in self.net:
            x = layer(x)
        return x


class WanBlock(nn.Module):
    """Self-attention, attention to the text, and an MLP.

    The first and the last stand behind a norm and a gate that the frame's time modulates; the text
    is read without gate or modulation.
    """

    def __init__(self, config: WanBlockConfig) -> None:
        super().__init__()
        self.attn1 = WanAttention(config)
        self.attn2 = WanAttention(config)
        self.norm2 = nn.LayerNorm(config.width, config.eps) if config.norm_before_text else None
        self.ffn = WanFeedForward(config.width, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.width) / config.width**0.5)
        self.eps = config.eps

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        modulation: Float[Tensor, "b t 6 d"],
        rotary: Rotary,
        read: Attend,
        text: tuple[Tensor, Tensor],
        num_read: int | None = None,
    ) -> Float[Tensor, "b t2 n d"]:
        """Run the block.

        Args:
            x: tokens of one or more frames.
            modulation: of each frame's time.
            rotary: positions of all t * n tokens.
            read: from rotated queries, keys and values to what is read.
            text: keys and values of the text, from `text_keys_values`; of fewer rows, where as many
                rows of x in a row share each.
            num_read: how many frames, the last ones, somebody will read; the others only give keys
                and values. None: all.
        """
        parts = self._parts(modulation)
        normed = self._modulated(x, parts[0], parts[1])
        k, v = self.attn1.keys_values(normed.flatten(1, 2), rotary)
        if num_read is not None:
            x, normed = x[:, -num_read:], normed[:, -num_read:]
            parts = [part[:, -num_read:] for part in parts]
            num_tokens = num_read * x.shape[2]
            rotary = rotary[0][-num_tokens:], rotary[1][-num_tokens:]
        q = self.attn1.queries(normed.flatten(1, 2), rotary)
        x = self._added(x, self.attn1.out(read(q, k, v)), parts[2])
        normed = x
        if self.norm2 is not None:
            weight, bias = self.norm2.weight, self.norm2.bias
            normed = self._normed(x.to(weight.dtype), weight, bias).to(x.dtype)
        q = self.attn2.queries(normed.flatten(1, 2))
        x = x + self.attn2.out(_read_text(q, *text)).view(x.shape)
        return self._added(x, self.ffn(self._modulated(x, parts[3], parts[4])), parts[5])

    def with_keys_values(
        self,
        x: Float[Tensor, "b t n d"],
        modulation: Float[Tensor, "b t 6 d"],
        rotary: Rotary,
        read: Attend,
        text: tuple[Tensor, Tensor],
    ) -> tuple[Float[Tensor, "b t n d"], Float[Tensor, "b k s e"], Float[Tensor, "b k s e"]]:
        """Run the block and return the keys and values of its tokens too, for others to read."""
        seen: list[KeysValues] = []

        def reading(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.append((k, v))
            return read(q, k, v)

        return self(x, modulation, rotary, reading, text), *seen[0]

    def keys_values(
        self, x: Float[Tensor, "b t n d"], modulation: Float[Tensor, "b t 6 d"], rotary: Rotary
    ) -> KeysValues:
        """Return only keys and values: all that others need of tokens whose output is not read."""
        shift, scale = self._parts(modulation)[:2]
        return self.attn1.keys_values(self._modulated(x, shift, scale).flatten(1, 2), rotary)

    def text_keys_values(self, text: Float[Tensor, "b l d"]) -> TextKeysValues:
        """Return keys and values of an embedded text, which serve all frames of a stream."""
        return self.attn2.keys_values(text)

    def _parts(self, modulation: Tensor) -> list[Tensor]:
        """Shift, scale and gate of attention, then of the MLP, [b t 1 d] each, in float32."""
        table = self.scale_shift_table.float() + modulation.float()
        return list(rearrange(table, "b t (parts one) d -> parts b t one d", one=1))

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (self._normed(x.float()) * (1 + scale) + shift).to(x.dtype)

    def _normed(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    @staticmethod
    def _added(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
        return (x.float() + change.view(x.shape).float() * gate).to(x.dtype)
