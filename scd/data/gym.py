"""Episodes of any Gymnasium environment that draws itself: `scd record gym ENV_ID`.

ALE, MiniGrid, Box2D and Crafter need the extra `gym`: pip install -e ".[gym]".
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from PIL import Image

from scd.common.config import at_least
from scd.common.names import did_you_mean
from scd.data.actions import conditions_of, flat, named, parts_of, unflat
from scd.data.environments.making import FramesFrom, check_picture, fps_of, make, own_names
from scd.data.keymap import read_key_map
from scd.data.record import Played, Recording
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec, Split

Choice = Callable[[Any], Any]
"""From an observation to an action."""

RULES = ("random", "sticky")
"""Policies that need no file."""

MAX_RESTARTS = 100
# Episodes that end before the first frame that is kept are rare: a warm-up that meets so many in a
# row is longer than the environment's episodes.


@dataclass(frozen=True, kw_only=True)
class GymRecording(Recording):
    """Record an environment of Gymnasium: what it draws, what was done, what it was worth.

    An episode is at most one of the environment's own: it ends where that ends, or after `frames`.
    """

    kind = "gym"

    env: str
    """Name under which Gymnasium makes the environment: `CarRacing-v3`, `ALE/Breakout-v5`."""
    make: tuple[str, ...] = ()
    """Arguments of the environment, each as KEY=VALUE: `continuous=False`."""
    register: tuple[str, ...] = ()
    """Modules to import first, which give Gymnasium names of environments."""
    frames_from: FramesFrom = "render"
    """Which pictures are the frames: what the environment draws (render mode `rgb_array`), or what
    an agent observes."""
    size: tuple[int, ...] = (64,)
    """Rows and columns of a frame, in pixels; one number: of both; 0: as the pictures are. They are
    scaled by the mean of the pixels that become one."""
    crop: tuple[int, ...] = ()
    """First row, first column, rows and columns of the part of a picture that is kept, such as all
    but a strip of instruments. Empty: whole pictures."""
    frame_skip: int = 1
    """Steps of the environment per frame, with the same action; their rewards are added up."""
    policy: str = "sticky"
    """Who plays. `random`: a new action of the action space in each frame; `sticky`: as random, but
    keeps doing the same for a while; `FILE.py:function`: function(observation, action_space,
    generator) returns an action."""
    stickiness: float = 0.9
    """Probability that `sticky` does the same again in the next frame."""
    warmup: tuple[int, ...] = (0,)
    """Frames to play before the first that is kept: a random number below this one; or two: from
    the first on, and below the second."""
    names: tuple[str, ...] = ()
    """Names of the actions, or of the entries of an action; empty: as the environment says."""
    keys: tuple[str, ...] = ()
    """Key map of the card, each CONTROL=NAME or CONTROL=NAME:VALUE, as `Space=fire`
    or `KeyA=steering:-1`; empty: by the names of the actions."""
    fps: float = 0.0
    """Frames per second at which the episodes are meant to be watched; 0: as the environment
    says."""
    pixel_art: bool = False
    """Frames are drawn in hard-edged pixels, which a player should not smooth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, frame_skip=self.frame_skip)
        at_least(
            0, fps=self.fps, crop=min(self.crop, default=0), warmup=min(self.warmup, default=0)
        )
        if len(self.warmup) not in (1, 2) or self.warmup[0] > self.warmup[-1]:
            raise ValueError(f"warmup must be one number or two, ascending, got {self.warmup}")
        if self.crop and (len(self.crop) != 4 or 0 in self.crop[2:]):
            raise ValueError(f"crop needs a first row, a first column, rows, columns: {self.crop}")
        if len(self.size) not in (1, 2) or min(self.size) < 0 or 0 in self.size[1:]:
            raise ValueError(f"size must be 0, one number or rows and columns, got {self.size}")
        if not 0 <= self.stickiness < 1:
            raise ValueError(f"stickiness must lie in [0, 1), got {self.stickiness}")
        for pair in self.make:
            if not pair.partition("=")[0].isidentifier() or "=" not in pair:
                raise ValueError(f"make needs KEY=VALUE, got {pair!r}")
        if self.policy not in RULES and ":" not in self.policy:
            raise ValueError(
                f"policy must be {', '.join(RULES)} or FILE.py:function, got {self.policy!r}"
            )

    @property
    def card(self) -> DataCard:
        return self._player.card

    @property
    def decisive(self) -> dict[str, Any]:
        settings = super().decisive
        # It changes the card alone, which is compared besides.
        del settings["pixel_art"]
        if self.policy not in RULES:
            content = Path(self.policy.rpartition(":")[0]).read_bytes()
            settings["policy_digest"] = hashlib.blake2b(content, digest_size=16).hexdigest()
        return settings

    def play(self, split: Split, episode: int) -> Played:
        return self._player.play(episode)

    def close(self) -> None:
        if self in _players:
            _players.pop(self).close()

    @property
    def _player(self) -> Player:
        if self not in _players:
            _players[self] = Player(self)
        return _players[self]


