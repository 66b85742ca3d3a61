"""Load test of `scd serve`: are frames right, shares fair and memory constant with rough clients?

    python benchmarks/load.py RUN --clients 8 --duration-s 1800

starts `scd serve RUN` on a free port of this machine and lets clients join, play, stall, reset,
leave, come back, disconnect without closing, upload pictures, fetch snapshots and restore them.
Every frame is compared with that of a local rollout, so a frame of another session would be
noticed. Resident memory is compared with what was promised: to sessions, and to what is under way.
`--kills N` kills the server N times, with signal 9, and starts it again: clients come back to their
sessions, which must go on from a copy that is no older than the server says. Then one client plays
alone, then all at once: are their shares equal, and how many more frames do they get together?

Time counts while this process runs: where all of it is stopped for a while, as a laptop that is
shut or a machine that is lent to another, that time is left out, and what clients meet right after
it is counted apart. Exit status 1 if a check fails.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import tyro
from guests import LEFT, NOW, Guest, LoadConfig, Server, Tally, ask, references

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.serving.client import Client

MEMORY_LIMIT, FAIR_LIMIT, PROMISE_LIMIT = 0.05, 0.10, 1.25
"""How much memory may grow, how much slower than the fastest the slowest may be, and how much more
may be resident than before the first client and was promised since."""

WARM_S = 300.0
"""After which memory is flat, or a third of a shorter time: before, libraries are loaded and pools
grow."""


def play_fairly(config: LoadConfig, url: str, clients: int) -> list[int]:
    """Have some play at once as fast as they can; return how many frames each got."""
    counts = [0] * clients
    gate = threading.Barrier(clients)

    def play(number: int) -> None:
        with Client(url) as client:
            client.create(seed=number)
            client.step()
            gate.wait(60)
            client.run()
            until = time.monotonic() + config.fair_s
            for received in client.frames():
                counts[number] += not received.header.shown
                if time.monotonic() >= until:
                    break
            client.close()

    threads = [threading.Thread(target=play, args=(one,)) for one in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def metrics_of(url: str) -> dict[str, float]:
    """Return the numbers that the server tells."""
    lines = ask("GET", f"{url}metrics").decode().splitlines()
    return {
        name: float(value) for name, value in (one.rsplit(" ", 1) for one in lines if one[0] != "#")
    }


def promised(metrics: dict[str, float]) -> float:
    """Return the bytes that sessions, and what comes and goes, may have at this moment."""
    return metrics["scd_reserved_bytes"] + metrics["scd_under_way_bytes"]


class Look(NamedTuple):
    """At a server that runs."""

    life: int
    """How often it had been killed before."""
    since_s: float
    """Since it was started."""
    size: int
    """Bytes that are resident."""
    promised: float
    """Bytes."""
    faults: float
    """Of the server, since it was started."""


def look(server: Server) -> Look | None:
    """Look at a server; None: it is killed at this moment."""
    life = len(server.killed_at)
    try:
        metrics, size = metrics_of(server.url), server.process.memory_info().rss
    except (*LEFT, psutil.Error):
        if server.is_up.is_set() and life == len(server.killed_at):
            raise
        return None
    since_s, faults = NOW() - server.begun, metrics["scd_faults_total"]
    return Look(life, since_s, size, promised(metrics), faults)


def come_and_go(
    config: LoadConfig, server: Server, wanted: list[np.ndarray], tally: Tally
) -> list[Look]:
    """Let clients come and go for the time that is asked for; look at the server each second."""
    begin = NOW()
    until = begin + config.duration_s
    kills = [
        begin + config.duration_s / 3 * (one + 1) / config.kills for one in range(config.kills)
    ]
    guests = [
        threading.Thread(target=Guest(config, server, wanted, tally, one).visit, args=(until,))
        for one in range(config.clients)
    ]
    for guest in guests:
        guest.start()
    looks = []
    while any(guest.is_alive() for guest in guests):
        if kills and NOW() >= kills[0]:
            kills.pop(0)
            server.kill()
        if (found := look(server)) is not None:
            looks.append(found)
        time.sleep(1.0)
    return looks


def load(config: LoadConfig) -> dict[str, Any]:
    """Make the load and return what was seen."""
    wanted, tally = references(config), Tally()
    with tempfile.TemporaryDirectory(prefix="scd-load-") as folder:
        server = Server(config, folder)
        try:
            looks = come_and_go(config, server, wanted, tally)
            (alone,) = play_fairly(config, server.url, 1)
            counts = play_fairly(config, server.url, config.clients)
            health, metrics = json.loads(ask("GET", f"{server.url}health")), metrics_of(server.url)
        finally:
            server.stop()
    faults = {one.life: one.faults for one in looks}
    faults[len(server.killed_at)] = metrics["scd_faults_total"]
    lived = [one for one in looks if one.life == len(server.killed_at)]
    if not lived or not any(one.promised for one in lived[len(lived) // 3 :]):
        raise ValueError("needed a longer duration-s: the last start took as long as was left")
    warm_s = min(WARM_S, lived[-1].since_s / 3)
    later = [one for one in lived if one.since_s >= warm_s]
    third, most_promised = max(1, len(later) // 3), max(one.promised for one in later)
    ends = [median(one.size for one in part) for part in (later[:third], later[-third:])]
    return {
        "settings": to_json(config),
        "counts": dict(sorted(tally.counts.items())),
        "faults": dict(Counter(fault[:100] for fault in tally.faults).most_common(20)),
        "num_faults": len(tally.faults),
        "stood_still_s": round(NOW.still_s, 1),
        "faults_after_standing_still": tally.still[:20],
        "waited_most_s": round(tally.waited_s, 2),
        "lost_frames": sorted(tally.lost)[-10:],
        "came_back": len(tally.lost),
        "healthy": health["ok"],
        "server_faults": sum(faults.values()),
        "evictions": metrics["scd_evictions_total"],
        "restores": metrics["scd_restores_total"],
        "memory_over_s": round(later[-1].since_s - later[0].since_s, 1),
        "memory_growth": ends[1] / ends[0] - 1,
        "memory_mib": round(later[-1].size / 2**20, 1),
        "bare_mib": round(server.bare / 2**20, 1),
        "most_promised_mib": round(most_promised / 2**20, 1),
        "over_promise": (max(one.size for one in later) - server.bare) / most_promised,
        "fair_frames": counts,
        "fair_frames_per_s": sum(counts) / config.fair_s,
        "alone_frames_per_s": alone / config.fair_s,
        "over_alone": sum(counts) / alone,
        "unfairness": 1 - min(counts) / max(counts),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """Name the checks that a result fails."""
    checks = {
        "faults seen by clients": result["num_faults"] == 0,
        "faults of the server": result["healthy"] and result["server_faults"] == 0,
        f"memory grew by more than {MEMORY_LIMIT:.0%}": result["memory_growth"] <= MEMORY_LIMIT,
        f"memory beyond {PROMISE_LIMIT} times the promise": result["over_promise"] <= PROMISE_LIMIT,
        f"unfair by more than {FAIR_LIMIT:.0%}": result["unfairness"] <= FAIR_LIMIT,
    }
    return [name for name, holds in checks.items() if not holds]


def main(config: LoadConfig) -> int:
    """Make the load, print and keep what was seen; 1 where a check fails."""
    result = load(config)
    print(json.dumps(result, indent=2))
    if config.out:
        write_json({"result": result} | provenance(), Path(config.out))
    failed = failures(result)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LoadConfig)))
