"""A world made on the fly: shapes move about a room, one is steered, and some pass out of sight.

Three shapes move at constant speed, bounce off the walls and pass behind an occluder, from which
they return as they were. A fourth, the agent, is moved by the actions and stops at the walls.
Nothing is random once the world has begun, except the actions.

Lengths are in units of 1/32 of the picture, unless they are said to be pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64

from scd.common.config import at_least
from scd.data.clip import Clip, frames_to_pixels
from scd.data.record import Played, Recording
from scd.data.source import DataCard, Opening, Source
from scd.data.spaces import ConditionSpec, Split

ACTION_NAMES = ("none", "up", "down", "left", "right")

MOVES = np.array([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])
"""Direction (x, y) in which each action moves the agent."""

AGENT_STEP = 3
"""How far the agent moves per action."""

KEEP_PROBABILITY = 0.8
"""How often the random policy does the same again: 5 actions in a row on average."""

NUM_MOVERS = 3
"""Shapes that move on their own; the agent comes after them."""

SPEEDS = (0.4, 1.2)
"""Range of a mover's speed along each axis, per frame."""

RADII = (3.5, 4.5)
"""Range of a mover's radius."""

AGENT_RADIUS = 2.5

UNITS = 32
WALL = 2
"""Thickness of the walls."""

OCCLUDER = (10, 15)
"""Width and height of the occluder: a shape of the largest radius fits behind it."""

MAX_FRAMES = 4096
"""Length of an episode."""

NUM_EPISODES: dict[Split, int] = {"train": 20_000, "val": 2_000, "test": 2_000}
FIRST_EPISODE: dict[Split, int] = {"train": 0, "val": 20_000, "test": 22_000}
"""Worlds are numbered through all splits, so that no split meets a world of another."""

# Red, green and blue in [0, 1].
FLOOR_COLOURS = ((0.28, 0.30, 0.36), (0.24, 0.26, 0.32))
WALL_COLOUR = (0.45, 0.20, 0.15)
OCCLUDER_COLOURS = ((0.52, 0.44, 0.30), (0.44, 0.36, 0.24))
AGENT_COLOUR = (0.90, 0.90, 0.90)
MOVER_COLOURS = (
    (0.90, 0.25, 0.20),
    (0.20, 0.75, 0.30),
    (0.25, 0.45, 0.95),
    (0.95, 0.80, 0.15),
    (0.85, 0.30, 0.80),
    (0.20, 0.80, 0.85),
)

CORE = 0.5
"""Radius of a shape's dark core, as a share of its own."""
CORE_SHADE = 0.6
"""Brightness of the core, as a share of the shape's colour."""

KINDS = ("disc", "square", "diamond")


@dataclass(frozen=True, kw_only=True)
class ToyState:
    """What is true of a world, whether it can be seen or not."""

    positions: Float32[np.ndarray, "t shapes 2"]
    """Centre (x, y) of each shape, in pixels from the picture's left and upper edge."""
    colours: Float32[np.ndarray, "shapes 3"]
    """Colour of each shape, in [-1, 1]."""
    radii: Float32[np.ndarray, " shapes"]
    visible: Float32[np.ndarray, "t shapes"]
    """Share of each shape's area that is neither behind the occluder nor behind another shape."""
    occluder: tuple[int, int, int, int]
    """Left, upper, right and lower edge of the occluder, in pixels."""
    agent: int
    """Index of the shape that the actions move."""
    actions: Int64[np.ndarray, " t"]
    """Action i led to frame i."""


@dataclass(frozen=True)
class _World:
    """The beginning of an episode, from which all else follows; in units."""

    kinds: tuple[str, ...]
    colours: np.ndarray  # [shapes 3] in [0, 1]
    radii: np.ndarray  # [shapes]
    phases: np.ndarray  # [movers 2]: position along the way forth and back between the walls
    speeds: np.ndarray  # [movers 2]
    agent: np.ndarray  # [2]: position before the first action
    occluder: tuple[int, int]  # left and upper edge
    actions: np.ndarray  # [MAX_FRAMES]


