"""One video of a prompt, as it streams: frames, and the seconds that each step took."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import cpu_threads, peak_memory_gib
from scd.evaluation.media import PictureRow, spread, write_grid, write_video
from scd.sampling.text_to_video import TextToVideo, VideoConfig, first_frame_of, read_picture
from scd.streaming.video import StepTiming, TextStream

NUM_SHOWN = 12
"""Columns of the picture, spread evenly over the frames."""

TIMED = (
    "wall-clock seconds, synchronised with the device; denoise_only: all passes of the network, "
    "causal ones included, nothing of the decoder; end_to_end: these and the decoder; a step is a "
    "latent frame, or a block of them; the first step is apart from the rest; first_frame_s begins "
    "when the prompt is embedded; embedding prompts, loading and writing files are in none of them"
)
"""What the seconds mean, for result files."""


@dataclass(frozen=True, kw_only=True)
class PromptSampleConfig:
    """One video of a prompt."""

    prompt: str
    """What to show."""
    video: Annotated[VideoConfig, tyro.conf.arg(name="")]
    """The run, and how it makes video."""
    seconds: float = 5.0
    """Length of the video, rounded up to whole latent frames."""
    prompt_at: tuple[str, ...] = ()
    """Other prompts from some second on: "2.0: TEXT" "3.5: TEXT". The past stays as it is."""
    first: str = ""
    """Picture, or video whose first frame is taken, that the video begins with, scaled until it
    covers the frame. Empty: it begins from nothing."""
    seed: int = 0
    """Seed of the noise."""
    out: str = "sample"
    """Folder for sample.mp4, sample.png and sample.json."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")
        for second, _ in parse_switches(self.prompt_at):
            if second >= self.seconds:
                raise ValueError(
                    f"prompt_at has a prompt from {second:g} s on, the video has {self.seconds:g} s"
                )


@dataclass(frozen=True, kw_only=True)
class Video:
    """Frames of one stream and when they came."""

    frames: Float[Tensor, "t 3 h w"]
    """In [-1, 1], on the CPU; given ones first, as the decoder shows them."""
    num_given: int
    """Given frames among them."""
    timings: list[StepTiming]
    """Of each step."""
    first_frame_s: float
    """Seconds from the embedded prompt to the first generated frame."""


def parse_switches(words: Sequence[str]) -> list[tuple[float, str]]:
    """Read prompts with the second at which they begin, "2.0: TEXT", in the order of time.

    Raises:
        ValueError: no such form, or two at the same time.
    """
    switches = []
    for word in words:
        second, colon, prompt = word.partition(":")
        try:
            begins = float(second)
        except ValueError:
            begins = math.nan
        if not colon or not prompt.strip() or not 0 <= begins < math.inf:
            raise ValueError(f'prompt_at needs a second and a prompt, "2.0: TEXT", got {word!r}')
        switches.append((begins, prompt.strip()))
    seconds = [second for second, _ in switches]
    if len(set(seconds)) < len(seconds):
        raise ValueError(f"prompt_at has two prompts from the same second on: {sorted(seconds)}")
    return sorted(switches)


def latent_at(second: float, fps: float) -> int:
    """Return the first latent frame none of whose frames is shown before a second."""
    frame, latent = round(second * fps), 0
    while first_frame_of(latent) < frame:
        latent += 1
    return latent


def render(
    stream: TextStream,
    text: Float[Tensor, "1 l _"],
    num_latents: int,
    null_text: Float[Tensor, "1 l _"] | None = None,
    given: Float[Tensor, "1 t c h w"] | None = None,
    switches: Mapping[int, Tensor] | None = None,
) -> Video:
    """Stream one video.

    Args:
        stream: of one batch row; it begins anew.
        text: embedded prompt.
        num_latents: latent frames of the whole video, given ones included.
        null_text: what guidance leads away from.
        given: latents of given first frames.
        switches: embedded prompts [1 l c] by the latent frame from which on they hold.

    Raises:
        ValueError: no frame left to generate, or what the stream refuses.
    """
    if given is not None and given.shape[1] >= num_latents:
        raise ValueError(
            f"the {given.shape[1]} given latent frames leave none to generate of {num_latents}"
        )
    waiting = sorted((switches or {}).items())
    began = time.perf_counter()
    shown = [stream.begin(text, null_text, given)[0].cpu()]
    timings, first_s = [], 0.0
    while stream.num_latents < num_latents:
        while waiting and waiting[0][0] <= stream.num_latents:
            stream.steer(waiting.pop(0)[1], null_text)
        step_began = time.perf_counter()
        shown.append(stream.step()[0].cpu())
        assert stream.timing is not None
        timings.append(stream.timing)
        first_s = first_s or step_began - began + stream.timing.ready_s
    return Video(
        frames=torch.cat(shown),
        num_given=shown[0].shape[0],
        timings=timings,
        first_frame_s=first_s,
    )


def sample_prompt(config: PromptSampleConfig) -> dict[str, Any]:
    """Render one video, write it with a picture and the result, and return the result.

    Raises:
        FileNotFoundError: no such run, picture, or parts of the source.
        ValueError: a run that no text steers, or prompts that are empty or too long.
    """
    prompts = [config.prompt, *(prompt for _, prompt in parse_switches(config.prompt_at))]
    began = time.perf_counter()
    parts = TextToVideo(config.video, prompts)
    opened_s = time.perf_counter() - began
    with cpu_threads(parts.threads):
        video = _render(config, parts)
    out = Path(config.out)
    write_video(video.frames, out / "sample.mp4", parts.fps)
    write_shown(video.frames, video.num_given, out / "sample.png")
    result = {
        "frames": len(video.frames),
        "given_frames": video.num_given,
        "fps": parts.fps,
        "speed": speed(video),
        "timed": TIMED,
        "opened_s": opened_s,
        "peak_memory_gib": peak_memory_gib(parts.device),
        "model": parts.described,
        "settings": to_json(config),
    } | provenance(parts.device)
    write_json(result, out / "sample.json")
    return result


def _render(config: PromptSampleConfig, parts: TextToVideo) -> Video:
    card, switches = parts.world.card, parse_switches(config.prompt_at)
    texts = parts.embed([config.prompt, *(prompt for _, prompt in switches)])
    given = None
    if config.first:
        given = parts.encode(read_picture(config.first, card.height, card.width))
    return render(
        parts.stream(config.seed),
        texts[:1],
        parts.num_latents(math.ceil(config.seconds * card.fps)),
        parts.embed_negative(),
        given,
        {
            latent_at(second, card.fps): texts[number : number + 1]
            for number, (second, _) in enumerate(switches, start=1)
        },
    )


def speed(video: Video) -> dict[str, Any]:
    """Return frames per second and seconds, of the network alone and of the whole, for people."""
    first, steady = video.timings[0], video.timings[1:] or video.timings
    frames = sum(timing.num_frames for timing in steady)
    spans = {
        "denoise_only": [timing.denoise_only_s for timing in steady],
        "end_to_end": [timing.total_s for timing in steady],
    }
    return {
        "first_frame_s": video.first_frame_s,
        "first_frame_denoise_only_s": first.context_s + first.denoise_s,
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
        f"second, decoder {result['model']['decoder']}",
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


def write_shown(frames: Float[Tensor, "t 3 h w"], num_given: int, path: Path) -> None:
    """Write some frames of a video, spread evenly, with their numbers, as a .png file."""
    shown = spread(len(frames), NUM_SHOWN)
    columns = [f"{index}, given" if index < num_given else str(index) for index in shown]
    write_grid([PictureRow(name="video", frames=frames[shown])], columns, path)
