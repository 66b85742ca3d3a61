"""What `scd demo` shows without any training: the shipped world, streamed and steered.

It begins with frames of a recorded clip and continues under the clip's own actions and, from the
same frame on, under each action held down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from scd.common.config import Threads, to_json
from scd.common.files import refuse_used
from scd.common.provenance import provenance, write_json, write_text
from scd.common.runtime import cpu_threads
from scd.data.clip import Conditions
from scd.demo.side_by_side import write_stream
from scd.engine.open import open_engine, stream_threads
from scd.evaluation.html import plot, write_page
from scd.evaluation.media import Ink, spread
from scd.evaluation.predict import TIMED, summarize
from scd.models.build import num_parameters
from scd.models.checkpoint import World, load_world
from scd.models.shipped import Clips, read_clips
from scd.streaming.rollout import Rollout, Timing
from scd.streaming.steering import shown_names

MARKER = ".scd-demo"
"""File that marks a folder as a demo's."""

NUM_GIVEN = 16
"""Frames of the clip that the streams are given: as many as the shipped world remembers."""

NUM_HELD = 32
"""Frames that each action is held for."""

NUM_WARM_UP = 3
"""First generated frames that are not timed."""

NUM_SHOWN = 9
"""Columns of the picture."""

NOT_CLAIMED = (
    "That this is a good model of its game: it has a few million parameters and was trained on a "
    "CPU, as its card says. What is not in sight is made up anew.",
    "That the frames under a held action are right: there are no true ones to compare them with. "
    "Only the clip's own actions have true frames, in the row above them.",
    "That the milliseconds hold elsewhere: they are of this machine, one stream, this number of "
    "steps, without a browser or a network.",
)
"""Shown at the end of the report."""


def first_look(run: Path, out: Path, seed: int, threads: Threads = "auto") -> dict[str, Any]:
    """Stream a world that carries clips; write report.json and the page, and return the former.

    Raises:
        FileNotFoundError: there is no world.
        FileExistsError: the folder holds something else than an earlier demo.
        ValueError: it carries no clips, or only short ones, or a part of it is damaged.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    began = time.perf_counter()
    world, clips = load_world(run), read_clips(run)
    if clips is None or clips.frames.shape[1] <= NUM_GIVEN:
        raise ValueError(f"{run} carries no clips of more than {NUM_GIVEN} frames to begin from")
    with cpu_threads(stream_threads(threads, world.model.config)):
        start = begin_stream(world, clips, seed)
        to_begin_s = time.perf_counter() - began
        # The copy's frame is the stream's first one.
        start.fork().step(clips.actions[:1, NUM_GIVEN])
        first_frame_s = time.time() - psutil.Process().create_time()
        # A world that cannot be read, its autoencoder with it, leaves no folder behind.
        claim_folder(out)
        frames, timings = stream(start, clips, shown_names(world.card))
    streamed = [timing for of_one in timings.values() for timing in of_one[NUM_WARM_UP:]]
    true = clips.pixels(0, NUM_GIVEN + len(frames["its own actions"]))
    length = min(len(made) for made in frames.values())
    horizons = [place + 1 for place in spread(length, NUM_SHOWN)]
    draw = write_stream(true, frames, NUM_GIVEN, horizons, world.card.fps, out)
    timing = summarize(streamed)
    result: dict[str, Any] = {
        "world": run.name,
        "kind": type(world.model).__name__,
        "parameters": num_parameters(world.model),
        "denoising_steps": world.sampling.num_steps,
        "frames_per_second": 1 / timing["total"]["mean"],
        "seconds_to_first_frame": to_begin_s + timings["its own actions"][0].total_s,
        "first_frame_s": first_frame_s,
        "timing": timing,
        "frames": sum(len(of_one) for of_one in timings.values()),
        "timed_frames": len(streamed),
        "timed": f"{TIMED}; one stream at a time, the first {NUM_WARM_UP} frames of each left out; "
        "seconds_to_first_frame: from reading the weights on; first_frame_s: from the start of the "
        "process on, Python's imports among it",
        "settings": {"seed": seed, "sampling": to_json(world.sampling)},
    } | provenance("cpu")
    write_report(result, draw, out)
    write_json(result, out / "report.json")
    console.print(
        f"{result['frames']} frames of {world.card.height}x{world.card.width}, "
        f"{result['denoising_steps']} steps each: {result['frames_per_second']:.0f} frames/s, "
        f"the first {result['first_frame_s']:.1f} s after the start of the command"
    )
    console.print(f"report: {out / 'report.html'}")
    return result


def claim_folder(out: Path) -> None:
    """Make a demo's folder, or take that of an earlier demo; refuse others (FileExistsError)."""
    if not (out / MARKER).is_file():
        refuse_used(out, "an earlier demo")
    out.mkdir(parents=True, exist_ok=True)
    write_text("A demo of scd lies here; `scd demo` may write to this folder.\n", out / MARKER)


def begin_stream(world: World, clips: Clips, seed: int) -> Rollout:
    engine = open_engine(world.model, "fast")
    rollout = Rollout(world, seed=seed, engine=engine)
    actions = clips.actions[:1, :NUM_GIVEN]
    rollout.begin(clips.pixels(0, NUM_GIVEN)[None], Conditions(actions=actions))
    return rollout


def stream(
    start: Rollout, clips: Clips, action_names: Sequence[str]
) -> tuple[dict[str, Float[Tensor, "_ 3 h w"]], dict[str, list[Timing]]]:
    """Continue copies of one stream under the clip's actions and under each action held down."""
    own = clips.actions[0, NUM_GIVEN:]
    steerings = {"its own actions": own} | {
        name: torch.full((NUM_HELD,), number) for number, name in enumerate(action_names)
    }
    frames: dict[str, Tensor] = {}
    timings: dict[str, list[Timing]] = {}
    for name, actions in steerings.items():
        rollout, timings[name], made = start.fork(), [], []
        for action in actions:
            made.append(rollout.step(action[None])[0])
            timings[name].append(rollout.timing)
        frames[name] = torch.stack(made)
    return frames, timings


def write_report(
    result: Mapping[str, Any], draw_frames: Callable[[Path, Ink], None], out: Path
) -> None:
    timing = result["timing"]
    parts = {
        "encoder, once per frame": timing["encoder"],
        "decoder, all steps": timing["decoder"],
        "total": timing["total"],
    }
    write_page(
        "demo/first_look.html",
        out / "report.html",
        title="A world, streamed and steered",
        result=result,
        not_claimed=NOT_CLAIMED,
        num_given=NUM_GIVEN,
        stream=out / "rollout.mp4",
        frames=plot(draw_frames, "Frames under each steering, one row each"),
        numbers=[
            (f"{result['frames_per_second']:.0f}", "frames per second, one stream"),
            (f"{timing['total']['p50'] * 1e3:.1f} ms", "per frame, median"),
            (
                f"{result['seconds_to_first_frame']:.1f} s",
                "from the weights file to the first frame",
            ),
            (f"{result['parameters'] / 1e6:.1f} M", "parameters"),
            (f"{result['denoising_steps']}", "denoising steps per frame"),
        ],
        speed_lines=[
            [name, *(f"{part[at] * 1e3:.2f}" for at in ("mean", "p50", "p99"))]
            for name, part in parts.items()
        ],
    )
