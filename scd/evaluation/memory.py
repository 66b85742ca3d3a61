"""Memory score in the toy world: does a shape that was out of sight come back as it was?

An event is a shape that was seen among the given frames, then was wholly behind the occluder in
the last given frame or later, and is half visible again in a predicted frame. Only the model's
memory can tell its colour, and where and when it comes out. The event is judged in the first frame
in which it is half visible: see `comes_back`. The agent does not count: its place follows from the
actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scd.common.threads import ThreadChoice
from scd.data.clip import Batch, Clip, Conditions
from scd.data.toy import (
    AGENT_COLOUR,
    FLOOR_COLOURS,
    MOVER_COLOURS,
    OCCLUDER_COLOURS,
    UNITS,
    WALL_COLOUR,
    ToyState,
    ToyWorld,
)
from scd.evaluation.image import Estimate, bootstrap
from scd.evaluation.predict import predict
from scd.evaluation.protocols import Protocol
from scd.models.checkpoint import World
from scd.models.config import Guidance, SamplingConfig

SEEN = 0.5
"""Visible share from which a shape counts as seen."""

TOLERANCE = 3.0
"""How far off a shape may come back, in units of 1/32 of the picture: pixels of a 32x32 frame."""

SHARED = 0.5
"""Dice coefficient of true and predicted pixels from which they are the same shape."""

MIN_PIXELS = 4
"""Pixels of a shape's colour below which even the true frame does not show it: no event."""

MAX_SEARCHED = 5000
"""Episodes that are searched for events at most: some ten seconds."""

PALETTE = (*MOVER_COLOURS, AGENT_COLOUR, *FLOOR_COLOURS, WALL_COLOUR, *OCCLUDER_COLOURS)
"""Colours in [0, 1] that a pixel can be nearest to; those of the shapes come first."""


@dataclass(frozen=True, kw_only=True)
class MemoryEvent:
    """A shape that returns into view."""

    shape: int
    last_seen: int
    """Frame of the window in which it was last seen before it was hidden."""
    frame: int
    """Frame of the window in which it is half visible again: where it is judged."""


