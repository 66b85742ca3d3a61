"""`scd sample`: one stream as a video, a picture, and the seconds that each step took."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.config import differences, to_json
from scd.common.files import read_json
from scd.common.hub import fingerprint
from scd.common.memory import check_free
from scd.common.places import free_place, in_our_words, refuse_another
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device, choose_precision, cpu_threads, peak_memory_gib
from scd.common.weights import digest_of
from scd.data.clip import Clip, Conditions
from scd.data.source import Source, open_source
from scd.engine.open import open_engine, stream_threads
from scd.evaluation.grids import PictureRow, write_grid
from scd.evaluation.media import spread, write_video
from scd.evaluation.predict import TIMED, check_fit, choose_windows, summarize
from scd.models.build import num_parameters
from scd.models.checkpoint import (
    RAW_FILE,
    World,
    load_world,
    read_world_parts,
    resolve,
    results_folder,
)
from scd.models.flow import with_num_steps
from scd.models.shipped import read_clips
from scd.models.weights import WEIGHTS_FILE
from scd.sampling.settings import PromptSampleConfig, SampleConfig, parse_switches
from scd.sampling.text_to_video import (
    Script,
    Stream,
    TextToVideo,
    latent_at,
    read_picture,
    settled,
)
from scd.streaming.rollout import Rollout

VIDEO, PICTURE, RESULT = "sample.mp4", "sample.png", "sample.json"
"""Files of a sample's folder."""

OF_NO_EFFECT = (
    "run",
    "out",
    "device",
    "threads",
    "strict",
    "text_cache",
    "text_device",
    "offload",
)
"""Settings that change nothing in the video but where it comes from and how soon; which weights
the run has is told by their digest."""

NUM_SHOWN = 12
"""Columns of the picture, spread evenly over the frames."""

PROMPT_TIMED = (
    "wall-clock seconds, synchronised with the device; denoise_only: all passes of the network, "
    "causal ones included, nothing of the decoder; end_to_end: these and the decoder; a step is a "
    "latent frame, or a block of them; the first step is apart from the rest; first_frame_s begins "
    "when the prompt is embedded; embedding prompts, loading and writing files are in none of them"
)
"""What the seconds of a prompt's video mean, for result files."""


def sample(config: SampleConfig) -> dict[str, Any]:
    """Stream frames, write video, picture and result, and return the result.

    Its `settings` say where it was written.

    Raises:
        FileNotFoundError: no such run or data.
        FileExistsError: `out` holds another sample.
        ValueError: no episode has as many frames as the context, data of another kind than the
            model's, none for a world without clips of its own, or no context for a model that
            needs its first frame.
    """
    device = choose_device(config.device)
    config = replace(config, precision=choose_precision(config.precision, device))
    about = _about(config, config.run, config.weights, config.steps)
    config = replace(config, out=str(_place(config.out, config.run, about)))
    world = load_world(config.run, config.weights, device)
    clip = _given_clip(config, world)
    length = config.context + config.frames
    size = 4 * 3 * world.card.height * world.card.width
    check_free(f"a video of {length} frames", length * size, torch.device("cpu"))
    world = replace(world, sampling=with_num_steps(world.sampling, config.steps))
    described = {
        "kind": type(world.model).__name__,
        "parameters": num_parameters(world.model),
        "sampling": to_json(world.sampling),
    }
    with cpu_threads(stream_threads(config.threads, world.model.config)):
        engine = open_engine(world.model, config.engine, config.precision, release=True)
        rollout = Rollout(
            world, guidance=config.guidance, seed=config.seed, window=config.window, engine=engine
        )
        stream = run_stream(rollout, clip, config.context, config.frames)
    # A stream from nothing makes a world of its own: no truth to compare with.
    true = clip.frames[config.context :] if config.context else clip.frames[:0]
    first, steady = stream.timings[0], stream.timings[1:] or stream.timings
    result = {
        "frames": config.frames,
        "true_frames": len(true),
        "frames_steered_by_the_episode": len(clip) - config.context,
        "frames_per_second": len(steady) / sum(timing.total_s for timing in steady),
        "time_to_first_frame_s": stream.first_frame_s,
        "seconds_per_frame": summarize(steady),
        "first_frame_s": {
            name: getattr(first, name)
            for name in ("encoder_s", "decoder_s", "autoencoder_s", "total_s")
        },
        "timed": f"{TIMED}; one stream, the first frame apart from the rest; writing files is not "
        "timed",
        "model": described,
        "about": about,
        "settings": to_json(config),
    } | provenance(device)
    rows, columns = rows_of(stream, true)
    _write(config.out, stream, clip.fps, rows, columns, result)
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
    past = None if actions is None or not num_given else actions[:, :num_given]
    given = clip.frames[None, :num_given] if num_given else None
    shown = rollout.begin(given, Conditions(actions=past, labels=labels), can_reset=False)[0].cpu()
    frames, timings, first_s = [], [], 0.0
    for index in range(num_given, num_given + num_generated):
        frame = rollout.step(None if actions is None else actions[:, index % len(clip)])
        first_s = first_s or time.perf_counter() - began
        frames.append(frame.cpu())
        timings.append(rollout.timing)
    return Stream(given=shown, frames=torch.cat(frames), timings=timings, first_frame_s=first_s)


