"""`scd record`: worlds played by a random policy, as folders of videos and actions.

A world that can be recorded is a subclass of `Recording` in a module of this folder; nothing else
need know of it. It says what all episodes share (`card`) and plays one (`play`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from rich.progress import track

from scd.common.config import at_least, to_json
from scd.data.manifest import (
    Entry,
    append_to_manifest,
    choose_splits,
    write_episode,
)
from scd.data.source import DataCard, find_kinds
from scd.data.spaces import Split
from scd.data.writer import begin_writing


class Played(NamedTuple):
    """One uninterrupted stretch of a world."""

    pixels: UInt8[ndarray, "t h w 3"]
    """What was seen."""
    actions: Int[ndarray, " t"] | Float[ndarray, "t a"]
    """Action i led from picture i-1 to picture i."""
    rewards: tuple[float, ...] | None = None
    """Reward i came with picture i; None: the world knows none."""
    terminated: bool | None = None
    """Whether the world itself ended after the last picture; None: it has no ends."""
    truncated: bool | None = None
    """Whether a limit of time ended it there, the world's own, not the recording's."""


@dataclass(frozen=True, kw_only=True)
class Recording(ABC):
    """Settings of a recording, and how one of its episodes is played.

    An episode is a function of the settings, the split and its number: the same in any process.
    """

    kind: ClassVar[str] = ""
    """Its name: `scd record KIND`."""

    out: str
    """Folder to write; a recording with the same settings in it is continued."""
    episodes: int = 100
    """Number of episodes."""
    frames: int = 300
    """Frames per episode."""
    seed: int = 0
    """Seed; the same seed and settings give the same files, bit for bit."""
    val_fraction: float = 0.05
    """Share of the episodes that goes to the split `val`."""
    test_fraction: float = 0.05
    """Share of the episodes that goes to the split `test`."""
    workers: int = os.cpu_count() or 1
    """Processes that record side by side."""

    def __post_init__(self) -> None:
        at_least(1, episodes=self.episodes, frames=self.frames, workers=self.workers)
        at_least(0, seed=self.seed)
        choose_splits(0, self.val_fraction, self.test_fraction)

    @property
    @abstractmethod
    def card(self) -> DataCard:
        """What all episodes share (ValueError: a package that the world needs is not installed)."""

    @property
    def decisive(self) -> dict[str, Any]:
        """What the episodes follow from: a folder holds those of one such dictionary."""
        settings = to_json(self)
        for name in ("out", "episodes", "workers"):
            del settings[name]
        return settings

    @abstractmethod
    def play(self, split: Split, episode: int) -> Played:
        """Play an episode of `frames` frames, or fewer if the world ends before.

        What takes time to start may be kept for the next.
        """

    def close(self) -> None:  # noqa: B027
        """End what `play` has started in this process."""


_Job = tuple[Recording, int, Split]
"""One episode to record."""


def recordings() -> dict[str, type[Recording]]:
    return find_kinds(Recording)


def record(config: Recording) -> Path:
    """Record episodes into a folder, going on where an earlier call was interrupted.

    Raises:
        FileExistsError: the folder holds something else than a recording with these settings.
        BlockingIOError: another recording is writing it.
        ValueError: a package that the world needs is not installed.
    """
    out, card = Path(config.out), config.card
    num_done, lock = begin_writing(out, card, config.decisive)
    with lock:
        if num_done > config.episodes:
            raise FileExistsError(
                f"{out}: holds {num_done} episodes already, asked for: {config.episodes}"
            )
        splits = choose_splits(config.episodes, config.val_fraction, config.test_fraction)
        jobs: list[_Job] = [(config, i, splits[i]) for i in range(num_done, config.episodes)]
        for entry in track(_run(jobs, config.workers), f"recording {out}", total=len(jobs)):
            append_to_manifest(out, entry)
    return out


def _run(jobs: list[_Job], workers: int) -> Iterator[Entry]:
    """Record episodes, side by side if there are several workers; yield their lines in order."""
    if workers == 1 or len(jobs) < 2:
        yield from _run_here(jobs)
        return
    # A forked process could inherit locked locks of this one's threads.
    context = multiprocessing.get_context("spawn")
    # On an interruption from the keyboard, which reaches them too, workers finish their episode and
    # close their games; only this process stops at once.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(min(workers, len(jobs)), context, signal.signal, ignore) as pool:
        pending = deque(pool.submit(_record_episode, *job) for job in jobs)
        try:
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run_here(jobs: list[_Job]) -> Iterator[Entry]:
    """Record episodes in this process; each is written while the next one is played."""
    written: Future[Entry] | None = None
    with ThreadPoolExecutor(1, "writer") as writer:
        for config, episode, split in jobs:
            played = config.play(split, episode)
            if written is not None:
                yield written.result()
            written = writer.submit(_write, config, episode, split, played)
        if written is not None:
            yield written.result()
    if jobs:
        jobs[0][0].close()


def _record_episode(config: Recording, episode: int, split: Split) -> Entry:
    return _write(config, episode, split, config.play(split, episode))


def _write(config: Recording, episode: int, split: Split, played: Played) -> Entry:
    folder, name = Path(config.out), f"{episode:06d}"
    entry = write_episode(folder, name, played.pixels, played.actions, config.card.fps, split)
    return replace(
        entry,
        rewards=played.rewards,
        terminated=played.terminated,
        truncated=played.truncated,
    )