_players: dict[GymRecording, Player] = {}
"""The environment of this process, which takes time to make."""


@atexit.register
def _close_players() -> None:
    for recording in list(_players):
        recording.close()


TOGETHER, MAX_WAITING = 16, 4
# Pictures that are handed over to be scaled at once, since each handing over stops the environment
# for a while, and how many such lots wait: more would only take memory.


class Sticky:
    """Picks actions of a space at random, each part for a while: others go on meanwhile."""

    def __init__(
        self, space: gymnasium.Space[Any], stickiness: float, generator: np.random.Generator
    ) -> None:
        self._space, self._spec = space, conditions_of(space)
        self._stickiness, self._generator = stickiness, generator
        self._sizes = [part.size for part in parts_of(self._spec)]
        self._held: np.ndarray | None = None
        self._action: Any = None

    def __call__(self, _: Any) -> Any:
        new = self._generator.random(len(self._sizes)) >= self._stickiness
        if self._held is None or new.any():
            drawn = np.atleast_1d(flat(self._spec, self._space.sample()))
            held = drawn if self._held is None else self._held
            self._held = np.where(np.repeat(new, self._sizes), drawn, held)
            single = self._spec.num_actions > 0
            self._action = unflat(self._spec, int(self._held[0]) if single else self._held)
        return self._action


