"""Rough clients of a server that may be killed, for benchmarks/load.py and benchmarks/steady.py.

They join, play, stall, reset, leave, come back, disconnect without closing, upload pictures, fetch
snapshots and restore them, and compare every frame with that of a local rollout.
"""

from __future__ import annotations

import http.client
import io
import json
import random
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import psutil
import torch
import tyro
from PIL import Image
from started import start, stop

from scd.data.clip import frames_to_pixels
from scd.engine.open import advised_threads, open_engine
from scd.models.checkpoint import load_world
from scd.serving.client import Client, Frame, Refused, SessionEnded
from scd.streaming.rollout import Rollout

JPEG_ERROR = 6.0
"""Levels of 255 by which a picture of quality 95 is off on average, at most; frames of two seeds
differ by more, which is checked before."""

BACKUP_S, LOST_S = 2.0, 8.0
"""Between two copies of a session where the server is killed, and how old the newest copy may be:
the server looks once a second, and a busy one is late."""

PATIENCE_S = 30.0
"""Within which everybody has a session, also while the server starts again."""

STILL_S = 3.0
"""Between two looks at the clock beyond which this process stood still: each second it looks."""

LEFT = (SessionEnded, OSError, http.client.HTTPException)
"""What a client meets whose server is gone."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """A load."""

    run: Annotated[str, tyro.conf.Positional]
    """World, run or step folder."""
    clients: int = 8
    """Clients at once."""
    duration_s: float = 60.0
    """Of their coming and going."""
    kills: int = 0
    """Of the server, spread over the first third of that time; memory is that of its last life."""
    fair_s: float = 15.0
    """Of one playing alone afterwards, and of all at once."""
    frames: int = 24
    """Of a session that are compared; clients stay so long, at most."""
    seeds: int = 4
    """Different streams."""
    seed: int = 0
    """Of what clients do."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= 64 or self.seeds < 1 or self.frames < 2:
            raise ValueError("needed 1 .. 64 clients, 1 or more seeds and 2 or more frames")
        if not 0 < self.duration_s <= 86400:
            raise ValueError(f"duration_s must lie in 0 .. 86400, got {self.duration_s}")
        if not 0 <= self.kills <= 100:
            raise ValueError(f"kills must lie in 0 .. 100, got {self.kills}")


class Clock:
    """Seconds for which this process has run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        self.still_s, self._woke_at = 0.0, float("-inf")

    def __call__(self) -> float:
        """Look at it, which every thread does at least once a second in all."""
        with self._lock:
            now = time.monotonic()
            passed, self._looked_at = now - self._looked_at, now
            if passed > STILL_S:
                self.still_s += passed
                self._woke_at = now
            return now - self.still_s

    def just_woke(self) -> bool:
        """Whether this process stood still a moment ago."""
        self()
        return time.monotonic() - self._woke_at < PATIENCE_S


NOW = Clock()


@dataclass
class Tally:
    """What all clients together have seen."""

    counts: Counter[str] = field(default_factory=Counter)
    """Of what they did and met."""
    faults: list[str] = field(default_factory=list)
    """What should not have been."""
    still: list[str] = field(default_factory=list)
    """The same, right after this process had stood still."""
    waited_s: float = 0.0
    """Of the client that waited longest for a session."""
    lost: list[int] = field(default_factory=list)
    """Frames that each session lost when its server was killed."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of both."""

    def add(self, what: str, number: int = 1) -> None:
        """Count something."""
        with self.lock:
            self.counts[what] += number

    def fault(self, what: str) -> None:
        """Note what should not have been."""
        kept = self.still if NOW.just_woke() else self.faults
        with self.lock:
            kept.append(what)

    def waited(self, seconds: float) -> None:
        """Note how long a client waited for a session."""
        with self.lock:
            self.waited_s = max(self.waited_s, seconds)
        if seconds > PATIENCE_S:
            self.fault(f"a client waited {seconds:.1f} s for a session")


def references(config: LoadConfig) -> list[np.ndarray]:
    """Make the frames [t h w 3] of each seed alone; seed s is played with action s throughout."""
    world = load_world(config.run)
    torch.set_num_threads(advised_threads(world.model.config))
    engine = open_engine(world.model, "fast", release=True)
    num_actions = len(world.card.action_names)
    kept = []
    for seed in range(config.seeds):
        rollout = Rollout(world, seed=seed, engine=engine)
        rollout.begin(from_nothing=True)
        action = torch.tensor([seed % num_actions]) if num_actions else None
        frames = [rollout.step(action) for _ in range(config.frames)]
        kept.append(frames_to_pixels(torch.cat(frames)).numpy())
    for one in range(config.seeds):
        for other in range(one):
            apart = np.abs(kept[one].astype(int) - kept[other]).mean((1, 2, 3)).min()
            if apart < 2 * JPEG_ERROR:
                raise ValueError(
                    f"streams {other} and {one} look alike ({apart:.1f}): use other seeds"
                )
    return kept


