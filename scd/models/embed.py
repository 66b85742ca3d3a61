"""What turns frames, times and conditions into the input of a model, and tokens back into frames.

Source: paper (block).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from scd.common.runtime import finest
from scd.data.clip import Conditions
from scd.data.spaces import ActionPart, ConditionSpec
from scd.models.block import Block, Modulation, layer_norm
from scd.models.config import BlockConfig, FrameShape, Prediction
from scd.models.flow import velocity_from_clean

Field = Callable[[Tensor, Tensor], Tensor]
"""From noisy frames [b r m c h w] and the time of each [b r m] to their velocity."""


def to_patches(frames: Float[Tensor, "*b c h w"], patch_size: int) -> Float[Tensor, "*b n p"]:
    """Cut frames into square patches, row by row, each as one vector."""
    return rearrange(
        frames,
        "... c (rows p) (columns q) -> ... (rows columns) (c p q)",
        p=patch_size,
        q=patch_size,
    )


def from_patches(patches: Float[Tensor, "*b n p"], shape: FrameShape) -> Float[Tensor, "*b c h w"]:
    return rearrange(
        patches,
        "... (rows columns) (c p q) -> ... c (rows p) (columns q)",
        rows=shape.rows,
        c=shape.channels,
        p=shape.patch_size,
    )


class TokenEmbedder(nn.Module):
    """Frames to tokens: cut into patches, one linear map."""

    def __init__(self, shape: FrameShape, width: int, learned_positions: bool) -> None:
        super().__init__()
        self.patch_size = shape.patch_size
        self.project = nn.Linear(shape.token_dim, width)
        self.positions = (
            nn.Parameter(torch.empty(shape.num_tokens, width)) if learned_positions else None
        )

    def forward(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t n d"]:
        tokens = self.project(to_patches(frames, self.patch_size))
        return tokens if self.positions is None else tokens + self.positions


class TimeEmbedder(nn.Module):
    """Time of a frame to a vector: 256 sinusoids of 1000 * time, then two linear maps."""

    NUM_SINUSOIDS = 128
    """Each gives a cosine and a sine."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rise = nn.Linear(2 * self.NUM_SINUSOIDS, width)
        self.mix = nn.Linear(width, width)

    def forward(
        self, time: Float[Tensor, "b t"], ticks: Float[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Embed times; float64 times keep the digits that float32 has not.

        Args:
            time: 0 clean to 1 noise.
            ticks: what `ticks_of` returns of them, where float64 cannot be had; None: it is done.
        """
        ticks = ticks_of(time) if ticks is None else ticks
        sinusoids = time_sinusoids(ticks, self.NUM_SINUSOIDS).to(self.rise.weight.dtype)
        return self.mix(functional.silu(self.rise(sinusoids)))


def ticks_of(time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Return 1000 * time in float32."""
    # Times written in float32 are off by 3e-5 of a tick, which the first sinusoid shows. From the
    # tick on, float32 as in the release, whose weights have learnt it.
    return (1000 * time.to(finest(time.device))).float()


def time_sinusoids(ticks: Float[Tensor, "*b"], num: int) -> Float[Tensor, "*b features"]:
    """Return cosines, then sines, of ticks at `num` frequencies from 1 down to 1e-4.

    Source: the release; the last frequency is 1e-4 itself (num - 1 steps, not num).
    """
    steps = torch.arange(num, device=ticks.device, dtype=torch.float32)
    angles = ticks[..., None] * torch.exp(-math.log(1e4) * steps / (num - 1))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ConditionEmbedder(nn.Module):
    """Actions and labels to a vector per frame; hidden ones become a learned null vector."""

    def __init__(self, spec: ConditionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.width = width
        if spec.num_actions:
            self.actions = nn.Embedding(spec.num_actions + 1, width)
        if spec.is_composite:
            self.parts = nn.ModuleList([PartEmbedder(part, width) for part in spec.action_parts])
        elif spec.action_dim:
            self.project = nn.Linear(spec.action_dim, width)
            self.null_action = nn.Parameter(torch.empty(width))
        if spec.num_labels:
            self.labels = nn.Embedding(spec.num_labels + 1, width)

    def forward(self, conditions: Conditions) -> Float[Tensor, "b t d"] | None:
        """Embed what steers each frame; None if nothing does."""
        embedded = None
        actions, hidden = conditions.actions, conditions.null_actions
        if self.spec.num_actions:
            assert actions is not None
            if hidden is not None:
                actions = torch.where(hidden, self.spec.num_actions, actions)
            embedded = self.actions(actions)
        if self.spec.is_composite:
            assert actions is not None
            embedded = self._parts(actions, hidden, conditions.null_parts)
        elif self.spec.action_dim:
            assert actions is not None
            embedded = self.project(actions.to(self.project.weight.dtype))
            if hidden is not None:
                embedded = torch.where(hidden[..., None], self.null_action, embedded)
        if self.spec.num_labels:
            labels, hidden = conditions.labels, conditions.null_labels
            assert labels is not None
            if hidden is not None:
                labels = torch.where(hidden, self.spec.num_labels, labels)
            label = self.labels(labels)[:, None]
            embedded = label if embedded is None else embedded + label
        return embedded

    def _parts(
        self, actions: Tensor, hidden: Tensor | None, hidden_parts: Tensor | None
    ) -> Float[Tensor, "b t d"]:
        """Sum the embeddings of an action's parts, each by itself seen or hidden."""
        embedded, values = [], actions.split([part.size for part in self.spec.action_parts], -1)
        for place, (part, entries) in enumerate(zip(self.parts, values, strict=True)):
            unseen = hidden
            if hidden_parts is not None:
                alone = hidden_parts[..., place]
                unseen = alone if hidden is None else hidden | alone
            embedded.append(part(entries, unseen))
        return torch.stack(embedded).sum(0)


class PartEmbedder(nn.Module):
    """One part of an action to a vector: choices by a table, keys and values by a linear map.

    Embeddings of several choices are summed; a hidden part becomes a learned null vector.
    """

    def __init__(self, part: ActionPart, width: int) -> None:
        super().__init__()
        self.firsts = [sum(part.choices[:place]) for place in range(len(part.choices))]
        if part.choices:
            self.table = nn.Embedding(sum(part.choices), width)
        else:
            self.project = nn.Linear(part.size, width)
        self.null = nn.Parameter(torch.empty(width))

    def initialise(self) -> None:
        """Set the null vector's initial weights."""
        nn.init.normal_(self.null, std=0.02)

    def forward(
        self, entries: Float[Tensor, "b t part"], hidden: Bool[Tensor, "b t"] | None
    ) -> Float[Tensor, "b t d"]:
        """Embed a part's entries of the vector of actions."""
        if self.firsts:
            rows = entries.long().unbind(-1)
            chosen = [self.table(row + first) for row, first in zip(rows, self.firsts, strict=True)]
            embedded = chosen[0] if len(chosen) == 1 else torch.stack(chosen).sum(0)
        else:
            embedded = self.project(entries.to(self.project.weight.dtype))
        return embedded if hidden is None else torch.where(hidden[..., None], self.null, embedded)


def steered(
    embedding: Float[Tensor, "b t d"], steering: Float[Tensor, "#b #t d"] | None
) -> Float[Tensor, "b t d"]:
    """Add to the embedded time of frames what steers them, if anything does."""
    return embedding if steering is None else embedding + steering


class FrameHead(nn.Module):
    """Tokens back to a frame: modulated norm, one linear map, patches in their places."""

    def __init__(self, shape: FrameShape, width: int, predict: Prediction) -> None:
        super().__init__()
        self.shape = shape
        self.predict: Prediction = predict
        self.modulation = Modulation(width, 2)
        self.project = nn.Linear(width, shape.token_dim)

    def forward(
        self,
        x: Float[Tensor, "b t n d"],
        embedding: Float[Tensor, "b t d"],
        noisy: Float[Tensor, "b t c h w"],
        time: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b t c h w"]:
        scale, shift = self.modulation(embedding)
        patches = self.project(layer_norm(x) * (1 + scale) + shift)
        output = from_patches(patches, self.shape)
        if self.predict == "velocity":
            return output
        return velocity_from_clean(noisy, output, time)


def initialise(module: nn.Module, config: BlockConfig) -> None:
    """Set the initial weights of a model.

    Linear maps Xavier-uniform with zero bias; tables, time embedding and learned positions normal
    with deviation 0.02 (tables: as configured); modulations zero but for the gates' bias; heads
    zero; what a part of its own kind needs by its `initialise`.
    Source: paper (block).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=config.initial_condition_std)
    for part in module.modules():
        if isinstance(part, TimeEmbedder):
            nn.init.normal_(part.rise.weight, std=0.02)
            nn.init.normal_(part.mix.weight, std=0.02)
        if isinstance(part, Modulation):
            nn.init.zeros_(part.linear.weight)
            nn.init.zeros_(part.linear.bias)
    for part in module.modules():
        if isinstance(part, Block):
            for modulation in (part.attention_modulation, part.mlp_modulation):
                modulation.linear.bias.data.chunk(3)[2].fill_(config.initial_gate)
        if isinstance(part, TokenEmbedder) and part.positions is not None:
            nn.init.normal_(part.positions, std=0.02)
        if isinstance(part, ConditionEmbedder) and hasattr(part, "null_action"):
            nn.init.normal_(part.null_action, std=0.02)
        if isinstance(part, FrameHead):
            nn.init.zeros_(part.project.weight)
        if own := getattr(part, "initialise", None):
            own()