class ToyWorld(Source):
    """Toy episodes of one split; each is a function of the seed, the split and its number.

    Args:
        size: height and width of a frame, in pixels.
        split: which episodes.
        seed: other seeds give other worlds.
    """

    kind = "toy"
    of_files = True  # It is computed: no folder is needed.

    def __init__(self, size: Literal[32, 64], split: Split, seed: int = 0) -> None:
        if size not in (32, 64):
            raise ValueError(f"the toy world has size 32 or 64, got {size}")
        at_least(0, seed=seed)
        self.size = size
        self.seed = seed
        self._scale = size // UNITS
        self._room = _draw_room(size)
        card = DataCard(
            height=size,
            width=size,
            fps=10.0,
            conditions=ConditionSpec(num_actions=len(ACTION_NAMES)),
            action_names=ACTION_NAMES,
        )
        super().__init__(f"toy:{size}", split, card, [MAX_FRAMES] * NUM_EPISODES[split])

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> ToyWorld:
        if data not in ("toy:32", "toy:64"):
            raise ValueError(f"toy worlds are 'toy:32' and 'toy:64', got {data!r}")
        return cls(size=32 if data == "toy:32" else 64, split=split)

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        world = self._begin(episode)
        return self._clip(world, world.actions[: start + num_frames], start)

    def play(self, episode: int, actions: Int64[np.ndarray, " t"], start: int = 0) -> Clip:
        """Draw an episode from a frame on under other actions than the random policy's, which led
        there."""
        _check_actions(actions)
        world = self._begin(episode)
        return self._clip(world, np.concatenate([world.actions[:start], actions]), start)

    def state(
        self, episode: int, num_frames: int, actions: Int64[np.ndarray, " t"] | None = None
    ) -> ToyState:
        """Return what is true of an episode's first frames under these actions, or its own."""
        world = self._begin(episode)
        actions = world.actions if actions is None else actions
        _check_actions(actions)
        if not 1 <= num_frames <= len(actions):
            raise ValueError(f"{num_frames} frames need as many actions, got {len(actions)}")
        actions = actions[:num_frames]
        positions = _positions(world, actions, 0)
        rows, columns = self._behind(world)
        # Frame by frame in blocks: the areas of 4,096 frames at once take a quarter of a GiB.
        blocks = [positions[i : i + 256] for i in range(0, num_frames, 256)]
        return ToyState(
            positions=positions * np.float32(self._scale),
            colours=world.colours * 2 - 1,
            radii=world.radii * np.float32(self._scale),
            visible=np.concatenate([self._visible(world, block) for block in blocks]),
            occluder=(columns.start, rows.start, columns.stop, rows.stop),
            agent=NUM_MOVERS,
            actions=actions,
        )

    def _begin(self, episode: int) -> _World:
        if not 0 <= episode < self.num_episodes:
            raise ValueError(f"episodes are 0 .. {self.num_episodes - 1}, got {episode}")
        generator = np.random.default_rng((self.seed, FIRST_EPISODE[self.split] + episode))
        radii = np.append(generator.uniform(*RADII, NUM_MOVERS), AGENT_RADIUS).astype(np.float32)
        chosen = generator.permutation(len(MOVER_COLOURS))[:NUM_MOVERS]
        colours = [*(MOVER_COLOURS[index] for index in chosen), AGENT_COLOUR]
        kinds = [KINDS[index] for index in generator.integers(len(KINDS), size=NUM_MOVERS)]
        way = 2 * _space(radii[:NUM_MOVERS])
        keep = generator.random(MAX_FRAMES) < KEEP_PROBABILITY
        picks = generator.integers(len(ACTION_NAMES), size=MAX_FRAMES)
        last_pick = np.maximum.accumulate(np.where(keep, 0, np.arange(MAX_FRAMES)))
        return _World(
            kinds=(*kinds, "square"),
            colours=np.array(colours, np.float32),
            radii=radii,
            phases=generator.random((NUM_MOVERS, 2)) * way[:, None],
            speeds=generator.uniform(*SPEEDS, (NUM_MOVERS, 2)),
            agent=generator.uniform(WALL + AGENT_RADIUS, UNITS - WALL - AGENT_RADIUS, 2),
            occluder=(
                int(generator.integers(WALL + 1, UNITS - WALL - OCCLUDER[0])),
                int(generator.integers(WALL + 1, UNITS - WALL - OCCLUDER[1])),
            ),
            actions=picks[last_pick],
        )

    def _clip(self, world: _World, actions: np.ndarray, start: int) -> Clip:
        frames = self._draw(world, _positions(world, actions, start))
        return Clip(
            frames=torch.from_numpy(frames),
            actions=torch.from_numpy(actions[start:].copy()),
            fps=self.card.fps,
        )

    def _draw(self, world: _World, positions: np.ndarray) -> np.ndarray:
        """Draw frames [t 3 h w] in [-1, 1], from the floor up to the occluder."""
        canvas = np.broadcast_to(self._room, (len(positions), *self._room.shape)).copy()
        for shape, colour in enumerate(world.colours):
            area, core = self._areas(world, positions, shape)
            paint = area * (1 - (1 - CORE_SHADE) * core)
            canvas *= (1 - area)[:, None]
            canvas += paint[:, None] * colour[:, None, None]
        rows, columns = self._behind(world)
        canvas[:, :, rows, columns] = _draw_occluder(self._scale)
        canvas *= 2
        canvas -= 1
        return canvas

    def _areas(
        self, world: _World, positions: np.ndarray, shape: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the share of each pixel [t h w] that a shape and its core cover."""
        scale, radius = np.float32(self._scale), world.radii[shape]
        centres = (np.arange(self.size, dtype=np.float32) + 0.5) / scale
        across = np.abs(centres - positions[:, shape, 0, None])[:, None, :]  # [t 1 w]
        down = np.abs(centres - positions[:, shape, 1, None])[:, :, None]  # [t h 1]
        if world.kinds[shape] == "square":
            distance = np.maximum(across, down)
        elif world.kinds[shape] == "diamond":
            # As far from its centre as the disc is where that touches the walls.
            distance = across + down
        else:
            distance = np.sqrt(across**2 + down**2)
        area = np.clip((radius - distance) * scale + np.float32(0.5), 0, 1)
        core = np.clip((radius * np.float32(CORE) - distance) * scale + np.float32(0.5), 0, 1)
        return area, core

    def _visible(self, world: _World, positions: np.ndarray) -> np.ndarray:
        """Return the visible share of each shape, [t shapes]."""
        light = np.ones((len(positions), self.size, self.size), np.float32)
        rows, columns = self._behind(world)
        light[:, rows, columns] = 0
        visible = np.empty(positions.shape[:2], np.float32)
        for shape in reversed(range(positions.shape[1])):
            area, _ = self._areas(world, positions, shape)
            visible[:, shape] = (area * light).sum((1, 2)) / area.sum((1, 2))
            light *= 1 - area
        return visible

    def _behind(self, world: _World) -> tuple[slice, slice]:
        """Return the rows and columns that the occluder hides."""
        left, top = (edge * self._scale for edge in world.occluder)
        width, height = (length * self._scale for length in OCCLUDER)
        return slice(top, top + height), slice(left, left + width)


@dataclass(frozen=True, kw_only=True)
class ToyRecording(Recording):
    """Record the toy world: shapes that move about a room, one of them steered."""

    kind = "toy"
    of_files = True  # It is computed: no folder is needed.

    size: Literal[32, 64] = 32
    """Height and width of a frame, in pixels."""

    @property
    def card(self) -> DataCard:
        return ToyWorld(size=self.size, split="train").card

    def play(self, split: Split, episode: int) -> Played:
        clip = ToyWorld(size=self.size, split=split, seed=self.seed).read(episode, 0, self.frames)
        assert clip.actions is not None
        return Played(frames_to_pixels(clip.frames).numpy(), clip.actions.numpy())


def _space(radii: np.ndarray) -> np.ndarray:
    """Return how far a centre can move between two walls."""
    return UNITS - 2 * WALL - 2 * radii


def _positions(world: _World, actions: np.ndarray, start: int) -> np.ndarray:
    """Return the centres (x, y) [t shapes 2] from frame `start` on; the actions begin at 0."""
    radii = world.radii[:NUM_MOVERS, None]
    time = np.arange(start, len(actions))[:, None, None]
    space = _space(radii)
    # Bouncing between walls is walking along a way twice as long and folding it in the middle.
    way = (world.phases + world.speeds * time) % (2 * space)
    movers = WALL + radii + np.minimum(way, 2 * space - way)
    agent = _walk(world.agent, actions)[start:, None]
    return np.concatenate([movers, agent], axis=1).astype(np.float32)


def _walk(begin: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Return the agent's centre [t 2] after each action; a wall cuts the move short."""
    low, high = WALL + AGENT_RADIUS, UNITS - WALL - AGENT_RADIUS
    # Equal actions in a row can be cut short once, at their end: one step of the loop for all.
    starts = np.flatnonzero(np.diff(actions, prepend=-1))
    moves = MOVES[actions[starts]] * AGENT_STEP
    lengths = np.diff(starts, append=len(actions))
    x, y = begin.tolist()
    begins = []
    for move_x, move_y in (moves * lengths[:, None]).tolist():
        begins.append((x, y))
        x = min(max(x + move_x, low), high)
        y = min(max(y + move_y, low), high)
    row = np.repeat(np.arange(len(starts)), lengths)
    num_moves = np.arange(len(actions)) - starts[row] + 1
    return np.clip(np.array(begins)[row] + moves[row] * num_moves[:, None], low, high)


def _check_actions(actions: np.ndarray) -> None:
    if not len(actions) or actions.min() < 0 or actions.max() >= len(ACTION_NAMES):
        raise ValueError(f"actions must lie in 0 .. {len(ACTION_NAMES) - 1}, got {actions}")


def _draw_room(size: int) -> Float[np.ndarray, "3 h w"]:
    """Draw the floor in large squares and the walls, in [0, 1]."""
    scale = size // UNITS
    cells = np.arange(size) // (4 * scale)
    colours = np.array(FLOOR_COLOURS, np.float32)
    room = colours[(cells[:, None] + cells) % 2].transpose(2, 0, 1).copy()
    inside = np.zeros((size, size), bool)
    inside[WALL * scale : -WALL * scale, WALL * scale : -WALL * scale] = True
    room[:, ~inside] = np.array(WALL_COLOUR, np.float32)[:, None]
    return room


def _draw_occluder(scale: int) -> Float[np.ndarray, "3 h w"]:
    """Draw the occluder in upright boards, in [0, 1]."""
    width, height = OCCLUDER
    boards = np.arange(width * scale) // (2 * scale) % 2
    colours = np.array(OCCLUDER_COLOURS, np.float32)[boards].T  # [3 w]
    return np.repeat(colours[:, None], height * scale, axis=1)
