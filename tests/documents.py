"""Blocks of the pages, and running the commands in them as a reader would."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scd.cli import main
from scd.serving.client import Client

ROOT = Path(__file__).resolve().parent.parent

COMMANDS, CODE = {"bash", "console"}, "python"
SHOWN = {"text", "json", "yaml"}
"""Languages of blocks that are typed, and of those that show a file or an output."""

LAUNCHER = re.compile(r"^(torchrun|accelerate launch) .*?-m scd ")

READY_S = 60.0
"""Seconds that a server has until it answers."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    """Of the fence above it."""
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Return what is typed, one command each: lines joined, cut at `&&`, comments left out."""
        text = re.sub(r"(^|\s+)#\s.*", "", self.text.replace("\\\n", " "), flags=re.M)
        shown = (one for line in text.splitlines() for one in line.split(" && "))
        return [" ".join(one.split()) for one in shown if one.strip()]


def pages() -> list[str]:
    """README.md and the pages of docs/, by their path in the project."""
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page from top to bottom."""
    text = (ROOT / page).read_text("utf-8")
    fences = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S)
    return [Block(page, text[: one.start()].count("\n") + 1, one[2], one[3]) for one in fences]


def code(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return [block.text for block in blocks(page) if block.language == CODE]


def rule_of(command: str, rules: Mapping[str, Any]) -> str | None:
    """Return the longest beginning of the command that has a rule; None: there is none."""
    found = [begin for begin in rules if f"{command} ".startswith(f"{begin} ")]
    return max(found, key=len, default=None)


@dataclass
class Reader:
    """Someone who types what a page shows, from top to bottom, in one folder.

    Args:
        folder: to type in; the current one is that folder while `run_block` runs.
        small: beginning of a command -> flags that make it small.
        elsewhere: beginning of a command -> why it is not run here.
        replaced: words of blocks -> those that stand in for them here.
        before: part of a command -> what is done before it is typed.
    """

    folder: Path
    small: Mapping[str, str]
    elsewhere: Mapping[str, str]
    replaced: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    """Variables of the page's Python."""
    used: set[str] = field(default_factory=set)
    """Rules that were needed."""
    served: list[str] = field(default_factory=list)
    """Words of the newest server."""

    def run_block(self, block: Block) -> None:
        """Do what a block says."""
        text = block.text
        for words, others in self.replaced.items():
            text = text.replace(words, others)
        block = Block(block.page, block.line, block.language, text)
        if block.language == CODE:
            self._run_python(block)
        elif block.language in COMMANDS:
            for command in block.commands():
                self.run_command(command, block.where)

    def run_command(self, command: str, where: str) -> None:
        """Type one command, or note the rule by which it is not run here."""
        rules = {**self.small, **self.elsewhere}
        alone = LAUNCHER.sub("scd ", command)
        rule = rule_of(command, rules) or rule_of(alone, rules)
        assert rule is not None, (
            f"{where}: no rule for {command!r}: add flags that make it small to SMALL in "
            "tests/test_docs.py, or to ELSEWHERE why it cannot run in a test"
        )
        self.used.add(rule)
        if rule in self.elsewhere:
            return
        for part, prepare in self.before.items():
            if part in command:
                prepare(self.folder)
        program, *words = [*shlex.split(alone), *shlex.split(self.small[rule])]
        if program == "scd" and words[0] in ("serve", "play"):
            self.served = words
            self._serve(where, _one_frame)
        elif program == "scd":
            status = main(words)
            assert status == 0, f"{where}: {alone!r} ended with {status}"
        elif program == "python" and words[0] != "-c":
            _run_script(words, where)
        else:
            subprocess.run(["bash", "-ec", command], check=True, timeout=60)

    def _run_python(self, block: Block) -> None:
        address = re.search(r"http://127\.0\.0\.1:\d+", block.text)
        if address is None:
            exec(compile(block.text, block.where, "exec"), self.names)
            return

        def talk(url: str) -> None:
            text = block.text.replace(address[0], url)
            exec(compile(text, block.where, "exec"), self.names)

        self._serve(block.where, talk)

    def _serve(self, where: str, talk: Callable[[str], None]) -> None:
        """Run the newest server, let somebody talk to it, and end it by Ctrl-C."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        errors: list[str] = []

        def visit() -> None:
            try:
                talk(_answering(f"http://127.0.0.1:{port}"))
            except BaseException:
                errors.append(traceback.format_exc())
            os.kill(os.getpid(), signal.SIGINT)

        visitor = threading.Thread(target=visit, daemon=True)
        visitor.start()
        status = main([*self.served, "--port", str(port)])
        visitor.join()
        assert not errors, f"{where}: {errors[0]}"
        assert status == 128 + signal.SIGINT, f"{where}: the server ended with {status}"


def _answering(url: str) -> str:
    """Wait until a server answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + READY_S
    while True:
        try:
            opener.open(f"{url}/health", timeout=5).close()
            return url
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _one_frame(url: str) -> None:
    """Watch a stream's first frame."""
    token = Path("token.txt")
    with Client(url, token=token.read_text().strip() if token.exists() else None) as client:
        world = client.welcome.world
        client.create(seed=0, **({"start": "clip", "clip": 0} if world.clips else {}))
        idle = (0.0,) * world.action_dim or 0
        frame = client.step(action=idle if world.actions else None)[0]
        assert frame.pixels.shape == (world.height, world.width, 3)


def _run_script(words: list[str], where: str) -> None:
    """Run a script of the project as `python SCRIPT ...` does."""
    before, sys.argv = sys.argv, words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{where}: {words[0]} ended with {stop.code}"
    finally:
        sys.argv = before
