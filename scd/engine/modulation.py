"""All modulations of a stack of blocks, computed once per condition and time and kept.

A frame's modulation follows from its time and what steers it alone. So one matrix product gives
those of all blocks at all times of a schedule, and where actions and labels are discrete the result
is a table that serves every later frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scd.common.runtime import finest
from scd.data.clip import Conditions
from scd.engine.layers import PackedLinear, release
from scd.models.block import Block, Modulation
from scd.models.embed import ConditionEmbedder, TimeEmbedder

TABLE_BYTES = 64 * 2**20
"""Largest table of modulations of one schedule; above, they are computed at every frame."""

SCHEDULES = 8
"""Schedules for which something is kept, those made last."""


Schedule = tuple[float, ...]
"""Times of the steps of a frame."""


def kept_for(
    schedule: Schedule, kept: dict[Schedule, Tensor], make: Callable[[], Tensor]
) -> Tensor:
    """Return what is kept for a schedule, made if it is not there; the oldest makes room."""
    if schedule not in kept:
        if len(kept) >= SCHEDULES:
            kept.pop(next(iter(kept)))
        kept[schedule] = make()
    return kept[schedule]


class Modulations:
    """Modulations of a stack of blocks and of the norm after it: [parts d] per time and condition.

    Parts: of each block shift, 1 + scale, gate of attention, the same of its MLP; then of the norm
    after the last block 1 + scale and shift, where there is one.
    """

    def __init__(
        self,
        embed_time: TimeEmbedder,
        embed_conditions: ConditionEmbedder,
        blocks: Sequence[Block],
        last: Modulation | None,
        free: bool,
    ) -> None:
        """Stack the linear maps.

        Args:
            embed_time: of the stack.
            embed_conditions: of the stack.
            blocks: plain ones.
            last: of the norm after them; None: it has none.
            free: give up the plain modulations' weights.
        """
        self.embed_time, self.embed_conditions = embed_time, embed_conditions
        pairs = [(block.attention_modulation, block.mlp_modulation) for block in blocks]
        modulations = [one for pair in pairs for one in pair]
        layers = [modulation.linear for modulation in modulations + ([last] if last else [])]
        # (shift, scale, gate) of the halves of blocks, (scale, shift) of the last norm.
        scales = [1] * len(modulations) + ([0] if last else [])
        self.width = layers[0].in_features
        self.num_parts = sum(layer.out_features for layer in layers) // self.width
        # One product each, not one for all: stacking them would hold all weights twice for a while.
        self.linears = [
            _one_plus_scale(layer, part) for layer, part in zip(layers, scales, strict=True)
        ]
        like = self.linears[0].bias
        self.device, self.dtype = like.device, like.dtype
        if free:
            for layer in layers:
                release(layer)
        spec = embed_conditions.spec
        self._num_choices = 0 if spec.action_dim else (spec.num_actions + 1) * (spec.num_labels + 1)
        self._tables: dict[Schedule, Tensor] = {}
        self._times: dict[Schedule, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        kept = [*self._tables.values(), *self._times.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def at(self, times: Sequence[float], conditions: Conditions) -> Tensor:
        """Return the modulations at each time, [times r parts d].

        Args:
            times: of the steps.
            conditions: of one frame of each stream.

        Returns:
            r is the number of streams, or 1 where nothing steers them.
        """
        schedule = tuple(times)
        spec = self.embed_conditions.spec
        if not (spec.has_actions or spec.num_labels):
            return self._table(schedule)
        if self._fits(schedule):
            return self._table(schedule).index_select(1, self._choice(conditions))
        return self._compute(schedule, conditions)

    def of_each(self, time: Tensor, conditions: Conditions) -> Tensor:
        """Return the modulation of frames at any times [f], [f parts d]: nothing is kept."""
        return self._parts(self.embed_time(time.to(finest(time.device))[:, None])[:, 0], conditions)

    def _fits(self, schedule: Schedule) -> bool:
        entries = self._num_choices * len(schedule) * self.num_parts * self.width
        return 0 < entries * self.dtype.itemsize <= TABLE_BYTES

    def _table(self, schedule: Schedule) -> Tensor:
        """Return [times choices parts d], for every action (or none) and every label (or none)."""
        return kept_for(schedule, self._tables, lambda: self._tabulate(schedule))

    def _tabulate(self, schedule: Schedule) -> Tensor:
        spec = self.embed_conditions.spec
        actions, labels = torch.cartesian_prod(
            torch.arange(spec.num_actions + 1, device=self.device),
            torch.arange(spec.num_labels + 1, device=self.device),
        ).unbind(1)
        # An action of index num_actions is the hidden one: see embed.ConditionEmbedder.
        choices = Conditions(
            actions=actions[:, None] if spec.num_actions else None,
            labels=labels if spec.num_labels else None,
        )
        return self._compute(schedule, choices)

    def _choice(self, conditions: Conditions) -> Tensor:
        spec = self.embed_conditions.spec
        choice = torch.zeros((), dtype=torch.long)
        if spec.num_actions:
            assert conditions.actions is not None
            choice = conditions.actions[:, 0]
            if conditions.null_actions is not None:
                choice = torch.where(conditions.null_actions[:, 0], spec.num_actions, choice)
        if spec.num_labels:
            assert conditions.labels is not None
            label = conditions.labels
            if conditions.null_labels is not None:
                label = torch.where(conditions.null_labels, spec.num_labels, label)
            choice = choice.to(label) * (spec.num_labels + 1) + label
        return choice

    def _compute(self, schedule: Schedule, conditions: Conditions) -> Tensor:
        embedded = kept_for(schedule, self._times, lambda: self._embed(schedule))
        return self._parts(embedded[:, None], conditions)

    def _embed(self, schedule: Schedule) -> Tensor:
        # In float64: the embedding shows the rounding of a float32 time.
        times = torch.tensor(schedule, dtype=finest(self.device), device=self.device)
        return self.embed_time(times[:, None])[:, 0]

    def _parts(self, embedding: Tensor, conditions: Conditions) -> Tensor:
        steering = self.embed_conditions(conditions)
        if steering is not None:
            embedding = embedding + steering[:, 0]
        active = functional.silu(embedding)
        parts = torch.cat([linear(active) for linear in self.linears], dim=-1)
        return parts.unflatten(-1, (self.num_parts, -1))


def _one_plus_scale(layer: nn.Linear, part: int) -> PackedLinear:
    """Lay a modulation's weights out, with 1 added to the scale, its part number `part`."""
    width = layer.in_features
    bias = layer.bias.detach().clone()
    bias[part * width : (part + 1) * width] += 1
    return PackedLinear(layer.weight.detach(), bias, rows=16)
