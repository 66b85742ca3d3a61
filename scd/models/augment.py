"""Random changes of a model's input in training: hidden conditions, corrupted context."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of the input in training; without it a model is a pure function."""

    generator: torch.Generator
    """Source of all draws."""
    condition_dropout: float = 0.0
    """Chance that an action (frame by frame), or a label or text (clip by clip), is hidden."""
    context_noise: float = 0.0
    """Strength eta of the noise on the context. Source: paper, section 2.3 (equation 7)."""

    def drop(self, conditions: Conditions) -> Conditions:
        """Hide conditions at random; each call draws anew (encoder and decoder separately)."""
        if self.condition_dropout == 0:
            return conditions
        if conditions.actions is not None:
            hidden = self._hidden(conditions.actions.shape[:2], conditions.actions.device)
            if conditions.null_actions is not None:
                hidden = hidden | conditions.null_actions
            conditions = replace(conditions, null_actions=hidden)
        if conditions.labels is not None:
            hidden = self._hidden(conditions.labels.shape, conditions.labels.device)
            if conditions.null_labels is not None:
                hidden = hidden | conditions.null_labels
            conditions = replace(conditions, null_labels=hidden)
        if conditions.text is not None:
            if conditions.null_text is None:
                raise ValueError(
                    "hiding the text at random needs null_text, the embedded empty prompt; "
                    "else condition_dropout must be 0"
                )
            hidden = self._hidden(conditions.text.shape[:1], conditions.text.device)
            text = torch.where(hidden[:, None, None], conditions.null_text, conditions.text)
            conditions = replace(conditions, text=text)
        return conditions

    def _hidden(self, shape: torch.Size, device: torch.device) -> Tensor:
        draw = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return (draw < self.condition_dropout).to(device)

    def noise_like(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Draw standard normal noise of the shape of x."""
        draw = torch.randn(x.shape, generator=self.generator, device=self.generator.device)
        return draw.to(x.device, x.dtype)
