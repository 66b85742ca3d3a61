"""A wish to stop a long loop cleanly: SIGINT, SIGTERM, or a time limit."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C at a terminal; what job schedulers send before they kill."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work early."""

    def __init__(self, signal_name: str, message: str) -> None:
        super().__init__(message)
        self.signal_name = signal_name

    @property
    def exit_status(self) -> int:
        """What shells expect of a command that a signal ended: 128 and the signal's number."""
        return 128 + signal.Signals[self.signal_name]


class StopRequest:
    """Notes signals instead of dying of them, for the time of a with block; ask it with `reason`.

    A second signal of either kind interrupts at once (Interrupted). Outside the main thread
    signals cannot be caught, and only the time limit holds.
    """

    def __init__(self, time_limit_s: float = 0.0) -> None:
        """Start the clock.

        Args:
            time_limit_s: seconds from now after which to stop. 0: none.
        """
        self.signal_name = ""
        self._deadline = time.monotonic() + time_limit_s if time_limit_s else None
        self._limit_s = time_limit_s
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Why to stop, in words; empty while there is no reason."""
        if self.signal_name:
            return f"received {self.signal_name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"the time limit of {self._limit_s:g} s is over"
        return ""

    def interrupted(self, step: int, max_steps: int, folder: Path | None) -> Interrupted:
        """Return what a training raises that a signal ended after it was saved; None: nowhere."""
        saved = f"saved {folder}, and the same command goes on from there"
        return Interrupted(
            self.signal_name,
            f"{self.signal_name} after step {step} of {max_steps}: "
            f"{saved if folder else 'nothing is kept'}",
        )

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {one: signal.signal(one, self._note) for one in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one, handler in self._previous.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal_name:
            raise Interrupted(name, f"interrupted at once by a second signal, {name}")
        self.signal_name = name
