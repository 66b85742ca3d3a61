"""Keys and values of a prompt, computed once and kept for as long as a stream has that prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.wan.block import TextKeysValues
from scd.models.wan.transformer import WanTransformer


@dataclass(frozen=True, kw_only=True)
class TextMemory:
    """What a stack of blocks remembers of the text of each stream."""

    text: Tensor
    """Embedded text, [b l c]."""
    layers: list[TextKeysValues]
    """Of each layer."""
    carries_gradient: bool
    """Whether gradient reaches the weights that made them."""

    def serves(self, text: Tensor) -> bool:
        """Tell whether this is the memory of a text, with gradient where it is asked for."""
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


def remember_text(
    transformer: WanTransformer, conditions: Conditions, batch: int, held: TextMemory | None
) -> TextMemory:
    """Return what is held if it is of this text, else embed the text.

    Raises:
        ValueError: there is no text, or of another number of streams.
    """
    text = text_of(conditions, batch)
    if held is not None and held.serves(text):
        return held
    return TextMemory(
        text=text,
        layers=transformer.text_memory(text),
        carries_gradient=torch.is_grad_enabled(),
    )
