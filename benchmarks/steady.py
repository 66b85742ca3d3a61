"""How long one steady client waits for its frames, alone and beside others that come and go.

    python benchmarks/steady.py scd/worlds/doom --clients 7 --rounds 4 --part-s 8

starts one server. In turns, A B A B, a client asks for a frame at the pace of the world, first
alone, then while `--clients` others do what benchmarks/load.py has them do. Ratios are those of a
part beside others to the part before it: their median, smallest and largest.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import tyro
from guests import NOW, Guest, LoadConfig, Server, Tally, references

from scd.common.provenance import provenance, write_json
from scd.serving.client import Client


@dataclass(frozen=True, kw_only=True)
class SteadyConfig:
    """What is measured."""

    run: Annotated[str, tyro.conf.Positional]
    """World, run or step folder."""
    clients: int = 7
    """Beside the steady one."""
    rounds: int = 4
    """Parts of each kind."""
    part_s: float = 8.0
    """Of a part."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= 64 or self.rounds < 1 or not 0 < self.part_s <= 3600:
            raise ValueError("needed 1 .. 64 clients, 1 or more rounds and a part_s up to 3600")


def waits(client: Client, pace_s: float, part_s: float) -> np.ndarray:
    """Ask for frames at a pace, and return how many milliseconds each took."""
    taken, begin = [], time.monotonic()
    due = begin
    while due - begin < part_s:
        time.sleep(max(0.0, due - time.monotonic()))
        asked = time.perf_counter()
        client.step()
        taken.append(1e3 * (time.perf_counter() - asked))
        # Who was late does not hurry.
        due = max(due + pace_s, time.monotonic())
    return np.asarray(taken)


def main(config: SteadyConfig) -> int:
    """Measure, and print what came of it."""
    settings = LoadConfig(run=config.run, clients=config.clients + 1)
    wanted, tally, parts = references(settings), Tally(), []
    with tempfile.TemporaryDirectory(prefix="scd-steady-") as folder:
        server = Server(settings, folder)
        try:
            with Client(server.url, timeout_s=120.0) as client:
                client.create()
                pace_s = 1 / client.welcome.world.fps
                waits(client, pace_s, 2.0)
                for number in range(config.rounds):
                    alone = waits(client, pace_s, config.part_s)
                    guests = [
                        Guest(settings, server, wanted, tally, config.clients * number + one)
                        for one in range(config.clients)
                    ]
                    until = NOW() + config.part_s
                    threads = [threading.Thread(target=one.visit, args=(until,)) for one in guests]
                    for thread in threads:
                        thread.start()
                    beside = waits(client, pace_s, config.part_s)
                    for thread in threads:
                        thread.join()
                    parts.append((alone, beside))
        finally:
            server.stop()
    result: dict[str, object] = {"faults": tally.faults, "frames": tally.counts["frames"]}
    for percent in (50, 99):
        found = [tuple(float(np.percentile(one, percent)) for one in part) for part in parts]
        ratios = sorted(beside / alone for alone, beside in found)
        result[f"p{percent}_ms"] = [
            median(one[0] for one in found),
            median(one[1] for one in found),
        ]
        result[f"p{percent}_ratio"] = [median(ratios), ratios[0], ratios[-1]]
    print(result)
    if config.out:
        write_json({"result": result} | provenance(), Path(config.out))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(SteadyConfig)))
