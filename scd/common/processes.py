"""Processes of one command that share its work: started by torchrun or accelerate, or only one."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from scd.common.runtime import choose_device

PATIENCE = timedelta(days=7)
"""How long processes wait for each other: units of long clips take long, and a process that fails
is noticed by the launcher, which ends the others."""


def num_started() -> int:
    """Return how many processes share the work, as their launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """This process among those that share the work. `wait` for the others, `end` at the end."""

    def __init__(self, device: str) -> None:
        """Join the others, if there are any.

        Args:
            device: auto, cpu, cuda or cuda:N; with several processes each takes a GPU of its own.

        Raises:
            ValueError: no such device here.
        """
        self.device = choose_device(device)
        self._state: PartialState | None = None
        if num_started() > 1:
            self._state = PartialState(cpu=self.device.type == "cpu", timeout=PATIENCE)
            assert self._state.device is not None
            self.device = torch.device(self._state.device)

    @property
    def rank(self) -> int:
        return 0 if self._state is None else self._state.process_index

    @property
    def number(self) -> int:
        return 1 if self._state is None else self._state.num_processes

    def wait(self) -> None:
        if self._state is not None:
            self._state.wait_for_everyone()

    def end(self) -> None:
        if self._state is not None:
            self._state.destroy_process_group()
