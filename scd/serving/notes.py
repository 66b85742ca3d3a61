"""What a snapshot says of a session besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from scd.serving.errors import BadSnapshot
from scd.serving.events import Action
from scd.serving.memory import MemoryNote
from scd.streaming.rollout import Guidance, GuidanceKind

LARGEST_NUMBER = 2**53
"""Seeds, sequences and generations are below: what JSON carries everywhere."""


@dataclass(frozen=True, kw_only=True)
class GuidanceNote:
    """A `Guidance`, whose `kind` JSON needs for the dataclass."""

    branch: GuidanceKind
    """That frames are pushed away from."""
    scale: float
    """Strength."""
    context_noise: float
    """Strength of the noise in the branch "context_noise"."""

    @staticmethod
    def of(guidance: Guidance) -> GuidanceNote:
        """Return the note of a guidance."""
        return GuidanceNote(
            branch=guidance.kind, scale=guidance.scale, context_noise=guidance.context_noise
        )

    @property
    def guidance(self) -> Guidance:
        """What it notes (ValueError: values that a guidance refuses)."""
        return Guidance(kind=self.branch, scale=self.scale, context_noise=self.context_noise)


@dataclass(frozen=True, kw_only=True)
class StartNote:
    """What a session began with, but its frames."""

    seed: int
    """Of the noise."""
    actions: tuple[Action, ...]
    """That led to the given frames."""
    label: int | None
    """Class of the stream."""
    num_steps: int | None
    """Denoising steps per frame."""
    guidance: GuidanceNote | None
    """None: none."""


@dataclass(frozen=True, kw_only=True)
class FrameNote:
    """A frame of the history, but its latent."""

    action: Action
    """That led to it."""
    sequence: int
    """That came with the action."""
    num_steps: int
    """That it took."""


@dataclass(frozen=True, kw_only=True)
class SessionNote:
    """A session, but its tensors."""

    format: str
    """Of the file."""
    session_id: str
    """Its name."""
    generation: int
    """Of its frames."""
    start: StartNote
    """What it began with."""
    seed: int
    """Of the noise."""
    num_steps: int
    """Denoising steps per frame."""
    guidance: GuidanceNote
    """As it is."""
    num_given: int
    """Frames with which it began."""
    action: Action
    """The one held."""
    sequence: int
    """That came with it."""
    live: MemoryNote
    """The stream."""
    copies: tuple[MemoryNote, ...]
    """Of the stream in the history, oldest first."""
    first: int
    """Oldest frame of the history."""
    frames: tuple[FrameNote, ...]
    """Of the history."""


def check_numbers(note: SessionNote) -> None:
    """Refuse numbers that no session has (BadSnapshot)."""
    numbers = {
        "generation": note.generation,
        "seed": note.seed,
        "start.seed": note.start.seed,
        "num_given": note.num_given,
        "sequence": note.sequence,
        "first": note.first,
    }
    for name, number in numbers.items():
        if not 0 <= number < LARGEST_NUMBER:
            raise BadSnapshot(f"{name} must be 0 or more and below 2**53, got {number}")
