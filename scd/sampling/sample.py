"""One stream from a checkpoint, as a video, a picture and the seconds that each frame took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import Precision, choose_device, cpu_threads
from scd.data.clip import Clip, Conditions
from scd.data.source import Source, Split, open_source
from scd.engine.interface import EngineKind
from scd.engine.open import advised_threads, open_engine
from scd.evaluation.media import PictureRow, spread, write_grid, write_video
from scd.evaluation.predict import TIMED, check_fit, choose_windows, summarize
from scd.models.build import num_parameters
from scd.models.checkpoint import World, load_world
from scd.models.flow import with_num_steps
from scd.models.shipped import read_clips
from scd.streaming.rollout import Guidance, Rollout, Timing

NUM_SHOWN = 12
"""Columns of the picture, spread evenly over the predicted frames."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """One stream from one checkpoint."""

    run: str
    """Run folder, one of its step folders, or a world folder."""
    data: str = ""
    """Where given frames and actions come from: "toy:32", "toy:64", or a folder of episodes. Empty:
    from the clips that the world carries, as a shipped one does; the seed chooses which."""
    context: int = 16
    """Given first frames. 0: begin from nothing."""
    frames: int = 64
    """Frames to generate after them."""
    steps: int | None = None
    """Denoising steps per frame; None: as the checkpoint says."""
    out: str = "sample"
    """Folder for sample.mp4, sample.png and sample.json."""
    split: Split = "val"
    """Part of the data that the clip is from."""
    seed: int = 0
    """Seed of the choice of the clip and of the noise."""
    guidance: Guidance = field(default_factory=Guidance)
    """How predictions are pushed away from an unconditional branch."""
    window: int | None = None
    """Frames in memory; None: as the model was trained."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or those the optimiser moved."""
    engine: EngineKind = "fast"
    """How the model is run: as it is written, or laid out for the machine; the frames are the same
    to rounding."""
    precision: Precision = "fp32"
    """Arithmetic of the stream, weights and memory included."""
    threads: int | None = None
    """CPU threads; None: what suits the size of the model, one for a small one."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""

    def __post_init__(self) -> None:
        if self.context < 0:
            raise ValueError(f"context must be 0 or more, got {self.context}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be 1 or more, got {self.threads}")
        if self.frames < 1:
            raise ValueError(f"frames must be 1 or more, got {self.frames}")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Frames of one stream and when they came."""

    frames: Float[Tensor, "m 3 h w"]
    """Generated frames in [-1, 1], on the CPU."""
    timings: list[Timing]
    """Of each frame."""
    time_to_first_frame_s: float
    """Seconds from the given frames to the first generated one."""


def sample(config: SampleConfig) -> dict[str, Any]:
    """Stream frames, write video, picture and result, and return the result.

    Raises:
        FileNotFoundError: no such run or data.
        ValueError: no episode has as many frames as the context, data of another kind than the
            model's, none for a world without clips of its own, or no context for a model that
            needs its first frame.
    """
    device = choose_device(config.device)
    world = load_world(config.run, config.weights, device)
    clip = _given_clip(config, world)
    world = replace(world, sampling=with_num_steps(world.sampling, config.steps))
    described = _describe(world)
    with cpu_threads(config.threads or advised_threads(world.model.config)):
        engine = open_engine(world.model, config.engine, config.precision, release=True)
        rollout = Rollout(
            world, guidance=config.guidance, seed=config.seed, window=config.window, engine=engine
        )
        stream = run_stream(rollout, clip, config.context, config.frames)
    out = Path(config.out)
    given = clip.frames[: config.context]
    write_video(torch.cat([given, stream.frames]), out / "sample.mp4", clip.fps)
    # A stream from nothing makes a world of its own: no truth to compare with.
    true = clip.frames[config.context :] if config.context else clip.frames[:0]
    write_picture(given, true, stream.frames, out / "sample.png")
    result = {
        "frames": config.frames,
        "true_frames": len(true),
        "frames_steered_by_the_episode": len(clip) - config.context,
        "frames_per_second": 1 / _mean_total(stream.timings),
        "time_to_first_frame_s": stream.time_to_first_frame_s,
        "seconds_per_frame": summarize(stream.timings[1:] or stream.timings),
        "first_frame_s": vars(stream.timings[0]) | {"total_s": stream.timings[0].total_s},
        "timed": f"{TIMED}; one stream, the first frame apart from the rest; writing files is not "
        "timed",
        "model": described,
        "settings": to_json(config),
    } | provenance(device)
    write_json(result, out / "sample.json")
    return result