class Server:
    """A server on a port of this machine, which may be killed and started again."""

    def __init__(self, config: LoadConfig, folder: str) -> None:
        """Start it; sessions lie in `folder`."""
        words = ["serve", config.run, "--evict-dir", folder, "--idle-s", "20"]
        words += ["--sessions", str(2 * config.clients), "--max-fps", "1000"]
        words += ["--limits.max-connections", str(4 * config.clients + 8)]
        words += ["--backup-s", str(BACKUP_S)] if config.kills else []
        self._words = words
        self.killed_at: list[float] = []
        """By the clock, one for each kill."""
        self.is_up = threading.Event()
        self._start(0)

    def _start(self, port: int) -> None:
        self._process, self.url = start([*self._words, "--port", str(port)])
        self.process = psutil.Process(self._process.pid)
        self.begun, self.bare = NOW(), self.process.memory_info().rss
        self.is_up.set()

    def kill(self) -> None:
        """Kill it and start it again at the same place."""
        self.is_up.clear()
        self.killed_at.append(NOW())
        with self._process as process:
            process.kill()
        self._start(int(self.url.rstrip("/").rpartition(":")[2]))

    def waited_for(self) -> bool:
        """Wait until it is up; return whether it is."""
        until = NOW() + 4 * PATIENCE_S
        while not self.is_up.wait(0.5) and NOW() < until:
            pass
        return self.is_up.is_set()

    def stop(self) -> None:
        """End it."""
        with suppress(subprocess.TimeoutExpired):
            stop(self._process)


@dataclass
class Played:
    """What a guest has seen of its session."""

    name: str
    since: float
    """When it was begun, or begun anew."""
    seeds: set[int]
    """Of its stream, and of that before."""
    seen: list[tuple[float, int]] = field(default_factory=list)
    """When which frame came, since it was begun or changed last."""


