"""Seconds and memory of one case."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from scd.bench.card import Limits
from scd.bench.case import Case
from scd.bench.streams import TimedSessions, TimedStreams
from scd.common.config import at_least
from scd.common.memory import PeakMemory, check_free, out_of_memory_named
from scd.common.runtime import synchronize
from scd.common.timing import Timing

TIMED = (
    "seconds are wall-clock, of one step of all streams of the batch, from the action to the "
    "pixels on the device, noise, solver and memory included, the window full before and after; "
    "median, p90, p99 over the timed frames, jitter_s the mean difference of successive ones; "
    "encoder_s the encoder pass, or a dense model's pass that remembers the frame; decoder_step_s "
    "all that is done per frame between context and latent, divided by the steps (in the fast "
    "engine the context's own keys and values too, in the plain one they count to the encoder); "
    "autoencoder_s latents to pixels; frames per second count all streams; denoise leaves the "
    "autoencoder out; with several sessions, which start apart and ask again at once, seconds are "
    "latencies of a session's frame from its request, decoder_step_s is one call that all share, "
    "encoder_s (here with the context's own keys and values) and autoencoder_s are means per "
    "frame; latency_p50_s and latency_p99_s are these "
    "latencies, and with one session seconds per frame; "
    "cold_start_s builds the engine from weights in memory; first_frame_s is from nothing to the "
    "first pixels right after that, compilation included, first_frame_warm_s the same once all is "
    "warm; peak_memory_bytes is the growth while building and running, resident_memory_bytes what "
    "of it stays while frames are made; flops, bytes and memory needed are by formula, of all "
    "streams; fraction_of_limit = max(flops / measured product "
    "rate, bytes / measured copy bandwidth) / seconds without the autoencoder"
)
"""What the numbers of a row mean."""

MIN_FRAMES = 3
"""Frames that are timed however long they take."""

WARM_S = 0.5
"""Seconds that pass untimed once the window is full, at least one frame."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long each case is timed."""

    frames: int = 50
    """Timed frames."""
    seconds: float = 30.0
    """Seconds after which no further frame is timed, once there are 3."""

    def __post_init__(self) -> None:
        at_least(1, frames=self.frames)
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")


def time_case(case: Case, device: torch.device, limits: Limits, effort: Effort) -> dict[str, Any]:
    """Build, run and time one case.

    Returns:
        What was measured, under the names of a row.

    Raises:
        OutOfMemory: it does not fit; with what it needs and what is free.
    """
    cost = case.cost()
    check_free(case.title, cost.memory_needed, device)
    with out_of_memory_named(case.title, cost.memory_needed, device):
        peak = PeakMemory(device)
        if case.sessions > 1:
            measured = _measure_sessions(TimedSessions(case, device), effort, peak)
        else:
            measured = _measure(TimedStreams(case, device), effort, peak)
    num_streams = case.batch * case.sessions
    calls = case.num_calls, case.call_times
    flops, num_bytes = cost.flops(*calls), cost.bytes(*calls)
    denoise_s, round_s = measured.pop("denoise_s"), measured.pop("round_s")
    return measured | {
        "frames_per_s_denoise": num_streams / denoise_s,
        "frames_per_s_end_to_end": num_streams / round_s,
        "flops_per_frame": flops,
        "bytes_per_frame": num_bytes,
        "memory_needed_bytes": cost.memory_needed,
        "fraction_of_limit": limits.seconds(flops, num_bytes) / denoise_s,
    }


def _measure(streams: TimedStreams, effort: Effort, peak: PeakMemory) -> dict[str, Any]:
    first_s = _first_frame_s(streams)
    streams.fill()
    warm_up(streams)
    parts = time_parts(streams, effort)
    whole, denoise = whole_and_denoise(streams, effort, parts)
    peak_bytes, resident_bytes = peak.bytes(), peak.held()
    return {
        "seconds_per_frame_median": median(whole),
        "p90_s": quantile(whole, 0.90),
        "p99_s": quantile(whole, 0.99),
        "jitter_s": _jitter(whole),
        "frames": len(whole),
        "latency_p50_s": median(whole),
        "latency_p99_s": quantile(whole, 0.99),
        "denoise_s": median(denoise),
        "round_s": median(whole),
        "encoder_s": median(frame.encoder_s for frame in parts),
        "decoder_step_s": median(frame.decoder_s for frame in parts) / streams.case.steps,
        "autoencoder_s": median(frame.autoencoder_s for frame in parts),
        "cold_start_s": streams.cold_start_s,
        "first_frame_s": first_s,
        "first_frame_warm_s": _first_frame_s(streams),
        "peak_memory_bytes": peak_bytes,
        "resident_memory_bytes": resident_bytes,
    }


