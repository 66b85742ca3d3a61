"""What steers a model, by kind and size, and what the parts of a collection are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scd.common.config import added, within

MAX_NUMBER = 2**20
"""Largest number of actions, labels, entries or tokens, so that damaged settings are refused."""

OnError = Literal["stop", "skip"]
"""What becomes of a clip that cannot be read: an error, or another clip in its place."""


@dataclass(frozen=True, kw_only=True)
class ConditionSpec:
    """What steers a model: discrete or continuous actions, class labels, a text, or nothing."""

    num_actions: int = 0
    """Number of discrete actions; ids are 0 .. num_actions - 1. 0: no discrete actions."""
    action_dim: int = 0
    """Entries of a continuous action vector. 0: no continuous actions."""
    num_labels: int = 0
    """Number of class labels of a whole clip; ids are 0 .. num_labels - 1. 0: no labels."""
    text_length: int = added(0)
    """Tokens of an embedded text, those that fill it up included. 0: no text."""
    text_dim: int = added(0)
    """Entries of an embedded token of the text. 0: no text."""

    def __post_init__(self) -> None:
        within(
            0,
            MAX_NUMBER,
            num_actions=self.num_actions,
            action_dim=self.action_dim,
            num_labels=self.num_labels,
            text_length=self.text_length,
            text_dim=self.text_dim,
        )
        if bool(self.text_length) != bool(self.text_dim):
            raise ValueError(
                "a text needs both a length and a dimension: "
                f"got text_length={self.text_length} and text_dim={self.text_dim}"
            )
        if self.num_actions and self.action_dim:
            raise ValueError(
                "actions are either discrete or continuous: "
                f"got num_actions={self.num_actions} and action_dim={self.action_dim}"
            )

    @property
    def has_actions(self) -> bool:
        return bool(self.num_actions or self.action_dim)

    @property
    def has_text(self) -> bool:
        return bool(self.text_length)

    @property
    def is_steered(self) -> bool:
        """Whether there is anything that guidance could hide."""
        return self.has_actions or bool(self.num_labels) or self.has_text


Split = Literal["train", "val", "test"]
"""Part of a collection; episodes of one part never appear in another."""
