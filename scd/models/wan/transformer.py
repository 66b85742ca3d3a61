"""Wan's transformer under the names of diffusers' weights, and the text that a stream keeps.

Names as in diffusers' WanTransformer3DModel. Source: paper (composition, teacher forcing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from scd.common.runtime import finest
from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.attention import Rotary, attend, join_heads, rotate, split_heads
from scd.models.base import State
from scd.models.block import Attend
from scd.models.config import FrameShape
from scd.models.embed import ConditionEmbedder, steered, to_patches
from scd.models.stack import Stack
from scd.models.wan.config import WanBlockConfig

KeysValues = tuple[Float[Tensor, "b k s e"], Float[Tensor, "b k s e"]]
"""Keys and values of some tokens."""

TextKeysValues = tuple[Float[Tensor, "_ k _ e"], Float[Tensor, "_ k _ e"]]
"""Keys and values of a text in one layer."""


@runtime_checkable
class ReadsText(Protocol):
    """A stack of layers that look at a text."""

    def text_keys_values(self, text: Tensor) -> list[TextKeysValues]:
        """Return keys and values of an embedded text [b l c] in every layer."""
        ...


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
        return self.to_out[0](join_heads(read))

    def _placed(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        heads = split_heads(x, self.head_dim)
        return heads if rotary is None else rotate(heads, rotary)


def _read_text(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    num_sharing = q.shape[0] // k.shape[0]
    queries = rearrange(q, "(b f) k s e -> b k (f s) e", f=num_sharing)
    return rearrange(attend(queries, k, v), "b k (f s) e -> (b f) k s e", f=num_sharing)


class WanUp(nn.Module):
    """Linear map and tanh-GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d2"]:
        return functional.gelu(self.proj(x), approximate="tanh")