def rows_of(stream: Stream, true: Float[Tensor, "t 3 h w"]) -> tuple[list[PictureRow], list[str]]:
    """Lay out the truth, as far as it goes, above generated frames, and say their horizons.

    Args:
        stream: the last given frame, if any, is shown in the first column.
        true: what followed in the episode; may be shorter than the stream, or empty.
    """
    shown, last = spread(len(stream.frames), NUM_SHOWN), stream.given[-1:]
    known = true[[index for index in shown if index < len(true)]]
    prediction = PictureRow(name="prediction", frames=torch.cat([last, stream.frames[shown]]))
    truth = [PictureRow(name="truth", frames=torch.cat([last, known]))] if len(true) else []
    columns = ["given"] * len(last) + [f"+{index + 1}" for index in shown]
    return [*truth, prediction], columns


def _write(
    folder: str,
    stream: Stream,
    fps: float,
    rows: Sequence[PictureRow],
    columns: Sequence[str],
    result: Mapping[str, Any],
) -> None:
    out = Path(folder)
    write_video(torch.cat([stream.given, stream.frames]), out / VIDEO, fps)
    write_grid(rows, columns, out / PICTURE)
    write_json(result, out / RESULT)


def _about(config: Any, run: str, weights: str, steps: int | None) -> dict[str, Any]:
    """Return all that the frames depend on: settings, and what tells the world from others."""
    folder = resolve(run)
    file = folder / (WEIGHTS_FILE if weights == "ema" else RAW_FILE)
    parts, network = read_world_parts(folder), folder / "vae"
    return _effective(to_json(config)) | {
        "sampling": to_json(with_num_steps(parts["sampling"], steps)),
        "world": digest_of(file, "blake2b"),
        "autoencoder": to_json(parts["autoencoder"]),
        "network": fingerprint(network) if network.is_dir() else "",
    }


