"""What is kept of a session, so that it can go back to an earlier frame exactly."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scd.serving.errors import OutOfHistory
from scd.serving.events import Action
from scd.streaming.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One frame of the history."""

    latent: Float[Tensor, "1 c h w"]
    """As the model made it, or saw it."""
    action: Action
    """That led to it."""
    sequence: int = 0
    """That came with the action."""
    num_steps: int = 0
    """Denoising steps that it took; 0: it was given."""


class History:
    """The newest frames of one session, and every few frames a copy of its memory.

    `add` after each frame; `at` returns the stream as it was when a frame was the newest: the copy
    before it, to which the frames since then are shown again. Copies are never stepped themselves,
    so histories of forks share them.

    Frames that are no longer reached are forgotten, a copy at a time: at least `reach` frames back
    can be reached, and fewer than `reach + every`.
    """

    def __init__(self, rollout: Rollout, given: Sequence[Kept], reach: int, every: int) -> None:
        """Begin with a stream that has just begun.

        Args:
            rollout: is copied.
            given: its newest given frames, the last one last; can be shown, not gone back to.
            reach: frames that can at least be gone back, 1 or more.
            every: frames from one copy to the next, 1 or more.
        """
        self.reach, self.every = reach, every
        self._frames: list[Kept] = list(given[-reach:])
        self._first = rollout.num_frames - len(self._frames)
        # By the number of frames that the stream had.
        self._copies: dict[int, Rollout] = {rollout.num_frames: rollout.fork()}

    @staticmethod
    def of_parts(
        copies: Sequence[Rollout], frames: Sequence[Kept], first: int, reach: int, every: int
    ) -> History:
        """Put together again what `copies`, `kept` and `kept_from` gave; the parts must fit."""
        history = object.__new__(History)
        history.reach, history.every = reach, every
        history._frames, history._first = list(frames), first
        history._copies = {copy.num_frames: copy for copy in copies}
        history._forget()
        return history

    @property
    def oldest(self) -> int:
        """Oldest frame that can be the newest again; -1: before the first."""
        return min(self._copies) - 1

    @property
    def newest(self) -> int:
        """Newest frame; -1: there is none."""
        return self._first + len(self._frames) - 1

    @property
    def kept_from(self) -> int:
        """Oldest frame that can be shown; newest + 1: none can."""
        return self._first

    @property
    def kept(self) -> tuple[Kept, ...]:
        """All frames that can be shown."""
        return tuple(self._frames)

    @property
    def copies(self) -> tuple[Rollout, ...]:
        """Copies of the stream, oldest first; not to be stepped."""
        return tuple(self._copies.values())

    def add(self, rollout: Rollout, frame: Kept) -> None:
        """Keep the frame that the stream has just got."""
        self._frames.append(frame)
        assert rollout.num_frames == self.newest + 1
        if rollout.num_frames - max(self._copies) >= self.every:
            self._copies[rollout.num_frames] = rollout.fork()
        self._forget()

    def frame(self, index: int) -> Kept:
        """Return a frame (OutOfHistory: it is not kept)."""
        if not self._first <= index <= self.newest:
            raise OutOfHistory(
                f"frames {self._first} to {self.newest} are kept, frame {index} was asked for"
            )
        return self._frames[index - self._first]

    def at(self, index: int) -> Rollout:
        """Return a copy of the stream as it was when a frame was the newest.

        Raises:
            OutOfHistory: it is older than what is kept, or not there yet.
        """
        if not self.oldest <= index <= self.newest:
            raise OutOfHistory(
                f"frames {self.oldest} to {self.newest} can be gone back to, frame {index} was "
                "asked for"
            )
        counts = sorted(self._copies)
        start = counts[bisect_right(counts, index + 1) - 1]
        rollout = self._copies[start].fork()
        for number in range(start, index + 1):
            frame = self.frame(number)
            rollout.replay(frame.latent, as_action(frame.action, batch=True))
        return rollout

    def upto(self, index: int) -> History:
        """Return a history of its own that ends with a frame which `at` can return."""
        twin = object.__new__(History)
        vars(twin).update(vars(self))
        twin._frames = self._frames[: index + 1 - self._first]
        twin._copies = {num: copy for num, copy in self._copies.items() if num <= index + 1}
        return twin

    def _forget(self) -> None:
        counts = sorted(self._copies)
        while len(counts) > 1 and counts[1] - 1 <= self.newest - self.reach:
            del self._copies[counts.pop(0)]
        # Given frames stand before the first copy, and stay as long as there is room.
        surplus = len(self._frames) - (self.reach + self.every)
        if surplus > 0:
            del self._frames[:surplus]
            self._first += surplus


def as_action(action: Action, batch: bool = False) -> Tensor | None:
    """Return an action as a tensor: of one session, or of a batch of one."""
    if action is None:
        return None
    dtype = torch.long if isinstance(action, int) else torch.float32
    value = torch.tensor(action, dtype=dtype)
    return value[None] if batch else value