def memory_events(
    state: ToyState, true: Float[Tensor, "t 3 h w"], num_given: int
) -> list[MemoryEvent]:
    """Find the shapes that should come back in the predicted frames of a window.

    Args:
        state: of the window's frames.
        true: the same frames.
        num_given: frames at the window's beginning that the model is given.
    """
    found = []
    left, top, right, bottom = state.occluder
    for shape in range(state.positions.shape[1]):
        if shape == state.agent:
            continue
        x, y = state.positions[:, shape].T
        visible = state.visible[:, shape]
        behind = (visible <= 0) & (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        seen = visible >= SEEN
        for frame in np.flatnonzero(seen[num_given:]) + num_given:
            before = np.flatnonzero(seen[:frame])
            # The first frame back in view, after a spell that began with a given frame in view.
            hidden = len(before) > 0 and behind[max(before[-1], num_given - 1) : frame].any()
            if hidden and before[0] < num_given:
                event = MemoryEvent(shape=shape, last_seen=int(before[-1]), frame=int(frame))
                if int(_shown(true[event.frame], state, event).sum()) >= MIN_PIXELS:
                    found.append(event)
    return found


def comes_back(
    predicted: Float[Tensor, "3 h w"],
    true: Float[Tensor, "3 h w"],
    state: ToyState,
    event: MemoryEvent,
) -> bool:
    """Tell whether a predicted frame shows a shape where and as it should be.

    A pixel shows the shape when, of all colours of the world, the shape's is the nearest, and it
    lies in the square around the shape's true box that is TOLERANCE wider on each side. The shape
    is back when the centre of such pixels in the predicted frame is within TOLERANCE of that in
    the true one, and, moved by at most TOLERANCE, the true pixels share at least half of both
    (Dice coefficient): noise and a tint over everything do not.
    """
    here, there = _shown(true, state, event), _shown(predicted, state, event)
    if not there.any():
        return False
    reach = TOLERANCE * true.shape[-1] / UNITS
    offset = there.nonzero().float().mean(0) - here.nonzero().float().mean(0)
    if float(offset.norm()) > reach:
        return False
    steps = range(-int(reach), int(reach) + 1)
    shared = max(
        int((here.roll((down, right), (0, 1)) & there).sum())
        for down in steps
        for right in steps
        if down**2 + right**2 <= reach**2
    )
    return 2 * shared >= SHARED * int(here.sum() + there.sum())


def _shown(frame: Tensor, state: ToyState, event: MemoryEvent) -> Bool[Tensor, "h w"]:
    """Pixels of a shape's colour around where it truly is."""
    height, width = frame.shape[-2:]
    palette = torch.tensor(PALETTE) * 2 - 1
    colour = torch.from_numpy(state.colours[event.shape])
    wanted = int((palette - colour).square().sum(1).argmin())
    nearest = (frame.float().cpu() - palette[:, :, None, None]).square().sum(1).argmin(0)
    x, y = state.positions[event.frame, event.shape].tolist()
    reach = float(state.radii[event.shape]) + TOLERANCE * width / UNITS
    across = (torch.arange(width) + 0.5 - x).abs() <= reach
    down = (torch.arange(height) + 0.5 - y).abs() <= reach
    return (nearest == wanted) & down[:, None] & across


@dataclass(frozen=True, kw_only=True)
class MemoryClips:
    """Windows of toy episodes in each of which at least one shape comes back."""

    batch: Batch
    states: list[ToyState]
    events: list[list[MemoryEvent]]
    num_given: int
    """Frames at each window's beginning that a model may be given."""


def find_memory_clips(
    world: ToyWorld, num_clips: int, num_given: int, num_predicted: int
) -> MemoryClips:
    """Search a toy world's episodes, in order, for windows at their beginning with an event.

    Raises:
        ValueError: not enough of them, as when too few frames are predicted.
    """
    num_frames = num_given + num_predicted
    clips: list[Clip] = []
    states: list[ToyState] = []
    events: list[list[MemoryEvent]] = []
    # A cheap necessary condition first: drawing the frames costs more than the state.
    for episode in range(min(world.num_episodes, MAX_SEARCHED)):
        state = world.state(episode, num_frames)
        if not (state.visible[num_given - 1 :, : state.agent] <= 0).any():
            continue
        clip = world.read(episode, 0, num_frames)
        found = memory_events(state, clip.frames, num_given)
        if found:
            clips.append(clip)
            states.append(state)
            events.append(found)
        if len(clips) == num_clips:
            batch = Batch.of(clips)
            return MemoryClips(batch=batch, states=states, events=events, num_given=num_given)
    raise ValueError(
        f"{num_clips} toy clips in which a shape comes back from behind the occluder were needed, "
        f"but with {num_given} given and {num_predicted} predicted frames there are {len(clips)} "
        f"in {min(world.num_episodes, MAX_SEARCHED)} episodes"
    )


def memory_counts(
    predicted: Float[Tensor, "b m 3 h w"], clips: MemoryClips, first: int = 0
) -> Float[Tensor, "b 2"]:
    """Count of each window the shapes that came back, and those that should have.

    Args:
        predicted: the frames after the given ones, in [-1, 1].
        clips: the windows.
        first: index of the first window that was predicted.
    """
    true = clips.batch.frames
    assert predicted.shape[1] == true.shape[1] - clips.num_given
    counts = []
    for index, frames in enumerate(predicted, start=first):
        state, events = clips.states[index], clips.events[index]
        back = [
            comes_back(
                frames[event.frame - clips.num_given], true[index, event.frame], state, event
            )
            for event in events
        ]
        counts.append([float(sum(back)), float(len(back))])
    return torch.tensor(counts)


def memory_score(counts: Float[Tensor, "b 2"], seed: int = 0) -> Estimate:
    """Return the share of hidden shapes that came back, with its interval over clips."""
    return bootstrap(counts, lambda means: means[:, 0] / means[:, 1], seed)


def count_batch(
    world: World,
    clips: MemoryClips,
    protocol: Protocol,
    number: int,
    sampling: SamplingConfig | None = None,
    guidance: Guidance | None = None,
    threads: ThreadChoice | None = None,
) -> dict[str, Float[Tensor, "b 2"]]:
    """Count what a world remembers in one batch, and what repeating the last given frame does.

    The world is given the last `protocol.context` of the given frames, so several contexts can be
    compared on the same events and the same predicted frames.
    """
    frames, actions = clips.batch.frames, clips.batch.conditions.actions
    skipped = clips.num_given - protocol.context
    if skipped < 0:
        raise ValueError(
            f"the clips give {clips.num_given} frames, a context of {protocol.context} was needed"
        )
    assert actions is not None
    chosen = protocol.batches()[number]
    batch = Batch(
        frames=frames[chosen, skipped:],
        conditions=Conditions(actions=actions[chosen, skipped:]),
    )
    made = predict(
        world,
        batch,
        protocol.context,
        protocol.seed,
        number,
        sampling=sampling,
        guidance=guidance,
        threads=threads,
    )
    last = frames[chosen, clips.num_given - 1 : clips.num_given]
    repeated = last.expand(-1, made.frames.shape[1], -1, -1, -1)
    return {
        "model": memory_counts(made.frames, clips, chosen.start),
        "repeat_last": memory_counts(repeated, clips, chosen.start),
    }
