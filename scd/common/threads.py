"""How many CPU threads a repeated piece of work gets: measured while it is done.

A second thread brings nothing where products are small, and costs tenfold where another process
wants its core: the threads wait for each other at every operation. Both depend on the machine and
on what else it does just now, so work that goes on for long is timed with one number and another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import torch

from scd.common.config import Threads

Search = Generator[int, tuple[float, int], None]
"""Yields the number of threads of the next piece, and is sent its seconds and its size."""

NUM_WARM = 2
"""First pieces of all, which also pay for what is set up once."""

NUM_MEASURED, MEASURED_S = 4, 0.2
"""Pieces and seconds that a number is measured for, at least."""

LONG_S = 2.0
"""Seconds of a piece from which on one measures enough, and small steps of the number too little.
"""

WORTH_IT = 1.05
"""How much slower fewer threads may be and yet be preferred: others are in their way less often."""

HOPELESS = 1.5, 4.0
"""Times the seconds of the best number from which on another is given up: on measured pieces, and
on the first one, which also pays for the change."""

NUM_TRIALS, CROWDED = 10, 6.0
"""Rounds of small products by which a number is tried before it gets a piece, and times one
thread's seconds from which on it gets none: cores are taken, and a piece could take a hundred times
as long."""

SLOWER = 1.5
"""Times the measured seconds, median of the newest pieces, at which all is measured again."""

NUM_NEWEST, NUM_PATIENT = 5, 30
"""Pieces of that median, and pieces between two measurements at least."""

PATIENCE_S, LONGEST_PATIENCE_S = 300.0, 2400.0
"""Seconds until all is measured again anyway; doubled whenever that has changed nothing."""


class ThreadChoice:
    """The number of threads for pieces of work of equal size, one after another on the CPU.

    `piece` is put around each. The first pieces are done with 1, 2, 3, 4, 6, 8, ... threads as long
    as that is faster, and the best number stays; later ones compare it with its neighbours, soon
    when pieces become slow and else now and then. Nothing is done twice.

    Args:
        threads: a fixed number; or "auto": one that is measured, at most as many as PyTorch has at
            this moment, which is one a core or what OMP_NUM_THREADS says.
        active: whether there is anything to measure: not where the work is done on a GPU, or by
            several processes, which wait for each other. Then "auto" changes nothing.
        small: whether to begin with one thread, and not with all.
        known: number and seconds of a piece that an earlier process measured; it stays at that
            number until pieces are slower, or for PATIENCE_S.
        report: called whenever numbers were compared, with the seconds of a piece by number of
            threads, and the number that was chosen.
    """

    def __init__(
        self,
        threads: Threads = "auto",
        *,
        active: bool = True,
        small: bool = True,
        known: tuple[int, float] = (0, 0.0),
        report: Callable[[Mapping[int, float], int], None] | None = None,
    ) -> None:
        self._before = torch.get_num_threads()
        limit = self._before if threads == "auto" else threads
        self._ladder = ladder(limit)
        self._report = report
        self.chosen = 1 if small and threads == "auto" and active else limit
        """The number that is not being compared with others just now."""
        self.number = self.chosen
        """Threads of the next piece."""
        self.piece_s = 0.0
        """Seconds of a piece with the chosen number, as it was measured; 0: none was measured yet,
        or there is no choice."""
        self._last_s = 0.0
        self._search: Search | None = None
        if threads == "auto" and active and limit > 1:
            if known[0] in self._ladder and known[1] > 0:
                self.chosen, self.piece_s = known
            self._search = self._go_on()
            self.number = next(self._search)

    @contextmanager
    def piece(self, amount: int = 1) -> Iterator[None]:
        """Do what is in a with block with the chosen number of threads, and time it.

        Args:
            amount: its size, such as its frames, where pieces differ in it: then it is the seconds
                of one frame that are compared.
        """
        # Again and again: a reader thread that sets its own number sets that of MKL for all.
        torch.set_num_threads(self.number)
        began = time.perf_counter()
        yield
        self._last_s = time.perf_counter() - began
        if self._search is not None:
            self.number = self._search.send((self._last_s, amount))

    def close(self) -> None:
        """Give the process the threads that it had."""
        torch.set_num_threads(self._before)

    def __enter__(self) -> ThreadChoice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _go_on(self) -> Search:
        patience = PATIENCE_S
        if not self.piece_s:
            for _ in range(NUM_WARM):
                if (yield self.chosen)[0] > LONG_S:
                    break
            yield from self._compare()
        while True:
            yield from self._watch(patience)
            before = self.chosen
            yield from self._compare()
            unchanged = self.chosen == before
            patience = min(2 * patience, LONGEST_PATIENCE_S) if unchanged else PATIENCE_S

    def _watch(self, patience_s: float) -> Search:
        """Stay at a number until it is time to measure again."""
        newest, count, began = deque[float](maxlen=NUM_NEWEST), 0, time.perf_counter()
        while True:
            seconds, amount = yield self.chosen
            newest.append(seconds / amount)
            count += 1
            # 30 pieces that take long may take an hour.
            enough = NUM_NEWEST if seconds > LONG_S else NUM_PATIENT
            is_slow = count >= enough and median(newest) > SLOWER * self.piece_s
            if is_slow or time.perf_counter() - began > patience_s:
                return

    def _compare(self) -> Search:
        """Measure the present number and its neighbours, and go on to where it is faster."""
        place, found = self._ladder.index(self.chosen), dict[int, float]()
        found[place] = yield from self._measure(place)
        # Where pieces are so long, products are large, and each trial costs.
        is_long = self._last_s > LONG_S
        for direction in (-1, 1):
            start = place
            while (beyond := self._beyond(place, direction, is_long)) >= 0:
                found[beyond] = yield from self._measure(beyond, found[place])
                fewer, more = sorted((place, beyond))
                if (found[fewer] <= WORTH_IT * found[more]) != (fewer == beyond):
                    break
                place = beyond
            if place != start:
                break
        self.chosen, self.piece_s = self._ladder[place], found[place]
        if self._report is not None:
            measured = {self._ladder[at]: found[at] for at in sorted(found)}
            self._report({n: s for n, s in measured.items() if s < float("inf")}, self.chosen)

    def _beyond(self, place: int, direction: int, is_long: bool) -> int:
        """Return the next place to try, upwards the last one if pieces are long; -1: none."""
        beyond = place + direction
        if not 0 <= beyond < len(self._ladder):
            return -1
        return len(self._ladder) - 1 if direction > 0 and is_long else beyond

    def _measure(
        self, place: int, best_s: float = float("inf")
    ) -> Generator[int, tuple[float, int], float]:
        """Return the seconds of a piece with a number of threads; fewer pieces if it is hopeless.

        The first piece does not count: kernels are prepared anew for another number.
        """
        number = self._ladder[place]
        if best_s < float("inf") and crowded(number):
            return float("inf")
        seconds, amount = yield number
        if seconds / amount > HOPELESS[1] * best_s:
            return seconds / amount
        pieces: list[tuple[float, int]] = []
        while True:
            pieces.append((yield number))
            total_s, total = (sum(side) for side in zip(*pieces, strict=True))
            fastest = min(seconds / amount for seconds, amount in pieces)
            is_enough = len(pieces) >= NUM_MEASURED and total_s >= MEASURED_S
            if is_enough or pieces[-1][0] > LONG_S or fastest > HOPELESS[0] * best_s:
                return total_s / total


def crowded(number: int) -> bool:
    """Tell whether so many threads get in each other's way, by many small products in turns with
    one thread: cores are then taken by other work."""
    if number == 1:
        return False
    one, weights = torch.ones(256, 256), torch.ones(256, 256)
    before = torch.get_num_threads()
    taken: dict[int, float] = {1: 0.0, number: 0.0}
    try:
        for _ in range(NUM_TRIALS):
            for threads in taken:
                torch.set_num_threads(threads)
                torch.mm(one, weights)
                began = time.perf_counter()
                for _ in range(4):
                    torch.mm(one, weights)
                taken[threads] += time.perf_counter() - began
    finally:
        torch.set_num_threads(before)
    return taken[number] > CROWDED * taken[1]


def ladder(limit: int) -> list[int]:
    """Return the numbers of threads that are tried, ascending, up to the most that there may be.

    The last but one is among them: it leaves a core to somebody else.
    """
    powers = [2**exponent for exponent in range(limit.bit_length())]
    numbers = {1, limit - 1, limit, *powers, *(3 * power for power in powers)}
    return sorted(number for number in numbers if 1 <= number <= limit)