def _measure_sessions(sessions: TimedSessions, effort: Effort, peak: PeakMemory) -> dict[str, Any]:
    first_s = sessions.first_frame()
    sessions.fill()
    num_sessions = sessions.case.sessions
    sessions.play(num_sessions, WARM_S)
    num_frames = num_sessions * effort.frames
    timed = sessions.play(num_frames, effort.seconds, timed_parts=True)
    # On a GPU waiting between the parts would keep the host from running ahead.
    is_cpu = sessions.device.type == "cpu"
    whole = timed if is_cpu else sessions.play(num_frames, effort.seconds)
    peak_bytes, resident_bytes = peak.bytes(), peak.held()
    part_s = {part: sum(spent) / len(timed.latencies) for part, spent in timed.parts.items()}
    frame_s = whole.seconds / len(whole.latencies)
    return {
        "seconds_per_frame_median": median(whole.latencies),
        "p90_s": quantile(whole.latencies, 0.90),
        "p99_s": quantile(whole.latencies, 0.99),
        "jitter_s": _jitter(whole.latencies),
        "frames": len(whole.latencies),
        "latency_p50_s": median(whole.latencies),
        "latency_p99_s": quantile(whole.latencies, 0.99),
        "denoise_s": num_sessions * (frame_s - part_s["autoencoder"]),
        "round_s": num_sessions * frame_s,
        "encoder_s": part_s["encoder"] + part_s["memory"],
        "decoder_step_s": median(timed.parts["decoder"]),
        "autoencoder_s": part_s["autoencoder"],
        "cold_start_s": sessions.cold_start_s,
        "first_frame_s": first_s,
        "first_frame_warm_s": sessions.first_frame(),
        "peak_memory_bytes": peak_bytes,
        "resident_memory_bytes": resident_bytes,
    }


def _first_frame_s(streams: TimedStreams) -> float:
    synchronize(streams.device)
    began = time.perf_counter()
    streams.begin()
    streams.frame()
    synchronize(streams.device)
    return time.perf_counter() - began


def warm_up(streams: TimedStreams) -> None:
    """Make frames that are not timed."""
    began = time.perf_counter()
    while True:
        streams.frame()
        synchronize(streams.device)
        if time.perf_counter() - began >= WARM_S:
            break


def whole_and_denoise(
    streams: TimedStreams, effort: Effort, parts: Sequence[Timing] | None = None
) -> tuple[list[float], list[float]]:
    """Return the seconds of frames: with the autoencoder, and without it.

    Args:
        streams: warm.
        effort: how many.
        parts: of frames that were timed already; on a CPU they say it all.
    """
    if streams.device.type == "cpu":
        parts = time_parts(streams, effort) if parts is None else parts
        return [frame.total_s for frame in parts], [frame.denoise_only_s for frame in parts]
    # On a GPU waiting between the parts would keep them from overlapping.
    whole = _time(streams.frame, streams, effort)
    if not streams.case.subject.has_pixels:
        return whole, whole
    return whole, _time(streams.latents, streams, effort)


def _time(make: Callable[[], Any], streams: TimedStreams, effort: Effort) -> list[float]:
    """Return the seconds of each frame, waiting for the device only at its end."""

    def frame() -> float:
        start = time.perf_counter()
        make()
        synchronize(streams.device)
        return time.perf_counter() - start

    return _repeat(frame, effort)


def time_parts(streams: TimedStreams, effort: Effort) -> list[Timing]:
    """Return the seconds of each part of each frame, waiting for the device after each."""

    def frame() -> Timing:
        streams.frame_in_parts()
        return streams.rollout.timing

    return _repeat(frame, effort)


def _repeat(frame: Callable[[], Any], effort: Effort) -> list[Any]:
    results, began = [], time.perf_counter()
    for _ in range(effort.frames):
        results.append(frame())
        if len(results) >= MIN_FRAMES and time.perf_counter() - began > effort.seconds:
            break
    return results


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of some values stays below, interpolated."""
    return float(np.quantile(np.asarray(values), share))


def _jitter(seconds: Sequence[float]) -> float:
    pairs = zip(seconds[:-1], seconds[1:], strict=True)
    return fmean([abs(later - earlier) for earlier, later in pairs] or [0.0])
