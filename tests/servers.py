"""Servers of tiny worlds for tests: real ones, on a free port, in a thread of their own."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.data.source import DataCard
from scd.engine.open import open_engine
from scd.models.checkpoint import World
from scd.models.config import SamplingConfig
from scd.models.shipped import Clips
from scd.serving.host import Host
from scd.serving.http_api import make_app
from scd.serving.run import Server, host_config, listening, uvicorn_config
from scd.serving.service import Service
from scd.serving.settings import ClientLimits, ServeConfig
from scd.streaming.texts import WorldTexts
from tests.tiny import SHAPE, tiny_separable


@cache
def tiny_playable(make: Any = tiny_separable, **options: Any) -> World:
    """A world of a few thousand weights that is steered by three actions."""
    model = make(**options)
    spec = model.config.conditions
    return World(
        model=model,
        autoencoder=PixelAutoencoder(PixelConfig(mean=0.1, std=0.5)),
        card=DataCard(
            height=SHAPE.height,
            width=SHAPE.width,
            fps=10.0,
            conditions=spec,
            action_names=spec.action_names or tuple("abcd"[: spec.num_actions or spec.action_dim]),
        ),
        sampling=SamplingConfig(num_steps=2),
    )


def tiny_clips(num_actions: int) -> Clips:
    """Two clips of three frames."""
    generator = torch.Generator().manual_seed(5)
    return Clips(
        frames=torch.randint(0, 256, (2, 3, 3, SHAPE.height, SHAPE.width), generator=generator).to(
            torch.uint8
        ),
        actions=torch.randint(0, num_actions, (2, 3), generator=generator),
    )


@dataclass
class Serving:
    """A server that runs."""

    service: Service
    """Its parts."""
    url: str
    """Of the page, without the slash at the end."""
    server: Server
    """The web server."""

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Make a request; return status and body, JSON read."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers=headers or {}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                status, kind, data = answer.status, answer.headers["content-type"], answer.read()
        except urllib.error.HTTPError as error:
            status, kind, data = error.code, error.headers["content-type"], error.read()
        return status, json.loads(data) if kind == "application/json" else data

    def metric(self, name: str) -> float:
        """Return one number of /metrics, labels and all in the name; 0 where there is none."""
        status, text = self.call("GET", "/metrics")
        assert status == 200
        for line in text.decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0


@contextmanager
def serving(
    world: World | None = None,
    evict_dir: Path | None = None,
    token: str | None = None,
    limits: ClientLimits | None = None,
    **changes: Any,
) -> Iterator[Serving]:
    """Serve a world until the block ends.

    Args:
        world: None: the tiny one.
        evict_dir: for idle sessions; None: they stay in memory.
        token: that clients must show.
        limits: of clients; None: generous ones, since tests are quick.
        changes: to the settings.
    """
    world = world or tiny_playable()
    limits = limits or ClientLimits(messages_per_s=2000.0, requests_per_s=2000.0)
    config = ServeConfig(port=0, limits=limits, **changes)
    engine = open_engine(world.model, "fast")
    settings = replace(host_config(config, evict_dir), memory_gib=config.memory_gib or 0.5)
    num_actions = world.card.conditions.num_actions
    spec = world.card.conditions
    clips = tiny_clips(num_actions) if num_actions and not spec.has_text else None
    texts = WorldTexts(world) if spec.has_text else None
    host = Host(
        world, engine, settings, lambda text: None, clips, "tiny", None, texts, config.prompt
    )
    host.start()
    with listening(config) as listener:
        ready = threading.Event()

        async def run() -> None:
            # Made where it runs: what it holds belongs to that event loop.
            parts["service"] = service = Service(host, config, token)
            parts["server"] = server = Server(uvicorn_config(config, make_app(service)), ready.set)
            await server.serve(sockets=[listener])

        parts: dict[str, Any] = {}
        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        assert ready.wait(60), "the server did not start"
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield Serving(service=parts["service"], url=url, server=parts["server"])
        finally:
            parts["server"].should_exit = True
            thread.join(30)
            host.stop()
            assert not thread.is_alive(), "the server did not stop"
