"""Processes of one command that share its work: started by torchrun or accelerate, or only one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from scd.common.config import parse_shard
from scd.common.launcher import TOGETHER, asks_for_cpu, check_device, check_launch, num_started
from scd.common.runtime import choose_device

PATIENCE = timedelta(days=7)
"""How long processes wait for each other: units of long clips take long, and a process that fails
is noticed by the launcher, which ends the others."""


def started_device(name: str) -> torch.device:
    """Return the named device as `choose_device`, but for "auto" the CPU where accelerate was told
    so; refuse one that the launcher speaks against (ValueError)."""
    device = torch.device("cpu") if name == "auto" and asks_for_cpu() else choose_device(name)
    check_device(device.type)
    return device


def check_all_joined(number: int) -> None:
    """Refuse to work by fewer processes than were started (ValueError)."""
    if number != num_started():
        raise ValueError(
            f"{num_started()} processes were started, but they do not see each other (each counts "
            f"{number}): start them by {TOGETHER}"
        )


class Processes:
    """This process among those that share the work. `wait` for the others, `end` at the end."""

    def __init__(self, device: str, precision: str = "fp32") -> None:
        """Join the others, if there are any.

        Args:
            device: auto, cpu, cuda, cuda:N or mps; with several processes each takes a GPU of its
                own.
            precision: of the work, which a launcher may ask for too.

        Raises:
            ValueError: no such device here, or a launcher that asks for something else.
        """
        check_launch(precision)
        self.device = started_device(device)
        self._state: PartialState | None = None
        if num_started() > 1:
            self._state = PartialState(cpu=self.device.type == "cpu", timeout=PATIENCE)
            check_all_joined(self._state.num_processes)
            assert self._state.device is not None
            self.device = torch.device(self._state.device)

    @property
    def rank(self) -> int:
        return 0 if self._state is None else self._state.process_index

    @property
    def number(self) -> int:
        return 1 if self._state is None else self._state.num_processes

    def share(self, shard: str) -> tuple[int, int]:
        """Return which part of the work is this process's, from 0, and how many parts there are.

        Args:
            shard: i/n of processes that do not know of each other; "0/1" if there are none.

        Raises:
            ValueError: no such form, or processes that a launcher started as well.
        """
        if self.number == 1:
            return parse_shard(shard)
        if shard != "0/1":
            raise ValueError(
                f"{self.number} processes were started together and share the work already: leave "
                f"out --shard {shard}"
            )
        return self.rank, self.number

    def wait(self) -> None:
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Let the first process do a with block before the others."""
        if self.rank:
            self.wait()
        yield
        if not self.rank:
            self.wait()

    def gather(self, value: Any) -> list[Any]:
        """Return what each of them gives, in their order; all must call it."""
        return [value] if self._state is None else gather_object([value])

    def end(self) -> None:
        if self._state is not None:
            self._state.destroy_process_group()