class Player:
    """Plays episodes, each a function of the settings and its number; close it at the end.

    Raises:
        ValueError: no such environment, a package it needs is not installed, it has no pictures,
            an action space that cannot be recorded, or no such policy.
    """

    def __init__(self, settings: GymRecording) -> None:
        self._settings = settings
        self._scaler = ThreadPoolExecutor(1, "scaler")
        self._env = make(settings.env, settings.frames_from, settings.make, settings.register)
        try:
            self._policy = _policy(settings)
            space = self._env.action_space
            spec, names = self._conditions(space)
            observation, _ = self._env.reset(seed=settings.seed)
            self._shape = self._picture(observation).shape
            height, width = self._size()
            self.card = DataCard(
                height=height,
                width=width,
                fps=self._fps(),
                conditions=spec,
                action_names=names,
                key_map=read_key_map(settings.keys, spec, names),
                pixel_art=settings.pixel_art,
            )
        except BaseException:
            self._env.close()
            raise

    def close(self) -> None:
        self._scaler.shutdown()
        self._env.close()

    def play(self, episode: int) -> Played:
        """Play an episode; one that ends in its warm-up is thrown away and another one begun."""
        settings = self._settings
        for restart in range(MAX_RESTARTS):
            generator = np.random.default_rng((settings.seed, episode, restart))
            played = self._try_to_play(generator)
            if played is not None:
                return played
        raise ValueError(
            f"{settings.env}: none of {MAX_RESTARTS} episodes lasted its warmup of up to "
            f"{settings.warmup[-1]} frames"
        )

    def _try_to_play(self, generator: np.random.Generator) -> Played | None:
        settings, env, space = self._settings, self._env, self._env.action_space
        observation, _ = env.reset(seed=int(generator.integers(2**31)))
        least, most = (0, *settings.warmup)[-2:]
        warmup = int(generator.integers(least, most)) if least < most else least
        space.seed(int(generator.integers(2**31)))
        choose = self._chooser(generator)
        lots, waiting, actions, rewards = [], [], [], []
        terminated = truncated = False
        for step in range(-warmup, settings.frames):
            action, reward = choose(observation), 0.0
            for _ in range(settings.frame_skip):
                observation, gained, terminated, truncated, _ = env.step(action)
                reward += float(gained)
                if terminated or truncated:
                    break
            if step >= 0:
                # Copied: some environments draw into one array again and again.
                waiting.append(np.array(self._picture(observation), order="C"))
                if len(waiting) == TOGETHER:
                    lots.append(self._scaler.submit(self._scaled, waiting))
                    waiting = []
                    if len(lots) > MAX_WAITING:
                        lots[-MAX_WAITING].result()
                actions.append(action)
                rewards.append(reward)
            if terminated or truncated:
                break
        if not actions:
            return None
        last = self._scaled(waiting)
        return Played(
            pixels=np.stack([picture for lot in lots for picture in lot.result()] + last),
            actions=np.stack([flat(self.card.conditions, action) for action in actions]),
            rewards=tuple(rewards),
            terminated=bool(terminated),
            truncated=bool(truncated),
        )

    def _chooser(self, generator: np.random.Generator) -> Choice:
        """Return what picks the actions of one episode."""
        space, settings = self._env.action_space, self._settings
        if self._policy is not None:
            ask = self._policy

            def asked(observation: Any) -> Any:
                action = ask(observation, space, generator)
                if not space.contains(action):
                    raise ValueError(f"{settings.policy} returned {action!r}, no action of {space}")
                return action

            return asked
        if settings.policy == "random":
            return lambda _: space.sample()
        return Sticky(space, settings.stickiness, generator)

    def _picture(self, observation: Any) -> np.ndarray:
        """Return what is seen now, at its own size, always the same."""
        settings = self._settings
        seen = self._env.render() if settings.frames_from == "render" else observation
        picture = check_picture(seen, settings.env, settings.frames_from)
        if settings.crop:
            top, left, height, width = settings.crop
            if top + height > picture.shape[0] or left + width > picture.shape[1]:
                raise ValueError(
                    f"{settings.env}: its pictures are {picture.shape[0]} x {picture.shape[1]}, "
                    f"which have no crop {settings.crop} (first row and column, rows, columns)"
                )
            picture = picture[top : top + height, left : left + width]
        if picture.shape != getattr(self, "_shape", picture.shape):
            raise ValueError(
                f"{settings.env}: its first picture was {self._shape[0]} x {self._shape[1]} and "
                f"now one is {picture.shape[0]} x {picture.shape[1]}; needed one size"
            )
        return picture

    def _size(self) -> tuple[int, int]:
        """Return rows and columns of a frame."""
        asked = self._settings.size
        if asked == (0,):
            return self._shape[0], self._shape[1]
        return asked[0], asked[-1]

    def _scaled(self, pictures: list[np.ndarray]) -> list[np.ndarray]:
        height, width = self.card.height, self.card.width
        if self._shape[:2] == (height, width):
            return pictures
        images = (Image.fromarray(picture) for picture in pictures)
        return [np.asarray(one.resize((width, height), Image.Resampling.BOX)) for one in images]

    def _fps(self) -> float:
        fps = self._settings.fps or fps_of(self._env) / self._settings.frame_skip
        if not fps:
            name = self._settings.env
            raise ValueError(f"{name} does not say its frames per second; needed --fps NUMBER")
        return fps

    def _conditions(self, space: gymnasium.Space[Any]) -> tuple[ConditionSpec, tuple[str, ...]]:
        """Say what steers a world that is trained on this, and the names of that."""
        settings = self._settings
        try:
            spec = conditions_of(space)
        except ValueError as error:
            raise ValueError(f"{settings.env}: {error}") from error
        num = spec.num_actions or spec.action_dim
        names = settings.names or own_names(self._env.unwrapped, spec)
        if len(names) != num:
            raise ValueError(
                f"{settings.env} needs {num} names of actions, got {len(names)}: {', '.join(names)}"
            )
        return named(spec, names), names


def _policy(settings: GymRecording) -> Callable[[Any, Any, np.random.Generator], Any] | None:
    """Return the function of a file that plays, if one does (ValueError: there is none)."""
    path, _, name = settings.policy.rpartition(":")
    if not path:
        return None
    file = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(f"policy_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"policy {settings.policy}: needed a Python file, there is none at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(f"{path} has no function {name!r}{did_you_mean(name, known)}")
    return function
