"""What every collection of episodes offers: a card of what it holds, and clips by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from scd.data.clip import Clip, ConditionSpec

Split = Literal["train", "val", "test"]
"""Part of a collection; episodes of one part never appear in another."""


class EmptySplit(ValueError):
    """A split to which no episode of the collection belongs."""


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """Size, speed and steering that all episodes of a collection share."""

    height: int
    """Rows of a frame, in pixels."""
    width: int
    """Columns of a frame, in pixels."""
    fps: float
    """Frames per second at which the episodes are meant to be watched."""
    conditions: ConditionSpec
    """What steers the episodes."""
    action_names: tuple[str, ...]
    """Name of each discrete action id, or of each entry of a continuous action."""

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(
                f"height and width must be 1 or more, got {self.height} and {self.width}"
            )
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"fps must be a finite number above 0, got {self.fps}")
        num_names = self.conditions.num_actions or self.conditions.action_dim
        if len(self.action_names) != num_names:
            raise ValueError(
                f"{num_names} actions need as many action_names, got {list(self.action_names)}"
            )


@runtime_checkable
class Source(Protocol):
    """Episodes that can be read anywhere, from several threads at once."""

    @property
    def card(self) -> DataCard:
        """Size, speed and steering of the episodes."""
        ...

    @property
    def num_episodes(self) -> int:
        """Number of episodes; they are numbered 0 .. num_episodes - 1."""
        ...

    def num_frames(self, episode: int) -> int:
        """Return the length of an episode in frames."""
        ...

    def read(self, episode: int, start: int, num_frames: int) -> Clip:
        """Return frames start .. start + num_frames - 1 of an episode.

        Raises:
            ValueError: the episode has no such frames, or they cannot be decoded.
        """
        ...
