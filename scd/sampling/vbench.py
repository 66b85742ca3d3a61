"""Videos of many prompts in the folder layout that VBench's scorer reads: PROMPT-SEED.mp4.

Several processes, on as many machines as like, share the work: each takes every n-th video. A video
appears whole or not at all, and one that is there is not rendered again.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from scd.common.config import differences, to_json
from scd.common.files import read_json
from scd.common.places import in_our_words, refuse_another
from scd.common.processes import Processes
from scd.common.provenance import provenance, write_json
from scd.common.threads import ThreadChoice
from scd.data.clip import frames_to_pixels
from scd.data.prompts import read_lines
from scd.data.video import write_video
from scd.sampling.settings import VBenchConfig
from scd.sampling.text_to_video import Script, TextToVideo, settled

NAME_BYTES = 255
"""Longest name of a file on most disks."""

SETTINGS_FILE = "vbench.json"
"""What made the videos, beside them: a folder holds videos of one kind."""

FREE_FIELDS = ("out", "shard", "prompts", "texts")
"""Settings that may differ from process to process; prompts are compared by what is in them."""

FREE_VIDEO_FIELDS = ("device", "threads", "text_device", "text_cache", "offload")
"""The same, of how the video is made."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video."""

    name: str
    """Of its file."""
    text: str
    """What it shows."""
    seed: int
    """Of its noise."""


def list_jobs(config: VBenchConfig) -> list[Job]:
    """List all videos, of all shards.

    Raises:
        FileNotFoundError: no such file.
        ValueError: prompts that cannot name a file, or occur twice; another number of texts.
    """
    prompts = read_lines(config.prompts)
    _check_names(prompts, config)
    texts = read_lines(config.texts) if config.texts else prompts
    if len(texts) != len(prompts):
        raise ValueError(
            f"{config.texts} has {len(texts)} lines, {config.prompts} has {len(prompts)}: they "
            "belong together line by line"
        )
    return [
        Job(name=f"{prompt}-{number}.mp4", text=text, seed=config.first_seed + number)
        for prompt, text in zip(prompts, texts, strict=True)
        for number in range(config.seeds)
    ]


def _check_names(prompts: list[str], config: VBenchConfig) -> None:
    """Refuse prompts by which the scorer could not find its video (ValueError)."""
    longest = len(f"-{config.seeds - 1}.mp4".encode())
    for number, prompt in enumerate(prompts, start=1):
        where = f"line {number} of {config.prompts}"
        if "/" in prompt or "\0" in prompt or prompt.startswith("."):
            raise ValueError(
                f"{where} cannot name a file, since it has / or begins with .: {prompt}"
            )
        if len(prompt.encode()) + longest > NAME_BYTES:
            raise ValueError(
                f"{where} has {len(prompt.encode())} bytes, a file's name {NAME_BYTES} at most "
                f"({longest} of them for seed and ending): give a short prompt here and what it "
                f"shows in --texts"
            )
    seen: dict[str, int] = {}
    for number, prompt in enumerate(prompts, start=1):
        # Some disks do not tell capitals from small letters.
        other = seen.setdefault(prompt.lower(), number)
        if other != number:
            raise ValueError(f"{config.prompts} has the same prompt in lines {other} and {number}")


def vbench(config: VBenchConfig) -> int:
    """Render what is missing of this process's share, and return how many videos that were.

    Raises:
        FileNotFoundError: no such run or file, or parts of the source are missing.
        FileExistsError: the folder holds videos of other settings.
        ValueError: prompts that cannot name a file.
    """
    processes = Processes(config.video.device, config.video.precision)
    index, count = processes.share(config.shard)
    config = replace(config, video=settled(config.video))
    jobs = list_jobs(config)
    out = Path(config.out)
    mine = jobs[index::count]
    missing = [job for job in mine if not (out / job.name).exists()]
    _check_folder(config, jobs, out)
    console = Console()
    console.print(
        f"{len(jobs)} videos, {len(mine)} of them for shard {index}/{count}, "
        f"{len(mine) - len(missing)} are there",
        highlight=False,
    )
    if missing:
        video = replace(config.video, device=str(processes.device))
        parts = TextToVideo(video, [job.text for job in missing])
        _write_settings(config, jobs, out, parts)
        threads = ThreadChoice(
            config.video.threads,
            active=processes.device.type == "cpu" and processes.number == 1,
            small=parts.threads == 1,
        )
        with threads:
            _render_all(config, missing, out, parts, console, threads)
    num_rendered = sum(processes.gather(len(missing)))
    processes.end()
    return num_rendered


def _render_all(
    config: VBenchConfig,
    missing: list[Job],
    out: Path,
    parts: TextToVideo,
    console: Console,
    threads: ThreadChoice,
) -> None:
    num_latents = parts.num_latents(math.ceil(config.seconds * parts.world.card.fps))
    for number, job in enumerate(missing, start=1):
        began = time.perf_counter()
        text = parts.embed([job.text])
        negative = parts.embed_negative()
        with threads.piece():
            script = Script(
                text=text, num_latents=num_latents, null_text=negative, actions=parts.held()
            )
            video = parts.video(job.seed, script)
        pixels = frames_to_pixels(video.frames).numpy()
        write_video(out / job.name, pixels, parts.fps, lossless=False)
        seconds = time.perf_counter() - began
        console.print(
            f"{number}/{len(missing)}  {seconds:.1f} s  {job.name}", highlight=False, markup=False
        )


def _fixed(config: VBenchConfig, jobs: list[Job]) -> dict[str, Any]:
    """Return the settings on which the videos depend, what they show included."""
    settings = to_json(config)
    for name in FREE_FIELDS:
        del settings[name]
    for name in FREE_VIDEO_FIELDS:
        del settings["video"][name]
    return settings | {"shows": {job.name: job.text for job in jobs}}


def _check_folder(config: VBenchConfig, jobs: list[Job], out: Path) -> None:
    path = out / SETTINGS_FILE
    if not path.exists():
        return
    there = read_json(path)
    ours = _fixed(config, jobs)
    refuse_another(
        out, "set of videos", differences(in_our_words(there.get("settings"), ours), ours)
    )


def _write_settings(config: VBenchConfig, jobs: list[Job], out: Path, parts: TextToVideo) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS_FILE
    if not path.exists():
        made = {"settings": _fixed(config, jobs), "fps": parts.fps, "model": parts.described}
        write_json(made | provenance(parts.device), path)
