"""Episodes of ViZDoom: somebody walks through a maze or a level and looks around.

Needs the extra `doom`: pip install -e ".[doom]".
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from scd.common.config import at_least
from scd.data.record import Played, Recording
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec, Split

Scenario = Literal["my_way_home", "map01"]

ACTION_NAMES = ("none", "forward", "left", "right")

BUTTONS = ([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1])
"""What is pressed for each action: forward, turn left, turn right."""

TICS_PER_S = 35
"""Speed of the game."""

ACTION_SHARES = (0.05, 0.6, 0.175, 0.175)
"""How often the policy picks each action when it picks anew."""

KEEP_PROBABILITY = (0.7, 0.93, 0.75, 0.75)
"""How often the policy does each action again: it walks 14 in a row on average and turns 4."""

BLOCKED_SPEED = 1.0
# Map units per tic; walking freely ends at 8. Gaining that speed takes about 20 actions.

BLOCKED_AFTER = 4
# Actions until the walk is faster than BLOCKED_SPEED even from standing.

BUMP = 0.6
# A walk that drops below this share of its speed within one action has met a wall.

MAX_WARMUP = 200
# Actions before the first frame of map01, where every game starts at one place.

MAX_RESTARTS = 100
# Games of a random walk that end early are rare: a seed that meets so many in a row is broken.


@dataclass(frozen=True, kw_only=True)
class DoomRecording(Recording):
    """Record ViZDoom: a random walk through a maze or a level."""

    kind = "doom"

    size: Literal[32, 64, 128] = 64
    """Height and width of a frame, in pixels."""
    scenario: Scenario = "my_way_home"
    """`my_way_home`: a maze of textured rooms; `map01`: the first level of Freedoom: Phase 2."""
    tics: int = 2
    """Steps of the game per action and frame; the game does 35 a second."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, tics=self.tics)

    @property
    def card(self) -> DataCard:
        require_vizdoom()
        return DataCard(
            height=self.size,
            width=self.size,
            fps=TICS_PER_S / self.tics,
            conditions=ConditionSpec(num_actions=len(ACTION_NAMES)),
            action_names=ACTION_NAMES,
        )

    def play(self, split: Split, episode: int) -> Played:
        if self not in _games:
            _games[self] = DoomGame(self.scenario, self.size, self.tics)
        return _games[self].play(self.seed, episode, self.frames)

    def close(self) -> None:
        if self in _games:
            _games.pop(self).close()


_games: dict[DoomRecording, DoomGame] = {}
"""The game of this process: starting one takes as long as playing 300 frames."""


@atexit.register
def _close_games() -> None:
    for recording in list(_games):
        recording.close()


def require_vizdoom() -> Any:
    """Return the package ViZDoom; ValueError: it is not installed."""
    try:
        import vizdoom
    except ImportError as error:
        raise ValueError('Doom needs ViZDoom: pip install -e ".[doom]"') from error
    return vizdoom


