"""The page of `scd play` in a real browser: first frame, frames per second, action to drawn frame.

    python benchmarks/browser.py [RUN] --seconds 30 --out FILE

needs playwright and a Chromium in the PATH. The browser is open before the command starts, as a
player's is; then keys go down and up at random. What is read is what the page itself shows.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro
from playwright.sync_api import Page, sync_playwright
from started import started

from scd.common.config import to_json
from scd.common.files import text_lines
from scd.common.provenance import provenance, write_json

KEYS = ("ArrowUp", "ArrowLeft", "ArrowRight")
"""What is pressed."""

START_S = 120.0
"""Seconds to wait for the command and for the first frame."""


@dataclass(frozen=True, kw_only=True)
class BrowserConfig:
    """A measurement."""

    run: Annotated[str, tyro.conf.Positional] = "cars"
    """World, run or step folder."""
    seconds: float = 30.0
    """Of playing, after as many of warming up as `warm_up`."""
    warm_up: float = 5.0
    """Seconds that are played before."""
    fps: int = 0
    """Frames per second that the page asks for, one of its choices; 0: as many as there are."""
    hard_pixels: bool = False
    """Switch smooth pixels off: what does enlarging them cost?"""
    presses_per_s: float = 3.0
    """Keys that go down per second, on average."""
    seed: int = 0
    """Of the keys and their times."""
    out: str = ""
    """JSON file of the result; empty: none."""
    picture: str = ""
    """PNG file of the page at the end, while a key is held; empty: none."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.warm_up < 0 or self.presses_per_s <= 0:
            raise ValueError("needed seconds and presses_per_s above 0, and warm_up of 0 or more")


def frame_of(page: Page) -> int:
    """Return the number of the newest drawn frame; -1: there is none."""
    text = page.locator("#frame").inner_text()
    return int(text) if text.isdecimal() else -1


def press(page: Page, config: BrowserConfig, draw: random.Random, seconds: float) -> None:
    """Press and release keys for some time."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        key = draw.choice(KEYS)
        page.keyboard.down(key)
        page.wait_for_timeout(1000 * draw.uniform(0.05, 0.5) / config.presses_per_s)
        page.keyboard.up(key)
        page.wait_for_timeout(1000 * draw.expovariate(config.presses_per_s))


def take_picture(page: Page, path: Path) -> None:
    """Hold a key until a frame has obeyed it, and keep what is seen then."""
    page.keyboard.down(KEYS[-1])
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    page.keyboard.up(KEYS[-1])


def browser_processes() -> list[psutil.Process]:
    """Return the processes of the browser that this one started."""
    children = psutil.Process().children(recursive=True)
    return [one for one in children if "chrom" in one.name()]


def busy_s(processes: list[psutil.Process]) -> float:
    """Return the seconds that processors have spent on some processes."""
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def memory_mb(number: int) -> float:
    """Return the most memory that a process has held, in millions of bytes; by Linux alone."""
    lines = text_lines(Path(f"/proc/{number}/status"))
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def meter(page: Page, name: str) -> float:
    """Return a number of the page's panel."""
    return float(page.locator(f"[data-number='{name}']").first.inner_text())


def measure(config: BrowserConfig) -> dict[str, Any]:
    """Play in a browser and return what the page showed.

    Raises:
        FileNotFoundError: there is no Chromium.
        ValueError: the command did not start, or no frame came.
    """
    names = ("chromium", "chromium-browser", "chrome", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        raise FileNotFoundError(f"needed a browser in the PATH, one of {', '.join(names)}")
    draw = random.Random(config.seed)
    with sync_playwright() as driver:
        # A container has no sandbox to give.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        begin = time.perf_counter()
        words = ["play", config.run, "--no-browser", "--port", "0"]
        with started(words) as (address, number):
            listening_s = time.perf_counter() - begin
            page.goto(address)
            while frame_of(page) < 1:
                if time.perf_counter() - begin > START_S:
                    raise ValueError(f"no frame came within {START_S:.0f} s")
                page.wait_for_timeout(10)
            first_frame_s = time.perf_counter() - begin
            page.locator("#speed").select_option(str(config.fps or ""))
            if config.hard_pixels:
                page.get_by_text("smooth pixels").click()
            page.locator("#view").focus()
            press(page, config, draw, config.warm_up)
            busy = busy_s(browser_processes())
            frames, since = frame_of(page), time.perf_counter()
            press(page, config, draw, config.seconds)
            played = time.perf_counter() - since
            num = frame_of(page) - frames
            result = {
                "listening_s": listening_s,
                "first_frame_s": first_frame_s,
                "frames_per_s": num / played,
                "action_to_frame_p50_ms": meter(page, "p50"),
                "action_to_frame_p99_ms": meter(page, "p99"),
                "encoder_ms": meter(page, "encoder"),
                "decoder_ms": meter(page, "decoder"),
                "browser_ms": meter(page, "browser"),
                "browser_busy_ms_per_frame": 1000 * (busy_s(browser_processes()) - busy) / num,
                "server_memory_mb": memory_mb(number),
                "steps": meter(page, "steps"),
            }
            if config.picture:
                take_picture(page, Path(config.picture))
            page.close()
        browser.close()
    return {
        "settings": to_json(config),
        "timed": "from the command to the first drawn frame, the browser being open; frames drawn "
        "over the seconds played; from the event of a key to the frame that obeys it being drawn",
    } | result


def main(config: BrowserConfig) -> int:
    """Measure, print and keep; return the exit status."""
    try:
        result = measure(config) | provenance()
    except (ValueError, OSError) as error:
        print(f"browser.py: {error}", file=sys.stderr)
        return 2
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:24} {value:8.2f}")
    if config.out:
        write_json(result, Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BrowserConfig, description=__doc__)))
