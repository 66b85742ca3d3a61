"""Batches of clips from a source: seeded, shared out among processes, resumable at any batch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from scd.common.config import at_least
from scd.common.memory import check_free
from scd.data.clip import Batch, Clip
from scd.data.source import Source
from scd.data.spaces import OnError

EPISODE_ORDER, CLIP_START, INSTEAD = 0, 1, 2
"""What a draw is for: the last part of its seed."""

MAX_DRAWS = 64
"""Clips that are drawn, one instead of the other, until one can be read."""

logger = logging.getLogger(__name__)


class UnreadableClip(ValueError):
    """A clip that the source has and does not give: says which file, why, and what helps."""

    @staticmethod
    def of(source: Source, episode: int, error: Exception) -> UnreadableClip:
        """Return what is raised where an episode could not be read, and not skipped."""
        return UnreadableClip(
            f"{_named(source, episode, error)}: repair or remove it, or leave such clips out by "
            "--data.on-error skip"
        )


class Loader:
    """Random clips of equal length, one from each episode per pass over the source.

    In each pass the episodes are put in a new order and dealt out to the processes, so that no two
    of them meet the same episode; the episodes left over sit out this pass. A clip begins at
    random within its episode. Batch `index` is a function of the seed, the rank and the index
    alone: training that continues at step n asks for batch n and needs no other state.

    Under `on_error` "skip" a clip that cannot be read is left out: another is drawn instead, of the
    episodes that this process has in the pass, by the clip's number alone. So the batches are the
    same for whoever meets the same files.

    Args:
        source: where the clips come from.
        batch_size: clips per batch of this process.
        num_frames: frames per clip.
        seed: the same on all processes.
        rank: number of this process.
        num_ranks: how many processes share the source.
        workers: threads that read ahead in `stream`.
        on_error: what becomes of a clip that cannot be read: "stop" raises it.

    Raises:
        ValueError: a number out of range, no episode long enough, or fewer than processes.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        num_frames: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        workers: int = 2,
        on_error: OnError = "stop",
    ) -> None:
        at_least(1, batch_size=batch_size, num_frames=num_frames, workers=workers)
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must lie in 0 .. {num_ranks - 1}, got {rank}")
        at_least(0, seed=seed)
        what = f"a batch of {batch_size} clips of {num_frames} frames of {source.name}"
        check_free(what, 4 * batch_size * num_frames * source.frame_size, torch.device("cpu"))
        self.source = source
        self.batch_size = batch_size
        self.num_frames = num_frames
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.workers = workers
        self.on_error = on_error
        self.left_out: dict[str, str] = {}
        """Episodes of which clips were left out, and why the first of them was."""
        lengths = np.array([source.num_frames(i) for i in range(source.num_episodes)], np.int64)
        self._episodes = np.flatnonzero(lengths >= num_frames)
        if not len(self._episodes):
            raise ValueError(
                f"clips of {num_frames} frames were asked for, but the longest of "
                f"{len(lengths)} episodes has {lengths.max(initial=0)}"
            )
        if len(self._episodes) < num_ranks:
            raise ValueError(
                f"{num_ranks} processes need at least as many episodes, "
                f"got {len(self._episodes)} of {num_frames} frames or more"
            )
        if len(self._episodes) < len(lengths):
            logger.warning(
                "left out %d of %d episodes that are shorter than %d frames",
                *(len(lengths) - len(self._episodes), len(lengths), num_frames),
            )
        self._share = len(self._episodes) // num_ranks
        self._last_order: tuple[int, np.ndarray] | None = None

    def batch(self, index: int) -> Batch:
        """Return a batch by its number.

        Raises:
            UnreadableClip: a clip cannot be read; under "skip": nor can any of many others.
        """
        if index < 0:
            raise ValueError(f"batches are numbered from 0, got {index}")
        first = index * self.batch_size
        return Batch.of([self._clip(first + place) for place in range(self.batch_size)])

    def stream(self, start: int = 0) -> Generator[Batch, None, None]:
        """Yield batch `start` and all that follow, read ahead by threads.

        An error of a thread is raised in the place of its batch; the stream is over then.
        """
        pending: deque[Future[Batch]] = deque()
        num_threads = torch.get_num_threads()
        # More threads with OpenMP teams of their own than cores would put the teams to sleep after
        # every operation: training on two cores became twice as slow.
        pool = ThreadPoolExecutor(
            self.workers, "loader", initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            index = start
            while True:
                while len(pending) < 2 * self.workers:
                    pending.append(pool.submit(self.batch, index))
                    index += 1
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            # PyTorch reports, and gives to new threads, the number that was set last by any thread.
            torch.set_num_threads(num_threads)

    def _clip(self, number: int) -> Clip:
        """Return this process's clip by its number since the beginning of training, or the one that
        stands in for it."""
        why = ""
        for draw in range(MAX_DRAWS):
            episode, start = self._place(number, draw)
            try:
                return self.source.read(episode, start, self.num_frames)
            except (ValueError, OSError) as error:
                if self.on_error == "stop":
                    raise UnreadableClip.of(self.source, episode, error) from error
                why = _named(self.source, episode, error)
                if self.left_out.setdefault(self.source.title(episode), why) is why:
                    logger.warning("left out a clip, another is read instead: %s", why)
        raise UnreadableClip(
            f"none of {MAX_DRAWS} clips drawn in turn can be read, the last: {why}"
        )

    def _place(self, number: int, draw: int) -> tuple[int, int]:
        """Return episode and first frame of a clip, or of the one that is drawn instead."""
        epoch, place = divmod(number, self._share)
        if draw:
            generator = np.random.default_rng((self.seed, number, self.rank, draw, INSTEAD))
            episode = int(generator.choice(self._order(epoch)))
        else:
            episode = int(self._order(epoch)[place])
            generator = np.random.default_rng((self.seed, epoch, episode, CLIP_START))
        last_start = self.source.num_frames(episode) - self.num_frames
        return episode, int(generator.integers(last_start + 1))

    def _order(self, epoch: int) -> np.ndarray:
        """Return the episodes of this process in one pass."""
        last = self._last_order
        if last is None or last[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch, EPISODE_ORDER))
            order = generator.permutation(self._episodes)[: self._share * self.num_ranks]
            last = self._last_order = (epoch, order[self.rank :: self.num_ranks])
        return last[1]


def read_clips(
    source: Source, places: Sequence[tuple[int, int]], num_frames: int, on_error: OnError
) -> list[Clip]:
    """Read clips of given episodes and first frames; under "skip" without the unreadable ones.

    Raises:
        UnreadableClip: one cannot be read; under "skip": none can.
    """
    clips = [read_clip(source, *place, num_frames, on_error) for place in places]
    found = [clip for clip in clips if clip is not None]
    if clips and not found:
        raise UnreadableClip(
            f"{source.name}: none of {len(clips)} {source.split} clips can be read"
        )
    return found


def read_clip(
    source: Source, episode: int, start: int, num_frames: int, on_error: OnError
) -> Clip | None:
    """Read one clip; None: it cannot be read, and is skipped, with a warning.

    Raises:
        UnreadableClip: it cannot be read, and is not skipped.
    """
    try:
        return source.read(episode, start, num_frames)
    except (ValueError, OSError) as error:
        if on_error == "stop":
            raise UnreadableClip.of(source, episode, error) from error
        logger.warning("left out a clip: %s", _named(source, episode, error))
        return None


def _named(source: Source, episode: int, error: Exception) -> str:
    """Say why an episode cannot be read, beginning with its file."""
    title = source.title(episode)
    return str(error) if title in str(error) else f"{title}: {error}"
