"""`scd play`: a server on this machine alone, and its page in the browser."""

from __future__ import annotations

import os
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import psutil
import tyro
from rich.console import Console

from scd.serving.run import kept_in, listening, open_service, run_server
from scd.serving.service import Service
from scd.serving.settings import ServeConfig

WATCH_S = 0.02
"""Seconds between two looks whether the page has drawn a frame."""


@dataclass(frozen=True, kw_only=True)
class PlayConfig:
    """A world to play in the browser of this machine."""

    run: str = ""
    """World, run or step folder; empty: the world that comes with the package."""
    data: str = ""
    """Folder of a dataset whose held-out clips streams may begin with; empty: the clips that the
    world carries, if any."""
    port: int = 8000
    """Port of the page; 0: any free one."""
    browser: bool = True
    """Open the page in a browser."""
    sessions: int = 8
    """Streams in memory at once: every fork is one."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1."""
    engine: Annotated[str, tyro.conf.arg(metavar="{plain,fast}")] = "fast"
    """What runs the model: as it is written, or laid out for the machine."""
    precision: Annotated[str, tyro.conf.arg(metavar="{fp32,bf16}")] = "fp32"
    """Of weights, memory and products."""

    def served(self) -> ServeConfig:
        """Return the settings of the server behind the page.

        Raises:
            ValueError: settings that no server can have.
        """
        return ServeConfig(
            run=self.run,
            data=self.data,
            port=self.port,
            sessions=self.sessions,
            device=self.device,
            engine=self.engine,
            precision=self.precision,
        )


def play(config: PlayConfig, say: Callable[[str], None] | None = None) -> None:
    """Serve a world on this machine and show its page, until SIGINT or SIGTERM.

    Args:
        config: what, where, and whether a browser opens.
        say: is told the address, and how long it took to the first frame; None: the console is.

    Raises:
        OSError: the port is in use, or the world is not there.
        ValueError: a damaged world, settings that do not fit it, or too little memory.
        Interrupted: a signal came.
    """
    say = say or Console(soft_wrap=True, highlight=False).print
    served = config.served()
    with listening(served) as listener, kept_in(served) as folder:
        service = open_service(served, folder)
        service.host.start()
        over = threading.Event()

        def ready(address: str) -> None:
            say(f"{service.world.name}: play at {address}  (Ctrl-C ends it)")
            threading.Thread(
                target=_say_first_frame, args=(service, say, over), daemon=True
            ).start()
            if config.browser:
                threading.Thread(target=show, args=(address, say), daemon=True).start()

        try:
            run_server(service, listener, ready)
        finally:
            over.set()
            service.host.stop()


def show(address: str, say: Callable[[str], None]) -> bool:
    """Open a page in the player's browser, if this machine has a screen; return whether it did."""
    # Without a screen some systems would open a browser of letters in this very terminal.
    has_screen = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    try:
        opened = has_screen and webbrowser.open(address)
    except webbrowser.Error:
        opened = False
    if not opened:
        say("no browser could be opened here: open the address yourself")
    return opened


def num_drawn(service: Service) -> int:
    """Return how many messages have said that a page drew a frame."""
    value = service.statistics.registry.get_sample_value("scd_messages_total", {"type": "ack"})
    return int(value or 0)


def _say_first_frame(service: Service, say: Callable[[str], None], over: threading.Event) -> None:
    while not over.wait(WATCH_S):
        if num_drawn(service):
            age_s = time.time() - psutil.Process().create_time()
            say(f"first frame on the screen {age_s:.1f} s after the start of the command")
            return
