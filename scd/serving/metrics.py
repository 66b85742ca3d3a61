"""What the server counts and times, in the form that Prometheus reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from scd.serving.events import Frame, HostOverview

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.12, 0.2, 0.4, 0.8, 2.0, 5.0)
"""Bounds of the histograms of durations."""

COUNTED = (
    "num_frames",
    "num_dropped",
    "num_faults",
    "num_evictions",
    "num_restores",
    "num_failed_evictions",
)
"""Numbers of a host's overview that only grow."""


class Statistics:
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
        if overview is not None:
            self.registry.register(_HostNumbers(overview))

    def note_frame(self, frame: Frame) -> None:
        """Count the times of a new frame."""
        for part in fields(frame.timing):
            name = part.name.removesuffix("_s")
            self._parts.labels(name).observe(getattr(frame.timing, part.name))

    def text(self) -> bytes:
        """Return all of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _HostNumbers:
    """The host's own numbers, read when they are asked for."""

    def __init__(self, overview: Callable[[], HostOverview]) -> None:
        self._overview = overview

    def collect(self) -> Iterator[Metric]:
        overview = self._overview()
        for field in fields(overview):
            value = getattr(overview, field.name)
            if isinstance(value, str):
                continue
            name = field.name.removeprefix("num_")
            if name.endswith("_s"):
                name = f"{name.removesuffix('_s')}_seconds"
            made = CounterMetricFamily if field.name in COUNTED else GaugeMetricFamily
            yield made(f"scd_{name}", HELP[field.name], value=float(value))


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


HELP = {
    "healthy": "1 while the model thread is there.",
    "uptime_s": "Seconds since the start.",
    "tick_age_s": "Seconds since the model thread last said that it is alive.",
    "num_sessions": "Sessions in memory.",
    "num_running": "Sessions that make frames until they are paused.",
    "num_attached": "Sessions that have a client.",
    "num_evicted": "Sessions on disk.",
    "max_sessions": "Sessions that there may be in memory.",
    "reserved_bytes": "Memory promised to sessions.",
    "budget_bytes": "Memory that may be promised.",
    "num_commands": "Calls that wait for the model thread.",
    "num_frames": "Frames made.",
    "num_dropped": "Frames made or begun for nothing.",
    "num_faults": "Sessions stopped by a fault.",
    "num_evictions": "Sessions put on disk.",
    "num_restores": "Sessions brought back from disk.",
    "num_failed_evictions": "Sessions that could not be put on disk.",
}
"""What each number of a host's overview is."""