def _effective(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _effective(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in OF_NO_EFFECT
    }


def _place(out: str, run: str, about: Mapping[str, Any]) -> Path:
    """Return the folder of the sample; one that holds another is kept."""
    if not out:
        return free_place(results_folder(run) / "sample", lambda path: not _others(path, about))
    refuse_another(Path(out), "sample", _others(Path(out), about))
    return Path(out)


def _others(folder: Path, about: Mapping[str, Any]) -> list[str]:
    """List how a folder's sample differs from what is asked for; none: it is the same, or not
    there."""
    there = [name for name in (VIDEO, PICTURE, RESULT) if (folder / name).exists()]
    if not there:
        return []
    try:
        found = read_json(folder / RESULT)
        found = found["about"]
    except (ValueError, OSError, KeyError, TypeError):
        return [f"{' and '.join(there)} of unknown settings"]
    return differences(in_our_words(found, about), about)


def sample_prompt(config: PromptSampleConfig) -> dict[str, Any]:
    """Render one video, write it with a picture and the result, and return the result.

    Its `settings` say where it was written.

    Raises:
        FileNotFoundError: no such run, picture, or parts of the source.
        FileExistsError: `out` holds another sample.
        ValueError: a run that no text steers, or prompts that are empty.
    """
    prompts = [config.prompt, *(prompt for _, prompt in parse_switches(config.prompt_at))]
    config = replace(config, video=settled(config.video))
    about = _about(config, config.video.run, config.video.weights, config.video.steps)
    config = replace(config, out=str(_place(config.out, config.video.run, about)))
    began = time.perf_counter()
    parts = TextToVideo(config.video, prompts)
    opened_s, described, fps = time.perf_counter() - began, parts.described, parts.fps
    with cpu_threads(parts.threads):
        stream = _render(config, parts)
    num_given, frames = len(stream.given), torch.cat([stream.given, stream.frames])
    result = {
        "frames": len(frames),
        "given_frames": num_given,
        "fps": fps,
        "speed": speed(stream),
        "timed": PROMPT_TIMED,
        "opened_s": opened_s,
        "peak_memory_gib": peak_memory_gib(parts.device),
        "model": described,
        "about": about,
        "settings": to_json(config),
    } | provenance(parts.device)
    shown = spread(len(frames), NUM_SHOWN)
    columns = [f"{index}, given" if index < num_given else str(index) for index in shown]
    rows = [PictureRow(name="video", frames=frames[shown])]
    _write(config.out, stream, fps, rows, columns, result)
    return result


def _render(config: PromptSampleConfig, parts: TextToVideo) -> Stream:
    card, switches = parts.world.card, parse_switches(config.prompt_at)
    held_at = parse_switches(config.action_at, "action")
    held = parts.held({latent_at(second, card.fps): action for second, action in held_at})
    texts = parts.embed([config.prompt, *(prompt for _, prompt in switches)])
    given = None
    if config.first:
        given = parts.encode(read_picture(config.first, card.height, card.width))
    script = Script(
        text=texts[:1],
        num_latents=parts.num_latents(math.ceil(config.seconds * card.fps)),
        null_text=parts.embed_negative(),
        given=given,
        switches={
            latent_at(second, card.fps): texts[number : number + 1]
            for number, (second, _) in enumerate(switches, start=1)
        },
        actions=held,
    )
    return parts.video(config.seed, script, is_last=True)


def speed(stream: Stream) -> dict[str, Any]:
    """Return frames per second and seconds, of the network alone and of the whole, for people."""
    first, steady = stream.timings[0], stream.timings[1:] or stream.timings
    frames = sum(timing.num_frames for timing in steady)
    spans = {
        "denoise_only": [timing.denoise_only_s for timing in steady],
        "end_to_end": [timing.total_s for timing in steady],
    }
    return {
        "first_frame_s": stream.first_frame_s,
        "first_frame_denoise_only_s": first.denoise_only_s - first.update_s,
        **{
            name: {
                "frames_per_second": frames / sum(seconds),
                "step_p50_s": float(np.percentile(seconds, 50)),
                "step_p99_s": float(np.percentile(seconds, 99)),
            }
            for name, seconds in spans.items()
        },
        "steps_timed": len(steady),
    }


def readable_speed(result: Mapping[str, Any]) -> str:
    """Say a result of `sample_prompt` in a few lines."""
    speeds = result["speed"]
    lines = [
        f"{result['frames']} frames ({result['given_frames']} given) at {result['fps']:g} per "
        f"second in {result['model']['precision']}, decoder {result['model']['decoder']}",
        f"first frame after {speeds['first_frame_s']:.3f} s, "
        f"denoise-only {speeds['first_frame_denoise_only_s']:.3f} s",
    ]
    for name in ("denoise_only", "end_to_end"):
        one = speeds[name]
        lines.append(
            f"{name.replace('_', '-'):12} {one['frames_per_second']:.2f} frames/s, "
            f"a step p50 {one['step_p50_s']:.3f} s, p99 {one['step_p99_s']:.3f} s"
        )
    return "\n".join(lines)
