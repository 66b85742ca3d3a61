"""What the file of a session says as JSON in its header, beside its tensors."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from torch import Tensor

from scd.serving.messages import ActionValue, Beginning, Count, Message, ServeError, State
from scd.streaming.rollout import Rollout


class Record(Message):
    """Part of the header; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


def bad(message: str) -> ServeError:
    """Return the error for a file that no session of this world can be made of."""
    return ServeError("bad_snapshot", message)


class Texts(list[Tensor]):
    """The embedded texts of a session, each once."""

    def place(self, text: Tensor | None) -> int | None:
        """Return at which place a text stands, from now on; None: there is none."""
        if text is None:
            return None
        for place, held in enumerate(self):
            if held is text:
                return place
        self.append(text)
        return len(self) - 1


class CacheRecord(Record):
    """A stream's KV cache, but its tensors."""

    num_frames: Count
    """Of the stream."""
    slots: tuple[int | None, ...]
    """Position of the frame in each place of the ring."""
    num_evicted: Count
    """Frames that have left the window."""
    text: Count | None = None
    """Which of the session's texts steers it; None: no text steers the world."""

    @staticmethod
    def of(rollout: Rollout, texts: Texts) -> CacheRecord:
        cache = rollout.state.cache
        return CacheRecord(
            num_frames=rollout.num_frames,
            slots=tuple(cache.slots),
            num_evicted=cache.num_evicted,
            text=texts.place(rollout.text),
        )


class FrameRecord(Record):
    """A frame of the history, but its latent."""

    action: ActionValue | None
    """That led to it."""
    sequence: Count
    """That came with the action."""
    steps: Count
    """Denoising steps that it took; 0: it was given."""
    text: Count | None = None
    """Under which of the session's texts it was made; None: no text steers the world."""


class SessionRecord(Record):
    """A session, but its tensors."""

    format: Literal["scd session 2"] = "scd session 2"
    """Of the file."""
    state: State
    """How it stood."""
    start: Beginning
    """What it began with, but its frames."""
    actions: tuple[ActionValue, ...]
    """That led to the given frames."""
    live: CacheRecord
    """The stream."""
    copies: tuple[CacheRecord, ...]
    """Of the stream in the history, oldest first."""
    frames: tuple[FrameRecord, ...]
    """Of the history, from the state's `kept_from` on."""
    null_text: Count | None = None
    """Which text guidance leads away from; None: none."""

    @property
    def num_texts(self) -> int:
        """Texts that it names: no more than that are in the file."""
        every = (self.live, *self.copies, *self.frames)
        named = [self.null_text, *(one.text for one in every)]
        return 1 + max((place for place in named if place is not None), default=-1)
