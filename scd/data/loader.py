"""Batches of clips from a source: seeded, shared out among processes, resumable at any batch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from scd.common.config import at_least
from scd.data.clip import Batch, Clip
from scd.data.source import Source

EPISODE_ORDER, CLIP_START = 0, 1
"""What a draw is for: the last part of its seed."""

logger = logging.getLogger(__name__)


class Loader:
    """Random clips of equal length, one from each episode per pass over the source.

    In each pass the episodes are put in a new order and dealt out to the processes, so that no two
    of them meet the same episode; the episodes left over sit out this pass. A clip begins at
    random within its episode. Batch `index` is a function of the seed, the rank and the index
    alone: training that continues at step n asks for batch n and needs no other state.

    Args:
        source: where the clips come from.
        batch_size: clips per batch of this process.
        num_frames: frames per clip.
        seed: the same on all processes.
        rank: number of this process.
        num_ranks: how many processes share the source.
        workers: threads that read ahead in `stream`.

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
    ) -> None:
        at_least(1, batch_size=batch_size, num_frames=num_frames, workers=workers)
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must lie in 0 .. {num_ranks - 1}, got {rank}")
        at_least(0, seed=seed)
        self.source = source
        self.batch_size = batch_size
        self.num_frames = num_frames
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.workers = workers
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
        if index < 0:
            raise ValueError(f"batches are numbered from 0, got {index}")
        first = index * self.batch_size
        return Batch.of([self._clip(first + place) for place in range(self.batch_size)])

    def stream(self, start: int = 0) -> Generator[Batch, None, None]:
        """Yield batch `start` and all that follow, read ahead by threads.

        An error of a thread is raised in the place of its batch.
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
        """Return this process's clip by its number since the beginning of training."""
        epoch, place = divmod(number, self._share)
        episode = int(self._order(epoch)[place])
        generator = np.random.default_rng((self.seed, epoch, episode, CLIP_START))
        last_start = self.source.num_frames(episode) - self.num_frames
        start = int(generator.integers(last_start + 1))
        return self.source.read(episode, start, self.num_frames)

    def _order(self, epoch: int) -> np.ndarray:
        """Return the episodes of this process in one pass."""
        last = self._last_order
        if last is None or last[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch, EPISODE_ORDER))
            order = generator.permutation(self._episodes)[: self._share * self.num_ranks]
            last = self._last_order = (epoch, order[self.rank :: self.num_ranks])
        return last[1]
