"""Calls that wait for the model thread, in order, and at most so many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

from scd.serving.errors import HostStopped, Overloaded


@dataclass(eq=False, kw_only=True)
class Call:
    """Something that the model thread shall do."""

    do: Callable[[Any], Any]
    """Is called with the stage."""
    wakes: str | None = None
    """Session that has to be in memory for it; None: none has to."""
    future: Future[Any] = field(default_factory=Future)
    """Gets what comes of it."""
    num_tries: int = 0
    """How often room was made for it."""

    def succeed(self, value: Any) -> None:
        """Fulfil the future; nothing happens where it is done."""
        try:
            self.future.set_result(value)
        except InvalidStateError:
            pass

    def fail(self, error: BaseException) -> None:
        """Refuse the future; nothing happens where it is done."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            pass


class Inbox:
    """Filled from any thread, emptied by one; once closed, whatever is put in is refused."""

    def __init__(self, max_calls: int) -> None:
        """Begin empty."""
        self.max_calls = max_calls
        self.reason = ""
        self._waiting: deque[Call] = deque()
        # Also those that were taken and are not answered yet.
        self._open: set[Call] = set()
        self._bell = Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, call: Call) -> Future[Any]:
        """Add a call and return its future, which may be refused at once."""
        # A future that waits could be cancelled from outside while it is answered here.
        call.future.set_running_or_notify_cancel()
        with self._bell:
            if self.reason:
                call.fail(HostStopped(self.reason))
            elif len(self._waiting) >= self.max_calls:
                call.fail(Overloaded(f"{self.max_calls} calls wait for the model already"))
            else:
                self._open.add(call)
                self._waiting.append(call)
                self._bell.notify()
                call.future.add_done_callback(lambda _: self._open.discard(call))
        return call.future

    def put_own(self, do: Callable[[], None]) -> None:
        """Add what the host itself wants done, beyond the limit and before all that waits."""
        with self._bell:
            if not self.reason:
                self._waiting.appendleft(Call(do=lambda _: do()))
                self._bell.notify()

    def ring(self) -> None:
        """Wake the thread that waits for a call."""
        with self._bell:
            self._bell.notify()

    def take(self, wait_s: float) -> Call | None:
        """Return the next call, for which to wait at most so long; None: there is none."""
        with self._bell:
            if not self._waiting and wait_s > 0:
                self._bell.wait(wait_s)
            return self._waiting.popleft() if self._waiting else None

    def close(self, reason: str) -> None:
        """Let nothing in any more."""
        with self._bell:
            self.reason = self.reason or reason

    def refuse_all(self, reason: str) -> None:
        """Refuse all that was not answered."""
        with self._bell:
            waiting = [*self._waiting, *self._open]
            self._waiting.clear()
        for call in waiting:
            call.fail(HostStopped(reason))
