"""How often something may happen: a bucket of tokens that fills steadily."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MOST_CALLERS = 4096
"""Callers whose buckets are remembered; beyond, the one that was quiet longest starts afresh."""


class Bucket:
    """Allows `rate` events a second on average, and `burst` at once."""

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin full.

        Args:
            rate: events per second.
            burst: events at once.
            clock: seconds, from any point on.
        """
        self._rate, self._burst, self._clock = rate, max(1.0, burst), clock
        self._level, self._time = self._burst, clock()

    def take(self) -> bool:
        """Return whether one more event is allowed now, and count it if so."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._time) * self._rate)
        self._time = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class Buckets:
    """One bucket for each caller."""

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """As `Bucket`, for each of them."""
        self._make = lambda: Bucket(rate, burst, clock)
        self._of: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, caller: str) -> bool:
        """Return whether this caller is allowed one more now."""
        bucket = self._of.pop(caller, None) or self._make()
        self._of[caller] = bucket
        if len(self._of) > MOST_CALLERS:
            self._of.popitem(last=False)
        return bucket.take()
