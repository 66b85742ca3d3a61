"""Sessions that visitors leave, thousands in a row: is the next one served, and what does it cost?

`python tools/abandoned.py --run WORLD --count 10000` starts `scd serve` on this machine alone,
opens that many sessions, half of them over a WebSocket that is cut off, and plays a frame in each.
It fails where a visitor is refused or waits for a second, or where the disk goes over its limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from scd.serving.client import Client

SERVED_S = 1.0
"""Within which a visitor has a session."""


@dataclass(frozen=True, kw_only=True)
class AbandonedConfig:
    """How many come and go."""

    run: str = ""
    """World; empty: the one of the package."""
    count: int = 10_000
    """Sessions that are opened and left."""
    most_s: float = 3600.0
    """Seconds after which no more are opened."""
    sessions: int = 8
    """In memory at once."""
    kept_sessions: int = 200
    """On disk at once."""
    kept_gib: float = 1.0
    """Of all on disk."""
    memory_gib: float = 1.0
    """Of all in memory."""


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except FileNotFoundError:
            continue
    return sum(sizes)


def ask(url: str, method: str = "GET", body: Any = None) -> Any:
    """Make a request, without a proxy."""
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, method=method), timeout=60) as answer:
        return json.loads(answer.read())


def visit(url: str, number: int) -> float:
    """Open a session, play a frame and leave it; return the seconds until it was there."""
    began = time.monotonic()
    if number % 2:
        session = ask(f"{url}/v1/sessions", "POST", {"seed": number})["session"]
        waited = time.monotonic() - began
        ask(f"{url}/v1/sessions/{session}/step", "POST", {})
        return waited
    with Client(url) as client:
        client.create(seed=number)
        waited = time.monotonic() - began
        client.step()
        # As where a machine is switched off: no message says goodbye.
        client._socket.socket.close()
    return waited


def measure(config: AbandonedConfig, url: str, folder: Path) -> dict[str, Any]:
    """Have them all come and go; return what was seen."""
    most, over, begun = [0], threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(0.05):
            most[0] = max(most[0], disk_bytes(folder))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    waited, refused = [], 0
    for number in range(config.count):
        if time.monotonic() - begun > config.most_s:
            break
        try:
            waited.append(visit(url, number))
        except Exception as error:
            refused += 1
            print(f"visitor {number}: {type(error).__name__}: {error}", flush=True)
    over.set()
    watcher.join()
    health = ask(f"{url}/health")
    return {
        "settings": asdict(config),
        "visitors": len(waited) + refused,
        "refused": refused,
        "seconds": round(time.monotonic() - begun, 1),
        "waited_p50_s": round(float(np.percentile(waited, 50)), 4),
        "waited_p99_s": round(float(np.percentile(waited, 99)), 4),
        "waited_most_s": round(max(waited), 4),
        "late": sum(one >= SERVED_S for one in waited),
        "disk_most_bytes": most[0],
        "disk_limit_bytes": health["max_disk_bytes"],
        "health": health,
    }


def main(config: AbandonedConfig) -> int:
    """Start the server, measure, and say what does not hold."""
    with tempfile.TemporaryDirectory(prefix="scd-abandoned-") as name:
        words = [sys.executable, "-m", "scd", "serve", *([config.run] if config.run else [])]
        words += ["--port", "0", "--evict-dir", name, "--sessions", str(config.sessions)]
        words += ["--kept-sessions", str(config.kept_sessions)]
        words += ["--kept-gib", str(config.kept_gib), "--memory-gib", str(config.memory_gib)]
        words += ["--limits.requests-per-s", "1000000"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                url = server.stdout.readline().strip().rstrip("/")
                result = measure(config, url, Path(name))
            finally:
                server.terminate()
    print(json.dumps(result, indent=1))
    is_within = result["disk_most_bytes"] <= result["disk_limit_bytes"]
    return 0 if is_within and not result["refused"] and not result["late"] else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(AbandonedConfig)))