class WanFeedForward(nn.Module):
    """The MLP; the middle place of its list has no weights, and is there for the names."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([WanUp(width, inner), nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
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


TIME_SCALE = 1000
"""What Wan multiplies times by."""


class TwoMaps(nn.Module):
    """Two linear maps with a nonlinearity between, under the names of diffusers' embedders."""

    def __init__(self, first: int, width: int, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(first, width)
        self.linear_2 = nn.Linear(width, width)
        self.between = between

    def forward(self, x: Float[Tensor, "*b p"]) -> Float[Tensor, "*b d"]:
        return self.linear_2(self.between(self.linear_1(x)))


def _tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTION_WIDTH = 64
"""Entries into which an action of a frame of video is embedded before those of a latent frame are
pooled."""


class WanActions(nn.Module):
    """Actions of a latent frame to what is added to its embedded time (ours; not in Wan).

    Each of its frames of video has an action, which is embedded as small models do it; two linear
    maps pool them. The last one starts at zero: the model then makes the video of its text alone.
    """

    def __init__(self, spec: ConditionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.embed = ConditionEmbedder(spec.of_actions, ACTION_WIDTH)
        self.pool = TwoMaps(spec.actions_per_frame * ACTION_WIDTH, width, functional.silu)
        self.initialise()

    def initialise(self) -> None:
        """Set the initial weights of what Wan does not have."""
        for name, weight in self.embed.named_parameters():
            if "null" in name:
                nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.pool.linear_2.weight)
        nn.init.zeros_(self.pool.linear_2.bias)

    def forward(self, conditions: Conditions) -> Float[Tensor, "b t d"]:
        """Embed the actions of latent frames (ValueError: there are none)."""
        if conditions.actions is None:
            raise ValueError("this model is steered by actions, but none were given")
        num, per_frame = conditions.actions.shape[1], self.spec.actions_per_frame
        flat = conditions
        if per_frame > 1:
            # What is hidden is hidden of all actions of a latent frame.
            flat = replace(
                conditions,
                actions=conditions.actions.flatten(1, 2),
                **{
                    name: mask.repeat_interleave(per_frame, 1)
                    for name in ("null_actions", "null_parts")
                    if (mask := getattr(conditions, name)) is not None
                },
            )
        embedded = self.embed(flat)
        assert embedded is not None
        grouped = embedded.unflatten(1, (num, per_frame)).flatten(2)
        return self.pool(grouped.to(self.pool.linear_1.weight.dtype))


class WanEmbedder(nn.Module):
    """Times, text and actions to vectors; `time_proj` makes the modulation that blocks share."""

    def __init__(self, block: WanBlockConfig, conditions: ConditionSpec) -> None:
        super().__init__()
        self.time_embedder = TwoMaps(block.freq_dim, block.width, functional.silu)
        self.time_proj = nn.Linear(block.width, 6 * block.width)
        self.text_embedder = TwoMaps(conditions.text_dim, block.width, _tanh_gelu)
        self.action_embedder = (
            WanActions(conditions, block.width) if conditions.has_actions else None
        )
        self.num_sinusoids = block.freq_dim // 2

    def steering(self, conditions: Conditions) -> Float[Tensor, "b t d"] | None:
        """Embed the actions of frames; None: no actions steer this model."""
        return None if self.action_embedder is None else self.action_embedder(conditions)

    def times(
        self, time: Float[Tensor, "b t"], steering: Float[Tensor, "#b #t d"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t 6 d"]]:
        """Embed times, and what steers their frames: for the head, and for the blocks."""
        # diffusers may keep this part, norms and tables in more digits than the rest.
        sinusoids = time_sinusoids(time, self.num_sinusoids)
        embedding = self.time_embedder(sinusoids.to(self.time_embedder.linear_1.weight.dtype))
        embedding = steered(embedding.to(self.time_proj.weight.dtype), steering)
        modulation = self.time_proj(functional.silu(embedding))
        return embedding, rearrange(modulation, "b t (parts d) -> b t parts d", parts=6)


def time_sinusoids(time: Float[Tensor, "*b"], num: int) -> Float[Tensor, "*b features"]:
    """Return cosines, then sines, of 1000 * time at `num` frequencies from 1 towards 1e-4.

    In float64, as in the original; diffusers' float32 ones differ by 3e-5 in what the model
    returns. Times below 0, by which other models mark clean frames, count as 0.
    """
    ticks = TIME_SCALE * time.to(finest(time.device)).clamp(min=0)
    steps = torch.arange(num, device=time.device, dtype=finest(time.device))
    angles = ticks[..., None] * 1e4 ** (-steps / num)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class WanTransformer(Stack):
    """Embedders and blocks, and the head if there is one, named as in WanTransformer3DModel."""

    recomputes_streams = True

    def __init__(
        self,
        shape: FrameShape,
        block: WanBlockConfig,
        conditions: ConditionSpec,
        num_layers: int,
        has_head: bool = True,
    ) -> None:
        Stack.__init__(self, shape, block)
        patch = (1, shape.patch_size, shape.patch_size)
        self.patch_embedding = nn.Conv3d(shape.channels, block.width, patch, patch)
        self.condition_embedder = WanEmbedder(block, conditions)
        self.blocks = nn.ModuleList(WanBlock(block) for _ in range(num_layers))
        if has_head:
            self.proj_out = nn.Linear(block.width, shape.token_dim)
            table = torch.randn(1, 2, block.width) / block.width**0.5
            self.scale_shift_table = nn.Parameter(table)

    @property
    def like(self) -> Tensor:
        return self.patch_embedding.weight

    def tokens(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t n d"]:
        """Cut frames into tokens: the convolution of patches, which do not overlap, as one map."""
        weight = self.patch_embedding.weight
        patches = to_patches(frames.to(weight.dtype), self.shape.patch_size)
        return functional.linear(patches, weight.flatten(1), self.patch_embedding.bias)

    def text_keys_values(self, text: Float[Tensor, "b l c"]) -> list[TextKeysValues]:
        """Embed a text and return its keys and values in every layer; padding counts as text."""
        weight = self.condition_embedder.time_proj.weight
        words = self.condition_embedder.text_embedder(text.to(weight.dtype))
        return [block.text_keys_values(words) for block in self.blocks]  # type: ignore[operator]

    def head(
        self, x: Float[Tensor, "b t n d"], embedding: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t c h w"]:
        table = self.scale_shift_table.float() + embedding.float()[:, :, None]
        shift, scale = rearrange(table, "b t (parts one) d -> parts b t one d", one=1)
        normed = functional.layer_norm(x.float(), x.shape[-1:], eps=self.block.eps)
        patches = self.proj_out((normed * (1 + scale) + shift).to(x.dtype))
        # The channel stands last within a patch here, and first in `tokens`.
        return rearrange(
            patches,
            "b t (rows columns) (p q c) -> b t c (rows p) (columns q)",
            rows=self.shape.rows,
            p=self.shape.patch_size,
            q=self.shape.patch_size,
        )


@dataclass(frozen=True, kw_only=True)
class TextCache:
    """Keys and values of the text of each stream."""

    text: Tensor
    """Embedded text, [b l c]."""
    layers: list[TextKeysValues]
    """Of each layer, of all parts."""
    carries_gradient: bool
    """Whether gradient reaches the weights that made them."""

    def serves(self, text: Tensor) -> bool:
        """Tell whether this is the cache of a text, with gradient where it is asked for."""
        if torch.is_grad_enabled() and not self.carries_gradient:
            return False
        # The same tensor comes every frame; only another one has to be looked at.
        return text is self.text or (text.shape == self.text.shape and torch.equal(text, self.text))


def text_of(conditions: Conditions, batch: int) -> Tensor:
    """Return the text of a batch of streams.

    Raises:
        ValueError: there is none, or of another number of streams.
    """
    if conditions.text is None:
        raise ValueError("a Wan model is steered by an embedded text, but none was given")
    if conditions.text.shape[0] != batch:
        raise ValueError(f"{batch} streams need as many texts, got {conditions.text.shape[0]}")
    return conditions.text


@dataclass(kw_only=True)
class WanState(State):
    """A batch of streams: the cached clean frames, and the text that holds now."""

    text: TextCache | None = None
    """Keys and values of the text; None: no frame has asked for it."""

    def fork(self, num: int = 1) -> WanState:
        twin = super().fork(num)
        if num > 1:
            # Of fewer streams; the next frame makes it anew.
            twin.text = None
        return twin


def text_in(state: WanState, conditions: Conditions, *parts: ReadsText) -> list[TextKeysValues]:
    """Return keys and values of a text in all layers of some parts, kept while it is the same.

    Raises:
        ValueError: there is no text, or of another number of streams.
    """
    text = text_of(conditions, state.cache.batch)
    if state.text is None or not state.text.serves(text):
        state.text = TextCache(
            text=text,
            layers=[layer for part in parts for layer in part.text_keys_values(text)],
            carries_gradient=torch.is_grad_enabled(),
        )
    return state.text.layers
