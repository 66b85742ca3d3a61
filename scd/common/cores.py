"""Cores that nobody in this process works on: a call that can be cut into parts uses them too.

One thread that asks for a clip alone has it read by several; where threads fill the cores already,
each does its own work, since more would only get in each other's way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Cores:
    """Counts who works, and lends threads: `take` some, then `run` as many parts.

    Args:
        number: how many there are; None: those that the process may use.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = number or num_cores()
        self._begin()
        if hasattr(os, "register_at_fork"):
            # A forked process has neither the threads nor those who took them.
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._num_taken = 0
        self._threads = ThreadPoolExecutor(max(1, self.number - 1), "parts")

    @contextmanager
    def take(self, most: int) -> Iterator[int]:
        """Take up to so many of the cores that are left, the caller's own one in any case, and give
        them back at the end of a with block; returns how many."""
        with self._lock:
            number = max(1, min(most, self.number - self._num_taken))
            self._num_taken += number
        try:
            yield number
        finally:
            with self._lock:
                self._num_taken -= number

    def run(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """Run the first part here and each other in a thread of its own, and return what they give;
        the first part's error counts first."""
        others = [self._threads.submit(part) for part in parts[1:]]
        try:
            first = parts[0]()
        finally:
            # Nothing goes on after the caller has left.
            for one in others:
                one.exception()
        return [first, *(one.result() for one in others)]