class DoomGame:
    """A game that is started once and plays any number of episodes; close it at the end.

    Each episode is a function of the constructor's settings, the seed and the episode's number.

    Args:
        scenario: `my_way_home`, a maze of textured rooms in which one starts at a random place, or
            `map01`, the first level of Freedoom: Phase 2 without monsters.
        size: height and width of the pictures: 32, 64 or 128 pixels.
        tics: steps of the game per action; the game does 35 a second.

    Raises:
        ValueError: another size, no tics, or ViZDoom is not installed.
    """

    def __init__(self, scenario: Scenario, size: int, tics: int) -> None:
        self._vizdoom = require_vizdoom()
        if size not in (32, 64, 128):
            raise ValueError(f"size must be 32, 64 or 128, got {size}")
        at_least(1, tics=tics)
        self._scenario, self._size, self._tics = scenario, size, tics
        self._scratch = tempfile.TemporaryDirectory()
        self._game = self._start()

    def __enter__(self) -> DoomGame:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._game.close()
        self._scratch.cleanup()

    def play(self, seed: int, episode: int, num_frames: int) -> Played:
        """Play an episode by a random policy that likes to walk and keeps doing the same.

        A game that ends before its last frame is thrown away and another one is begun.
        """
        for restart in range(MAX_RESTARTS):
            generator = np.random.default_rng((seed, episode, restart))
            played = self._try_to_play(generator, num_frames)
            if played is not None:
                return played
        raise ValueError(
            f"{self._scenario}: none of {MAX_RESTARTS} games lasted {num_frames} frames"
        )

    def _try_to_play(self, generator: np.random.Generator, num_frames: int) -> Played | None:
        game = self._game
        game.set_seed(int(generator.integers(2**31)))
        game.new_episode()
        pixels = np.empty((num_frames, self._size, self._size, 3), np.uint8)
        actions = np.empty(num_frames, np.int64)
        warmup = int(generator.integers(MAX_WARMUP)) if self._scenario == "map01" else 0
        action, num_forward, turns_left, speed = 0, 0, 0, 0.0
        for step in range(-warmup, num_frames):
            place = self._place()
            game.make_action(BUTTONS[action], self._tics)
            if game.is_episode_finished():
                return None
            if step >= 0:
                pixels[step] = shrink(game.get_state().screen_buffer, self._size)
                actions[step] = action
            last_speed = speed
            speed = float(np.linalg.norm(self._place() - place)) / self._tics
            num_forward = num_forward + 1 if action == 1 else 0
            # A wall: turn away from it for a while, or half of all frames would show bare walls.
            if turns_left:
                turns_left -= 1
            elif num_forward > BLOCKED_AFTER and speed < max(BLOCKED_SPEED, BUMP * last_speed):
                action = 2 + int(generator.integers(2))
                turns_left = int(generator.integers(4, 16))
            elif generator.random() > KEEP_PROBABILITY[action]:
                action = int(generator.choice(len(ACTION_NAMES), p=ACTION_SHARES))
        return Played(pixels, actions)

    def _place(self) -> np.ndarray:
        """Return where the player stands (x, y), in map units."""
        names = self._vizdoom.GameVariable
        return np.array(
            [self._game.get_game_variable(name) for name in (names.POSITION_X, names.POSITION_Y)]
        )

    def _start(self) -> Any:
        vizdoom = self._vizdoom
        game = vizdoom.DoomGame()
        # Otherwise the game writes its settings into the working directory, as it does a folder of
        # its own on starting.
        game.set_doom_config_path(os.path.join(self._scratch.name, "_vizdoom.ini"))
        if self._scenario == "my_way_home":
            game.set_doom_scenario_path(
                os.path.join(vizdoom.scenarios_path, f"{self._scenario}.wad")
            )
        else:
            game.set_doom_game_path(str(Path(vizdoom.__file__).with_name("freedoom2.wad")))
            game.add_game_args("-nomonsters")
        game.set_doom_map("map01")
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        resolutions = vizdoom.ScreenResolution
        is_large = self._size == 128
        game.set_screen_resolution(resolutions.RES_512X384 if is_large else resolutions.RES_256X192)
        game.set_render_hud(False)
        game.set_render_weapon(False)
        game.set_render_crosshair(False)
        game.set_render_messages(False)
        button = vizdoom.Button
        game.set_available_buttons([button.MOVE_FORWARD, button.TURN_LEFT, button.TURN_RIGHT])
        game.set_episode_start_time(10)
        game.set_episode_timeout(0)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_mode(vizdoom.Mode.PLAYER)
        with contextlib.chdir(self._scratch.name):
            game.init()
        return game


def shrink(picture: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Cut the middle square out of a picture and average whole blocks of its pixels.

    The picture is wider than high, and its height is a multiple of `size`.
    """
    height, width, _ = picture.shape
    block, rest = divmod(height, size)
    assert rest == 0 and width >= height
    left = (width - height) // 2
    square = picture[:, left : left + height]
    total = np.zeros((size, size, 3), np.uint16)
    for row in range(block):
        for column in range(block):
            total += square[row::block, column::block]
    return ((total + block**2 // 2) // block**2).astype(np.uint8)
