"""Recordings of the toy world and of Doom as folders of videos and actions (`scd record`)."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import track

from scd.common.config import to_json
from scd.common.files import file_aside, refuse_used, remove_leftovers
from scd.data.clip import ConditionSpec, frames_to_pixels
from scd.data.doom import ACTION_NAMES, TICS_PER_S, DoomGame, require_vizdoom
from scd.data.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    RECORDING,
    Entry,
    append_to_manifest,
    choose_splits,
    read_card,
    read_manifest,
    write_card,
    write_episode,
    write_manifest,
)
from scd.data.source import DataCard, Split
from scd.data.toy import ToyWorld


@dataclass(frozen=True, kw_only=True)
class ToyRecording:
    """Record the toy world: shapes that move about a room, one of them steered."""

    out: str
    """Folder to write; a recording with the same settings in it is continued."""
    episodes: int = 100
    """Number of episodes."""
    frames: int = 300
    """Frames per episode."""
    size: Literal[32, 64] = 32
    """Height and width of a frame, in pixels."""
    seed: int = 0
    """Seed; the same seed and settings give the same files, bit for bit."""
    val_fraction: float = 0.05
    """Share of the episodes that goes to the split `val`."""
    test_fraction: float = 0.05
    """Share of the episodes that goes to the split `test`."""
    workers: int = os.cpu_count() or 1
    """Processes that record side by side."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class DoomRecording:
    """Record ViZDoom: a random walk through a maze or a level."""

    out: str
    """Folder to write; a recording with the same settings in it is continued."""
    episodes: int = 100
    """Number of episodes."""
    frames: int = 300
    """Frames per episode."""
    size: Literal[32, 64, 128] = 64
    """Height and width of a frame, in pixels."""
    seed: int = 0
    """Seed; the same seed and settings give the same files, bit for bit."""
    scenario: Literal["my_way_home", "map01"] = "my_way_home"
    """`my_way_home`: a maze of textured rooms; `map01`: the first level of Freedoom: Phase 2."""
    tics: int = 2
    """Steps of the game per action and frame; the game does 35 a second."""
    val_fraction: float = 0.05
    """Share of the episodes that goes to the split `val`."""
    test_fraction: float = 0.05
    """Share of the episodes that goes to the split `test`."""
    workers: int = os.cpu_count() or 1
    """Processes that record side by side."""

    def __post_init__(self) -> None:
        _check(self)
        if self.tics < 1:
            raise ValueError(f"tics must be 1 or more, got {self.tics}")


Recording = ToyRecording | DoomRecording


def record(config: Recording) -> Path:
    """Record episodes into a folder, going on where an earlier call was interrupted.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something else than a recording with these settings.
        ValueError: ViZDoom is needed and not installed.
    """
    if isinstance(config, DoomRecording):
        require_vizdoom()
    out = Path(config.out)
    card = recording_card(config)
    entries = _begin(out, card, config)
    splits = choose_splits(config.episodes, config.val_fraction, config.test_fraction)
    jobs = [_Job(config, episode, splits[episode]) for episode in range(entries, config.episodes)]
    for entry in track(_run(jobs, config.workers), f"recording {out}", total=len(jobs)):
        append_to_manifest(out, entry)
    return out


def recording_card(config: Recording) -> DataCard:
    """Return the card of what a recording will hold."""
    if isinstance(config, ToyRecording):
        return ToyWorld(size=config.size, split="train").card
    return DataCard(
        height=config.size,
        width=config.size,
        fps=TICS_PER_S / config.tics,
        conditions=ConditionSpec(num_actions=len(ACTION_NAMES)),
        action_names=ACTION_NAMES,
    )


@dataclass(frozen=True)
class _Job:
    """One episode to record."""

    config: Recording
    episode: int
    split: Split


def _begin(out: Path, card: DataCard, config: Recording) -> int:
    """Write the card of a new recording, or check that of an old one; return the episodes done."""
    settings = to_json(config)
    for name in ("out", "episodes", "workers"):
        del settings[name]
    if not (out / CARD_FILE).exists():
        refuse_used(out, "a recording to continue")
        out.mkdir(parents=True, exist_ok=True)
        write_manifest(out, [])
        write_card(out, card, settings)
        return 0
    recorded = json.loads((out / CARD_FILE).read_text()).get(RECORDING)
    if recorded != settings or read_card(out) != card:
        raise FileExistsError(
            f"{out}: holds a recording with other settings: {recorded}, asked for: {settings}"
        )
    for folder in (out, out / "videos", out / "actions"):
        remove_leftovers(folder)
    _drop_torn_line(out)
    entries = read_manifest(out)
    if len(entries) > config.episodes:
        raise FileExistsError(
            f"{out}: holds {len(entries)} episodes already, asked for: {config.episodes}"
        )
    return len(entries)


def _drop_torn_line(out: Path) -> None:
    """Cut off a last line of the manifest that an interruption left without its end."""
    text = (out / MANIFEST_FILE).read_text()
    if text and not text.endswith("\n"):
        with file_aside(out / MANIFEST_FILE) as aside:
            aside.write_text(text[: text.rfind("\n") + 1])


def _run(jobs: list[_Job], workers: int) -> Iterator[Entry]:
    """Record episodes, side by side if there are several workers; yield their lines in order."""
    if workers == 1 or len(jobs) < 2:
        yield from map(_record_episode, jobs)
        _close_games()
        return
    # A forked process could inherit locked locks of this one's threads.
    context = multiprocessing.get_context("spawn")
    # On an interruption from the keyboard, which reaches them too, workers finish their episode and
    # close their games; only this process stops at once.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(min(workers, len(jobs)), context, signal.signal, ignore) as pool:
        pending = deque(pool.submit(_record_episode, job) for job in jobs)
        try:
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _record_episode(job: _Job) -> Entry:
    config = job.config
    if isinstance(config, ToyRecording):
        pixels, actions = _play_toy(config, job.split, job.episode)
    else:
        played = _doom_game(config).play(config.seed, job.episode, config.frames)
        pixels, actions = played.pixels, played.actions
    fps = recording_card(config).fps
    return write_episode(Path(config.out), f"{job.episode:06d}", pixels, actions, fps, job.split)


def _play_toy(config: ToyRecording, split: Split, episode: int) -> tuple[np.ndarray, np.ndarray]:
    world = ToyWorld(size=config.size, split=split, seed=config.seed)
    clip = world.read(episode, 0, config.frames)
    assert clip.actions is not None
    return frames_to_pixels(clip.frames).numpy(), clip.actions.numpy()


_games: dict[DoomRecording, DoomGame] = {}
"""The game of this process: starting one takes as long as playing 300 frames."""


def _doom_game(config: DoomRecording) -> DoomGame:
    if config not in _games:
        _games[config] = DoomGame(config.scenario, config.size, config.tics)
    return _games[config]


@atexit.register
def _close_games() -> None:
    while _games:
        _games.popitem()[1].close()


def _check(config: Recording) -> None:
    for name in ("episodes", "frames", "workers"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(config, name)}")
    if config.seed < 0:
        raise ValueError(f"seed must be 0 or more, got {config.seed}")
    choose_splits(0, config.val_fraction, config.test_fraction)
