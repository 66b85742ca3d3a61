"""What the server counts and times, in the form that Prometheus reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from scd.serving.messages import FrameHeader

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.12, 0.2, 0.4, 0.8, 2.0, 5.0)
"""Bounds of the histograms of durations."""


def _number(help: str, counter: bool = False) -> Any:
    return field(default=0, metadata={"help": help, "counter": counter})


@dataclass(frozen=True, kw_only=True)
class HostOverview:
    """What a host does, read without waiting for it; each number is one of /metrics."""

    healthy: bool = _number("1 while the model thread is there.")
    reason: str = ""
    """Why it is not healthy; not among the metrics."""
    uptime_s: float = _number("Seconds since the start.")
    tick_age_s: float = _number("Seconds since the model thread last said that it is alive.")
    num_sessions: int = _number("Sessions in memory.")
    num_running: int = _number("Sessions that make frames until they are paused.")
    num_attached: int = _number("Sessions that have a client.")
    num_evicted: int = _number("Sessions on disk.")
    max_evicted: int = _number("Sessions that there may be on disk.")
    evicted_bytes: int = _number("Bytes of sessions on disk.")
    max_evicted_bytes: int = _number("Bytes that sessions may take on disk.")
    num_expired: int = _number("Sessions removed from disk: too old, or too many.", counter=True)
    max_sessions: int = _number("Sessions that there may be in memory.")
    reserved_bytes: int = _number("Memory promised to sessions.")
    budget_bytes: int = _number("Memory that may be promised.")
    under_way_bytes: int = _number("Memory of bodies, uploads and snapshots on their way.")
    under_way_budget_bytes: int = _number("Memory that these may take.")
    num_commands: int = _number("Calls that wait for the model thread.")
    num_frames: int = _number("Frames made.", counter=True)
    num_dropped: int = _number("Frames made or begun for nothing.", counter=True)
    num_faults: int = _number("Sessions stopped by a fault.", counter=True)
    num_evictions: int = _number("Sessions put on disk.", counter=True)
    num_restores: int = _number("Sessions brought back from disk.", counter=True)
    num_failed_evictions: int = _number("Sessions that could not be put on disk.", counter=True)


class Metrics:
    """Counters of one server; `text` is what GET /metrics returns."""

    def __init__(self, overview: Callable[[], HostOverview] | None) -> None:
        """Begin at zero; `overview` is asked whenever the text is; None: there is no host here."""
        self.registry = registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"scd_{name}", help, labels, registry=registry)

        def times(name: str, help: str, *labels: str) -> Histogram:
            return Histogram(
                f"scd_{name}_seconds", help, labels, buckets=SECONDS, registry=registry
            )

        self.connections = Gauge("scd_connections", "WebSockets that are open.", registry=registry)
        self.messages = counter("messages", "Messages that were understood.", "type")
        self.errors = counter("errors", "Messages and requests that were refused.", "code")
        self.closes = counter("closes", "WebSockets that the server closed for a fault.", "code")
        self.requests = counter("http_requests", "HTTP requests.", "status")
        self.sent_frames = counter("sent_frames", "Frames sent.", "codec")
        self.sent_bytes = counter("sent_bytes", "Bytes of frames sent.", "codec")
        self.void_frames = counter("void_frames", "Frames left out: a later generation had begun.")
        self.uploads = counter("uploads", "Uploads that were decoded.")
        self.packing = times("packing", "Time to pack a frame.", "codec")
        self.latency = times(
            "action_to_frame",
            "From the arrival of an action to the sending of the first frame that obeys it.",
        )
        self._parts = times("frame", "Time of a frame by part.", "part")
        self._overview = overview
        if overview is not None:
            registry.register(self)  # type: ignore[arg-type]

    def note_frame(self, frame: FrameHeader) -> None:
        for part in ("queued", "encoder", "decoder", "autoencoder"):
            self._parts.labels(part).observe(getattr(frame, f"{part}_ms") / 1000)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Return the host's own numbers, for the registry."""
        assert self._overview is not None
        overview = self._overview()
        for one in fields(overview):
            if one.metadata:
                name = one.name.removeprefix("num_")
                if name.endswith("_s"):
                    name = f"{name.removesuffix('_s')}_seconds"
                made = CounterMetricFamily if one.metadata["counter"] else GaugeMetricFamily
                value = float(getattr(overview, one.name))
                yield made(f"scd_{name}", one.metadata["help"], value=value)


def merged(texts: list[tuple[str, str]]) -> bytes:
    """Join what several servers say to Prometheus, with a label that says which of them."""
    families: dict[str, list[str]] = {}
    comments: dict[str, dict[str, str]] = {}
    for name, text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                kind, family = line.split(" ", 3)[1:3]
                comments.setdefault(family, {}).setdefault(kind, line)
                continue
            metric, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (.*)", line).groups()  # type: ignore[union-attr]
            labels = ",".join(one for one in (f'replica="{name}"', labels) if one)
            families.setdefault(family, []).append(f"{metric}{{{labels}}} {value}")
    lines = [
        line
        for family, samples in families.items()
        for line in [*comments[family].values(), *samples]
    ]
    return ("\n".join(lines) + "\n").encode()