def _given_clip(config: SampleConfig, world: World) -> Clip:
    """Return the clip that begins and steers the stream: of the data, or of the world's own."""
    if config.data:
        source = open_source(config.data, config.split, config.strict)
        check_fit(world, source.card, config.data)
        return choose_clip(source, config.context, config.frames, config.seed)
    clips = read_clips(config.run)
    if clips is None:
        raise ValueError(f"{config.run} carries no clips to begin from: name some --data")
    number, num_frames = config.seed % len(clips.frames), clips.frames.shape[1]
    if num_frames < max(config.context, 1):
        raise ValueError(
            f"a context of {config.context} frames was asked for, the clips of {config.run} have "
            f"{num_frames}"
        )
    wanted = config.context + config.frames
    return Clip(
        frames=clips.pixels(number, wanted),
        actions=clips.actions[number, :wanted],
        fps=world.card.fps,
    )


def _mean_total(timings: list[Timing]) -> float:
    steady = timings[1:] or timings
    return sum(timing.total_s for timing in steady) / len(steady)


def _describe(world: World) -> dict[str, Any]:
    return {
        "kind": type(world.model).__name__,
        "parameters": num_parameters(world.model),
        "sampling": to_json(world.sampling),
    }


def choose_clip(source: Source, num_given: int, num_generated: int, seed: int) -> Clip:
    """Choose a clip that begins and steers a stream.

    It is as long as the stream where there is such an episode; otherwise it is the longest episode.

    Raises:
        ValueError: no episode has as many frames as are given.
    """
    wanted = num_given + num_generated
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    longest = max(lengths)
    if longest < max(num_given, 1):
        raise ValueError(
            f"a context of {num_given} frames was asked for, the longest episode has {longest}"
        )
    if longest < wanted:
        return source.read(lengths.index(longest), 0, longest)
    ((episode, start),) = choose_windows(source, 1, wanted, seed)
    return source.read(episode, start, wanted)


def run_stream(rollout: Rollout, clip: Clip, num_given: int, num_generated: int) -> Stream:
    """Begin a stream with a clip's first frames and steer it by the clip's actions.

    Where the clip ends its actions start over.
    """
    labels = None if clip.label is None else torch.tensor([clip.label])
    actions = None if clip.actions is None else clip.actions[None]
    began = time.perf_counter()
    if num_given:
        past = None if actions is None else actions[:, :num_given]
        rollout.begin(clip.frames[None, :num_given], Conditions(actions=past, labels=labels))
    else:
        rollout.begin(None, Conditions(labels=labels))
    frames, timings, first_s = [], [], 0.0
    for index in range(num_given, num_given + num_generated):
        frame = rollout.step(None if actions is None else actions[:, index % len(clip)])
        first_s = first_s or time.perf_counter() - began
        frames.append(frame[0].cpu())
        timings.append(rollout.timing)
    return Stream(frames=torch.stack(frames), timings=timings, time_to_first_frame_s=first_s)


def write_picture(
    given: Float[Tensor, "g 3 h w"],
    true: Float[Tensor, "t 3 h w"],
    generated: Float[Tensor, "m 3 h w"],
    path: Path,
) -> None:
    """Write the truth, as far as it goes, above the generated frames, with their horizons.

    Args:
        given: first frames of the stream; the last one is shown in the first column.
        true: what followed them in the episode; may be shorter than the stream, or empty.
        generated: the stream.
        path: a .png file.
    """
    shown = spread(len(generated), NUM_SHOWN)
    last = given[-1:]
    prediction = PictureRow(name="prediction", frames=torch.cat([last, generated[shown]]))
    truth = PictureRow(
        name="truth",
        frames=torch.cat([last, true[[index for index in shown if index < len(true)]]]),
    )
    columns = ["given"] * len(last) + [f"+{index + 1}" for index in shown]
    write_grid([truth, prediction] if len(true) else [prediction], columns, path)
