"""Settings of `scd sample` and `scd vbench`, apart from what carries them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from scd.common.config import (
    Precision,
    PrecisionChoice,
    StreamPrecisionChoice,
    Threads,
    added,
    at_least,
    check_threads,
    parse_shard,
    within,
)
from scd.data.spaces import Split
from scd.models.config import EngineKind, Guidance

MAX_FRAMES = 100_000
"""Most frames of a stream, which are all kept until the video is written."""

MAX_SECONDS = 3600
"""Longest video of a prompt."""


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
    out: str = ""
    """Folder for sample.mp4, sample.png and sample.json. Empty: sample in the run's folder, or
    sample-2, sample-3, ... where one of other settings is."""
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
    precision: PrecisionChoice = "fp32"
    """Arithmetic of the stream, weights and memory included. auto: bf16 where the device has
    instructions for it, and fp32 else."""
    threads: Threads = "auto"
    """CPU threads. auto: what suits the size of the model, one for a small one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""

    def __post_init__(self) -> None:
        at_least(0, context=self.context)
        within(1, MAX_FRAMES, frames=self.frames)
        check_threads(self.threads)


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How one run makes video of prompts."""

    run: str
    """Run folder, one of its step folders, or a world folder, whose model a text steers."""
    steps: int | None = None
    """Denoising steps per latent frame; None: as the checkpoint says."""
    guidance_scale: float = 1.0
    """Push away from the negative prompt, which doubles the work; 1: none, as few-step models
    need."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    action: str = added("", unwritten=True)
    """What is held in a world that actions steer besides its text: a name or number of its actions,
    or JSON, such as [0.1, 0] or {"keys": ["w"]}. Empty: what does nothing."""
    window: int | None = None
    """Latent frames in memory; None: as the model was trained."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or those the optimiser moved."""
    engine: EngineKind = "fast"
    """How the model is run: as it is written, or laid out for the machine."""
    precision: StreamPrecisionChoice = "auto"
    """Arithmetic of the model, weights and memory included. auto: bf16 where the device has
    instructions for it, and fp32, which takes twice the memory, else. int8: weights of the blocks
    in 8 bits on CPUs with VNNI, half the memory of bf16; fp8: the same on GPUs of compute
    capability 8.9 or more."""
    source: str = ""
    """Folder with vae/, text_encoder/ and tokenizer/ as diffusers writes them, or its name on the
    hub. Empty: where the run says."""
    tiny: str = ""
    """Small decoder instead of Wan's own: a file of TAEW's weights, or a folder of an
    AutoencoderTiny. Empty: Wan's own. Results name it."""
    decoder_precision: Precision = "fp32"
    """Arithmetic of the decoder."""
    offload: bool = False
    """Hold model and autoencoder in memory one after the other, not at once: a video's latents are
    all made before the first is decoded. The frames are the same; none is there before the end."""
    text_precision: Precision = "bf16"
    """Arithmetic of the text encoder: bf16 takes 11 GiB for Wan's, fp32 twice that."""
    text_device: str = "auto"
    """Where the text encoder runs; its memory is given back before the video begins. auto: where
    the model runs."""
    text_cache: str | None = None
    """Folder in which embedded prompts are kept; empty: nowhere. None: in the user's cache."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: Threads = "auto"
    """CPU threads of the video. auto: what suits the size of the model, one for a small one; among
    many videos, as many as the first ones are fastest with."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a number, got {self.guidance_scale}")
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError("negative_prompt has no effect on guidance_scale=1")
        at_least(1, steps=self.steps)
        check_threads(self.threads)


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
    action_at: tuple[str, ...] = added((), unwritten=True)
    """Other actions from some second on, as `action` takes them: "1.5: left"."""
    first: str = ""
    """Picture, or video whose first frame is taken, that the video begins with, scaled until it
    covers the frame. Empty: it begins from nothing."""
    seed: int = 0
    """Seed of the noise."""
    out: str = ""
    """Folder for sample.mp4, sample.png and sample.json. Empty: sample in the run's folder, or
    sample-2, sample-3, ... where one of other settings is."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MAX_SECONDS:
            raise ValueError(
                f"seconds must be above 0 and {MAX_SECONDS} at most, got {self.seconds}"
            )
        for name, words in (("prompt", self.prompt_at), ("action", self.action_at)):
            for second, _ in parse_switches(words, name):
                if second >= self.seconds:
                    raise ValueError(
                        f"{name}_at has one from {second:g} s on, the video has {self.seconds:g} s"
                    )


def parse_switches(words: Sequence[str], name: str = "prompt") -> list[tuple[float, str]]:
    """Read prompts, or actions, with the second at which they begin, "2.0: TEXT", in the order of
    time.

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
            raise ValueError(
                f'{name}_at needs a second and a {name}, "2.0: {name.upper()}", got {word!r}'
            )
        switches.append((begins, prompt.strip()))
    seconds = [second for second, _ in switches]
    if len(set(seconds)) < len(seconds):
        raise ValueError(f"{name}_at has two {name}s from the same second on: {sorted(seconds)}")
    return sorted(switches)


@dataclass(frozen=True, kw_only=True)
class VBenchConfig:
    """Videos of all prompts of a file."""

    video: Annotated[VideoConfig, tyro.conf.arg(name="")]
    """The run, and how it makes video."""
    prompts: str
    """Text file with a prompt per line, which gives the videos their names."""
    seeds: int = 5
    """Videos of each prompt: PROMPT-0.mp4 .. PROMPT-4.mp4. VBench takes 5."""
    out: str
    """Folder for the videos and vbench.json."""
    texts: str = ""
    """Text file with what is shown for each prompt instead, line by line: prompts that a language
    model wrote out, under the names of the short ones. Empty: the prompts themselves."""
    seconds: float = 5.0
    """Length of a video, rounded up to whole latent frames."""
    first_seed: int = 0
    """Seed of the noise of PROMPT-0.mp4; the following ones count up. Equal for all prompts."""
    shard: str = "0/1"
    """i/n: the i-th, from 0, of n processes that share the work."""

    def __post_init__(self) -> None:
        at_least(1, seeds=self.seeds)
        if not 0 < self.seconds <= MAX_SECONDS:
            raise ValueError(
                f"seconds must be above 0 and {MAX_SECONDS} at most, got {self.seconds}"
            )
        parse_shard(self.shard)