class Guest:
    """One client after the other, in a thread of its own."""

    def __init__(
        self,
        config: LoadConfig,
        server: Server,
        wanted: list[np.ndarray],
        tally: Tally,
        number: int,
    ):
        """Prepare."""
        self.config, self.server, self.wanted, self.tally = config, server, wanted, tally
        self.url = server.url
        self.random = random.Random(f"{config.seed} {number}")
        self.last = -1
        self.played: Played | None = None
        self.came_at: float | None = None

    def visit(self, until: float) -> None:
        """Come and go until the time is over."""
        while NOW() < until and self.server.waited_for():
            lives, self.came_at = len(self.server.killed_at), self.came_at or NOW()
            try:
                self.once()
            except Refused as error:
                self.tally.add(f"refused {error.code}")
                if error.code != "too_many_sessions":
                    self.tally.fault(f"refused: {error.code}: {error}")
                time.sleep(self.random.uniform(0.1, 0.5))
            except LEFT as error:
                if lives == len(self.server.killed_at):
                    said = error.read()[:200] if isinstance(error, urllib.error.HTTPError) else ""
                    self.tally.fault(f"{type(error).__name__}: {error} {said}")
                    time.sleep(0.5)
                    continue
                self.tally.add("cut off")
                self.recover()
            except Exception as error:
                self.tally.fault(f"unforeseen: {type(error).__name__}: {error}")
                time.sleep(0.5)

    def has_session(self) -> None:
        """Note that this guest waits no more."""
        if self.came_at is not None:
            self.tally.waited(NOW() - self.came_at)
        self.came_at = None

    def recover(self) -> None:
        """Come back to the session after the server was killed, and play on."""
        played, self.played = self.played, None
        killed_at = self.server.killed_at[-1]
        if played is None or not self.server.waited_for():
            return
        try:
            with Client(self.url, quality=95) as client:
                state = client.attach(played.name)
                self.has_session()
                due = [frame for when, frame in played.seen if when < killed_at - LOST_S]
                newest = played.seen[-1][1] if played.seen else -1
                if state.seed not in played.seeds or state.frame < max(due, default=-1):
                    self.tally.fault(f"{played} came back as {state}")
                self.tally.lost.append(max(0, newest - state.frame))
                self.last = state.frame
                # It may have been killed before it heard of the action.
                self.begin(client, state.seed)
                if state.frame < self.config.frames - 1:
                    self.watch(client, state.seed, goes_on=True)
                client.close()
        except Refused as error:
            is_young = played.since > killed_at - LOST_S
            if error.code != "unknown_session" or not is_young:
                self.tally.fault(f"{played} is lost: {error.code}: {error}")
            self.tally.add("lost young ones")
        except LEFT as error:
            if killed_at == self.server.killed_at[-1]:
                self.tally.fault(f"coming back: {type(error).__name__}: {error}")

    def once(self) -> None:
        """Join, play, do something, and leave in some way."""
        codec = "jpeg"
        with Client(self.url, codec=codec, quality=95) as client:
            self.tally.add("joined")
            seed = self.random.randrange(self.config.seeds)
            self.played = Played(client.create(seed=seed).session, NOW(), {seed})
            self.has_session()
            self.begin(client, seed)
            self.watch(client, seed)
            deed = self.random.choice(
                ["reset", "rewind", "stall", "leave", "kill", "close", "copy"]
            )
            self.tally.add(deed)
            if deed == "reset":
                before, seed = seed, self.random.randrange(self.config.seeds)
                client.pause()
                self.played = Played(self.played.name, NOW(), {before, seed})
                client.reset(seed=seed)
                self.begin(client, seed)
                self.watch(client, seed)
            elif deed == "rewind":
                client.pause()
                assert client.state is not None
                self.played.seen.clear()
                self.last = client.rewind(self.random.randrange(client.state.frame + 1)).frame
                client.run()
                self.watch(client, seed, goes_on=True)
            elif deed == "stall":
                time.sleep(self.random.uniform(0.5, 3.0))
                self.watch(client, seed, goes_on=True)
            elif deed == "copy":
                self.copy(client)
            elif deed == "leave":
                self.come_back(client, seed)
                return
            elif deed == "kill":
                die(client)
                self.played = None
                return
            self.played = None
            client.close()

    def copy(self, client: Client) -> None:
        """Fetch a snapshot, open a session of it, begin another one with a picture; delete both."""
        assert client.state is not None
        sessions = f"{self.url}v1/sessions"
        file = ask("POST", f"{sessions}/{client.state.session}/snapshot")
        world, picture = client.welcome.world, io.BytesIO()
        Image.new("RGB", (world.width, world.height)).save(picture, "PNG")
        upload = json.loads(ask("POST", f"{self.url}v1/uploads", picture.getvalue()))["upload"]
        start = json.dumps({"start": "upload", "upload": upload}).encode()
        for path, body in ((f"{sessions}/restore", file), (sessions, start)):
            try:
                state = json.loads(ask("POST", path, body))
            except urllib.error.HTTPError as error:
                # What there is no room for now is refused with this one.
                if error.code != 503:
                    raise
                self.tally.add(f"refused {path.removeprefix(sessions)[1:] or 'create'}")
                continue
            ask("DELETE", f"{sessions}/{state['session']}")

    def begin(self, client: Client, seed: int) -> None:
        """Let a stream run with the action of its seed."""
        actions = client.welcome.world.actions
        if actions:
            client.act(seed % len(actions))
        client.run()

    def come_back(self, client: Client, seed: int) -> None:
        """Leave without a word and attach again."""
        assert client.state is not None
        session = client.state.session
        client.disconnect()
        time.sleep(self.random.uniform(0.0, 1.0))
        until = time.monotonic() + 30
        with Client(self.url, quality=95) as again:
            while True:
                try:
                    # A frame that was under way may come before `run` is answered.
                    self.last = again.attach(session).frame
                    break
                except Refused as error:
                    if error.code not in ("session_busy", "too_many_sessions"):
                        raise
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.1)
            again.run()
            self.watch(again, seed, goes_on=True)
            self.played = None
            again.close()

    def watch(self, client: Client, seed: int, goes_on: bool = False) -> None:
        """Look at some frames, and at each of them closely; `goes_on`: after those of before."""
        assert client.state is not None
        session, generation = client.state.session, client.state.generation
        last = self.last if goes_on else client.state.frame
        number = self.random.randrange(1, self.config.frames // 2 + 1)
        for received in client.frames():
            self.compare(received, session, generation, seed)
            if not received.header.shown:
                if received.header.frame != last + 1:
                    self.tally.fault(f"frame {received.header.frame} came after {last}")
                self.last = last = received.header.frame
                if self.played is not None:
                    self.played.seen.append((NOW(), last))
                number -= 1
            if number <= 0 or last >= self.config.frames - 1:
                return

    def compare(self, received: Frame, session: str, generation: int, seed: int) -> None:
        """See that a frame is of this session, this generation and this stream."""
        header = received.header
        self.tally.add("frames")
        if (header.session, header.generation) != (session, generation):
            self.tally.fault(f"a frame of {header.session} {header.generation} came to {session}")
        if header.frame < self.config.frames:
            wanted = self.wanted[seed][header.frame]
            apart = np.abs(received.pixels.astype(int) - wanted).mean()
            if apart > JPEG_ERROR:
                self.tally.fault(f"frame {header.frame} of seed {seed} is off by {apart:.1f}")


def die(client: Client) -> None:
    """End a connection as a killed process does: no farewell, and a reset."""
    raw = client._socket.socket
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def ask(method: str, url: str, body: bytes | None = None) -> bytes:
    """Make a request of the server, without a proxy (HTTPError: it is refused)."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, method=method), timeout=60) as answer:
        return answer.read()
