"""Serving by several checkouts in turns: what frames, snapshots and restores cost.

    python benchmarks/serving.py HERE BASE --rounds 5

In each round every checkout serves the same world once, in a process of its own: to one client, to
eight at once, and then it writes snapshots and restores them. Clients ask over HTTP, which all
versions answer alike; a frame is made, written as JPEG and packed. Taken are the time by the clock
and the processor time of the server, which other work on the machine changes less. Ratios are those
of the first checkout to each of the others in one round: their median, smallest and largest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil
import tyro

from scd.common.provenance import provenance, write_json


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """What is compared."""

    checkouts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of this project; the first is compared with each of the others."""
    world: str = "scd/worlds/doom"
    """World of each checkout, in its folder."""
    rounds: int = 5
    """Turns of each."""
    frames: int = 100
    """Of each client; 100 at most."""
    clients: int = 8
    """That play at once, after one alone."""
    files: int = 10
    """Snapshots that are written and restored."""
    threads: int = 1
    """Of each server's arithmetic, so that its processor time is that of the work."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        least = min(self.rounds, self.frames, self.clients, self.files, self.threads)
        if len(self.checkouts) < 2 or least < 1:
            raise ValueError("needed two or more checkouts, and every number 1 or more")


def ask(method: str, url: str, body: bytes | None = None) -> bytes:
    """Make a request, without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, method=method), timeout=120) as answer:
        return answer.read()


def play(url: str, seed: int, frames: int) -> str:
    """Play in a new session as fast as frames are made; return its id."""
    made = json.loads(ask("POST", f"{url}/v1/sessions", json.dumps({"seed": seed}).encode()))
    body = json.dumps({"count": frames}).encode()
    answer = json.loads(ask("POST", f"{url}/v1/sessions/{made['session']}/step", body))
    assert len(answer["frames"]) == frames
    return made["session"]


def played(url: str, seed: int, frames: int) -> None:
    """Play, and delete the session."""
    ask("DELETE", f"{url}/v1/sessions/{play(url, seed, frames)}")


def serve_once(config: ServingConfig, checkout: str) -> dict[str, float]:
    """Serve by one checkout; return milliseconds of each thing, `wall` and `cpu` of the server."""
    words = [sys.executable, "-m", "scd", "serve", config.world, "--port", "0", "--device", "cpu"]
    words += ["--max-fps", "1000", "--sessions", str(config.clients + 2)]
    environment = os.environ | {
        "PYTHONPATH": checkout,
        "OMP_NUM_THREADS": str(config.threads),
    }
    found: dict[str, float] = {}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, cwd=checkout, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip().rstrip("/")
            if not url.startswith("http://"):
                raise ValueError(f"{checkout} did not start a server")
            server = psutil.Process(process.pid)

            def timed(name: str, count: int, work: Callable[[], None]) -> None:
                cpu, began = sum(server.cpu_times()[:2]), time.perf_counter()
                work()
                wall_s = time.perf_counter() - began
                found[f"{name}, wall"] = 1e3 * wall_s / count
                found[f"{name}, cpu"] = 1e3 * (sum(server.cpu_times()[:2]) - cpu) / count

            def play_all() -> None:
                threads = [
                    threading.Thread(target=played, args=(url, seed, config.frames))
                    for seed in range(config.clients)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

            played(url, 0, 10)
            timed("frame of 1", config.frames, lambda: played(url, 1, config.frames))
            timed(f"frame of {config.clients}", config.frames * config.clients, play_all)
            sessions = f"{url}/v1/sessions"
            made = play(url, 3, 50)
            files: list[bytes] = []
            timed(
                "snapshot",
                config.files,
                lambda: files.extend(
                    ask("POST", f"{sessions}/{made}/snapshot") for _ in range(config.files)
                ),
            )

            def restore() -> None:
                for file in files:
                    state = json.loads(ask("POST", f"{sessions}/restore", file))
                    ask("DELETE", f"{sessions}/{state['session']}")

            timed("restore", config.files, restore)
        finally:
            process.terminate()
    return found


def main(config: ServingConfig) -> int:
    """Serve in turns, print what each took and the ratios."""
    checkouts = [str(Path(one).absolute()) for one in config.checkouts]
    rounds: list[list[dict[str, float]]] = []
    for number in range(config.rounds):
        rounds.append([serve_once(config, one) for one in checkouts])
        print(f"round {number + 1} of {config.rounds}", file=sys.stderr, flush=True)
    result: dict[str, dict[str, list[float]]] = {}
    for name in rounds[0][0]:
        medians = [median(one[place][name] for one in rounds) for place in range(len(checkouts))]
        line = f"{name:20}" + "".join(f"{one:10.3f}" for one in medians)
        result[name] = {"ms": medians}
        for place in range(1, len(checkouts)):
            ratios = sorted(one[0][name] / one[place][name] for one in rounds)
            result[name][f"ratio to {place + 1}"] = [median(ratios), ratios[0], ratios[-1]]
            line += f"   {median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"
        print(line)
    if config.out:
        write_json({"result": result} | provenance(), Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(ServingConfig)))
