"""Processor seconds of a frame of one world for one user and for several who share its calls.

    python benchmarks/users.py wan-1.3b@128x224 --users 1,2 --context 9 --steps 4 --out FILE

takes rounds of each number of users in turns, on one engine and one thread, windows full. What is
read is the processor's time of this process, so that other work on the machine counts little.
Latents are not decoded: each user has an autoencoder of his own, whose calls are not shared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

from scd.bench.case import Case
from scd.bench.streams import Timed, fill_window
from scd.common.config import StreamPrecision, at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.models.config import EngineKind
from scd.streaming.sessions import Session, Streams


@dataclass(frozen=True, kw_only=True)
class UsersConfig:
    """A measurement."""

    model: Annotated[str, tyro.conf.Positional]
    """As `scd bench --model` takes it."""
    users: str = "1,2"
    """Numbers of users; all are compared with the first."""
    context: int = 9
    """Frames of the full window."""
    steps: int = 4
    """Denoising steps."""
    rounds: int = 4
    """Frames of each user in each number of users, in turns, after one that does not count."""
    engine: EngineKind = "fast"
    """What runs the model."""
    precision: StreamPrecision = "bf16"
    """Of weights, KV cache and products."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        at_least(1, context=self.context, steps=self.steps, rounds=self.rounds)
        at_least(1, users=min(self.numbers))

    @property
    def numbers(self) -> list[int]:
        """Numbers of users (ValueError: others than whole ones)."""
        return [int(word) for word in self.users.split(",")]


class Users:
    """Users of one engine, each with a prompt and a past of his own, always a frame under way."""

    def __init__(self, timed: Timed, number: int) -> None:
        """Open the sessions, windows full."""
        self.timed, case = timed, timed.case
        self.streams = Streams(timed.world, timed.engine, max_rows=number, window=case.context)
        self.sessions = [self.streams.adopt(timed.begun()) for _ in range(number)]
        for session in self.sessions:
            fill_window(session.rollout.state, timed.engine, timed.generator)

    def frame(self) -> float:
        """Return the processor seconds in which every user gets a frame."""
        began = time.process_time()
        for session in self.sessions:
            self._ask(session)
        while self.streams.is_busy:
            for ended in self.streams.tick():
                assert ended.error is None, ended.error
        return time.process_time() - began

    def _ask(self, session: Session) -> None:
        actions = self.timed.actions(1)
        self.streams.request(session, None if actions is None else actions[0])


def measure(config: UsersConfig) -> dict[str, Any]:
    """Time all numbers of users in turns."""
    torch.set_num_threads(1)
    case = Case(
        model=config.model,
        context=config.context,
        steps=config.steps,
        engine=config.engine,
        precision=config.precision,
    )
    timed = Timed(case, torch.device("cpu"))
    parties = {number: Users(timed, number) for number in config.numbers}
    seconds: dict[int, list[float]] = {number: [] for number in parties}
    for round_number in range(config.rounds + 1):
        for number, party in parties.items():
            took = party.frame()
            if round_number:
                seconds[number].append(took)
    first, *_ = parties
    one = first / median(seconds[first])
    return {
        "users": [
            {
                "users": number,
                "seconds": took,
                "frames_per_processor_second": number / median(took),
                "times_the_first": number / median(took) / one,
            }
            for number, took in seconds.items()
        ]
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    config = tyro.cli(UsersConfig, args=arguments, description=__doc__)
    try:
        result = measure(config)
    except (ValueError, OSError) as error:
        print(f"users.py: {error}", file=sys.stderr)
        return 2
    for line in result["users"]:
        print(
            f"{line['users']} users: {line['frames_per_processor_second']:.3g} latent frames per "
            f"processor second, {line['times_the_first']:.2f} times the first"
        )
    if config.out:
        write_json({"config": to_json(config), **result, **provenance()}, Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
