"""Two configurations in turns, A B A B, in one process: `scd bench compare`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from scd.bench.card import LimitsOfDevice, RowFile, card, print_card
from scd.bench.case import Case, numbers, parse_case
from scd.bench.settings import CompareConfig
from scd.bench.streams import TimedStreams
from scd.bench.timing import Effort, warm_up, whole_and_denoise
from scd.common.config import StreamPrecision, to_json
from scd.common.memory import check_free, out_of_memory_named, release
from scd.common.runtime import choose_device, choose_stream_precision, cpu_threads
from scd.models.config import SeparableConfig

TIMED = (
    "A and B are built first, then take turns: some frames of A, as many of B, round after round; "
    "the order within a round alternates; seconds are wall-clock from the action to the pixels on "
    "the device, the window full, divided by the frames of a step (batch times sessions); a ratio "
    "is the median of A's frames of a round divided by that of B's; ratio_a_over_b is the median "
    "over the rounds, ratio_low and ratio_high the smallest and the largest of them; denoise-only "
    "seconds, without the autoencoder, give the fractions of the limit"
)
"""What the numbers of a comparison mean."""


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Compare at each context, number of steps and batch, and return the results.

    Raises:
        ValueError: a spec that cannot be read, or that a model cannot do; or too little memory.
        OSError: no such run, or a file that cannot be written.
    """
    with cpu_threads(config.threads):
        return _compare(config)


def _compare(config: CompareConfig) -> list[dict[str, Any]]:
    device = choose_device(config.device)
    pairs = pairs_of(config)
    file = RowFile(config.json, config.append)
    results = []
    try:
        limits, common = LimitsOfDevice(device), card(device, TIMED)
        precisions: list[StreamPrecision] = [case.precision for pair in pairs for case in pair]
        precisions = list(dict.fromkeys(precisions))
        print_card(common, limits, precisions)
        for precision in precisions:
            choose_stream_precision(precision, device)
        for a, b in pairs:
            result = {
                **compare_pair(a, b, device, limits, config.rounds, config.frames),
                "limits": {precision: asdict(limits.at(precision)) for precision in precisions},
                "rounds": config.rounds,
                "frames_per_round": config.frames,
                **common,
            }
            file.write(result)
            print(readable(result), flush=True)
            results.append(result)
    finally:
        file.close()
    return results


def pairs_of(config: CompareConfig) -> list[tuple[Case, Case]]:
    """Return both cases of every comparison, each pair once.

    Raises:
        ValueError: unknown words, numbers below 1, or what a model cannot do.
    """
    pairs: dict[tuple[Case, Case], None] = {}
    for context in numbers("context", config.context):
        for steps in numbers("steps", config.steps) if config.steps else [None]:
            for batch in numbers("batch", config.batch):
                defaults = {
                    "context": context,
                    "steps": steps,
                    "batch": batch,
                    "precision": config.precision,
                    "engine": config.engine,
                }
                a, b = parse_case(config.a, defaults), parse_case(config.b, defaults)
                if a.sessions > 1 or b.sessions > 1:
                    raise ValueError("comparisons are of one session; scd bench takes more")
                pairs[a, b] = None
    return list(pairs)


def compare_pair(
    a: Case, b: Case, device: torch.device, limits: LimitsOfDevice, rounds: int, frames: int
) -> dict[str, Any]:
    """Build both, let them take turns, and return both sides and their ratio.

    Raises:
        OutOfMemory: both together need more than is free.
    """
    needed = sum(case.cost().memory_needed for case in (a, b))
    what = f"A ({a.title}) beside B ({b.title})"
    check_free(what, needed, device)
    with out_of_memory_named(what, needed, device), ExitStack() as stack:
        sides = {"a": TimedStreams(a, device), "b": TimedStreams(b, device)}
        stack.callback(release)
        stack.callback(sides.clear)
        for streams in sides.values():
            streams.begin()
            streams.frame()
            streams.fill()
            warm_up(streams)
        # Else the name would keep the second side alive after the others are gone.
        del streams
        seconds, denoise = _take_turns(sides, rounds, frames)
    result: dict[str, Any] = {}
    for name, case in (("a", a), ("b", b)):
        cost, denoise_s = case.cost(), median(denoise[name])
        calls = case.num_calls, case.call_times
        flops, num_bytes = cost.flops(*calls), cost.bytes(*calls)
        least_s = limits.at(case.precision).seconds(flops, num_bytes)
        result[name] = {
            **_described(case),
            "seconds_per_frame_median": median(seconds[name]),
            "denoise_s": denoise_s,
            "flops_per_frame": flops,
            "bytes_per_frame": num_bytes,
            "fraction_of_limit": least_s / denoise_s / (case.batch * case.sessions),
        }
    ratios = [one / two for one, two in zip(seconds["a"], seconds["b"], strict=True)]
    return {
        **result,
        "ratio_a_over_b": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "ratios": ratios,
    }


def _take_turns(
    sides: dict[str, TimedStreams], rounds: int, frames: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return each side's median seconds per frame of every round: whole, and without decoding."""
    whole: dict[str, list[float]] = {name: [] for name in sides}
    denoise: dict[str, list[float]] = {name: [] for name in sides}
    effort = Effort(frames=frames, seconds=float("inf"))
    for index in range(rounds):
        # Whatever the first one meets (a cold cache, the other's heat) is shared.
        for name in list(sides) if index % 2 == 0 else list(reversed(sides)):
            streams = sides[name]
            num_frames = streams.case.batch * streams.case.sessions
            for kept, spent in zip(
                (whole, denoise), whole_and_denoise(streams, effort), strict=True
            ):
                kept[name].append(median(spent) / num_frames)
    return whole, denoise


def _described(case: Case) -> dict[str, Any]:
    subject = case.subject
    join = subject.config.decoder.join if isinstance(subject.config, SeparableConfig) else None
    return {**asdict(case), "join": join, "sampling": to_json(case.sampling), "note": subject.note}


def readable(result: Mapping[str, Any]) -> str:
    """Say a comparison in two lines for people."""
    sides = [
        f"{name.upper()} {result[name]['model']} {result[name]['engine']} "
        f"{result[name]['join'] or 'dense'} {result[name]['precision']}: "
        f"{1000 * result[name]['seconds_per_frame_median']:.2f} ms per frame, "
        f"{result[name]['fraction_of_limit']:.2f} of the limit"
        for name in ("a", "b")
    ]
    context, steps = (
        "/".join(str(value) for value in dict.fromkeys(result[name][key] for name in ("a", "b")))
        for key in ("context", "steps")
    )
    return (
        f"context {context}, {steps} steps: A takes {result['ratio_a_over_b']:.2f} times as long "
        f"as B [{result['ratio_low']:.2f}, {result['ratio_high']:.2f}]\n  " + "\n  ".join(sides)
    )
