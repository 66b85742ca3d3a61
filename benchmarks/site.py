"""A site of `scd export web` in a real browser, beside `scd play` in the same one.

    python benchmarks/site.py SITE [RUN] --seconds 30 --minutes 10 --out FILE

needs playwright and a Chromium in the PATH. First frames with an empty and with a warm cache,
frames per second, action to drawn frame, the memory of page and worker over time, and whether the
oldest frame that can be gone back to is that very frame.
"""

from __future__ import annotations

import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro
from browser import BrowserConfig, frame_of, measure, meter, press
from playwright.sync_api import Page, sync_playwright

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.export.serve_site import site_server

FULL = 2300
"""Frames with which the history of a site is full, a clip before them included."""

START_S = 120.0
"""Seconds to wait for a first frame."""


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """A measurement."""

    site: Annotated[str, tyro.conf.Positional]
    """Folder that scd export web wrote."""
    run: Annotated[str, tyro.conf.Positional] = ""
    """The same world for scd play; empty: the shipped one."""
    starts: int = 5
    """Starts with a warm cache, of which the median is told."""
    seconds: float = 30.0
    """Of playing, for frames per second and the time from a key to its frame."""
    minutes: float = 0.0
    """Of playing on, for memory; 0: none."""
    threads: int = 0
    """Threads of WebAssembly at most; 0: as the page chooses."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.minutes < 0 or self.starts < 1:
            raise ValueError("needed seconds above 0, minutes of 0 or more, and a start or more")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a site; give its address."""
    server = site_server(folder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def first_frame_s(page: Page, address: str) -> float:
    """Open a page; return seconds until it has drawn a frame that was made."""
    began = time.perf_counter()
    page.goto(address)
    page.wait_for_function(
        "() => window.scd?.frame >= 0 || document.getElementById('frame').innerText > 0",
        timeout=1000 * START_S,
    )
    return time.perf_counter() - began


def memory_mib(page: Page) -> float:
    """Return the memory of page and worker, after a collection of garbage."""
    code = "async () => (await performance.measureUserAgentSpecificMemory()).bytes"
    return page.evaluate(code) / 2**20


def memory_over_time(
    page: Page, config: SiteConfig, chosen: BrowserConfig, draw: random.Random
) -> dict[str, Any]:
    """Play on; return frame and memory every half minute, and by how much it grows in the end."""
    samples = []
    until = time.perf_counter() + 60 * config.minutes
    while time.perf_counter() < until:
        press(page, chosen, draw, 30)
        samples.append([frame_of(page), memory_mib(page)])
    # Until as many frames are kept as the page keeps, memory grows.
    full = [memory for frame, memory in samples if frame > FULL]
    growth = full[-1] / full[0] - 1 if full else None
    return {"memory_mib": samples, "memory_growth": growth}


def rewound(page: Page) -> dict[str, Any]:
    """Go back as far as the page does; compare the frame with what it was when it was made."""
    page.locator("#view").focus()
    page.keyboard.press("KeyP")
    page.wait_for_function("() => document.getElementById('status').innerText === 'paused'")
    newest, picture = frame_of(page), "() => document.getElementById('view').toDataURL()"
    page.locator("#strip").press("Home")
    page.wait_for_function("() => !document.getElementById('looking').hidden")
    page.wait_for_timeout(500)
    oldest, made = frame_of(page), page.evaluate(picture)
    began = time.perf_counter()
    page.locator("#view").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('looking').hidden")
    seconds = time.perf_counter() - began
    is_same = frame_of(page) == oldest and page.evaluate(picture) == made
    return {"rewound_frames": newest - oldest, "rewound_same": is_same, "rewind_s": seconds}


def play_site(config: SiteConfig) -> dict[str, Any]:
    """Play a site and return what the page showed."""
    address_tail = f"?threads={config.threads}" if config.threads else ""
    chosen = BrowserConfig(run=config.run, seconds=config.seconds)
    draw = random.Random(chosen.seed)
    with sync_playwright() as driver, served(Path(config.site)) as address:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        cold = first_frame_s(page, address + address_tail)
        warm = [first_frame_s(page, address + address_tail) for _ in range(config.starts)]
        page.locator("#speed").select_option("")
        page.locator("#view").focus()
        press(page, chosen, draw, chosen.warm_up)
        frames, since = frame_of(page), time.perf_counter()
        press(page, chosen, draw, config.seconds)
        result: dict[str, Any] = {
            "backend": page.evaluate("() => scd.backend"),
            "first_frame_cold_s": cold,
            "first_frame_warm_s": median(warm),
            "frames_per_s": (frame_of(page) - frames) / (time.perf_counter() - since),
            "action_to_frame_p50_ms": meter(page, "p50"),
            "action_to_frame_p99_ms": meter(page, "p99"),
            "encoder_ms": meter(page, "encoder"),
            "decoder_ms": meter(page, "decoder"),
        }
        if config.minutes:
            result |= memory_over_time(page, config, chosen, draw) | rewound(page)
        browser.close()
    return result


def main(config: SiteConfig) -> int:
    """Measure, print and keep; return the exit status."""
    try:
        site = play_site(config)
        play = measure(BrowserConfig(run=config.run, seconds=config.seconds))
    except (ValueError, OSError) as error:
        print(f"site.py: {error}", file=sys.stderr)
        return 2
    result = {
        "settings": to_json(config),
        **site,
        "play_frames_per_s": play["frames_per_s"],
        "play_action_to_frame_p50_ms": play["action_to_frame_p50_ms"],
        "ratio": site["frames_per_s"] / play["frames_per_s"],
    } | provenance()
    for name, value in result.items():
        if isinstance(value, (float, int, str)):
            print(f"{name:28} {f'{value:8.2f}' if isinstance(value, float) else value}")
    if config.out:
        write_json(result, Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(SiteConfig, description=__doc__)))
