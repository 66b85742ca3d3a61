"""`scd encode`: the latents of a collection, written once, by any number of processes.

Each process writes the files whose number leaves its own number as a remainder. A file that is
there and whole is left alone, so the same command continues what was interrupted.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.build import (
    Autoencoder,
    build_autoencoder,
    fingerprint,
    open_autoencoder,
)
from scd.autoencoders.config import PixelConfig
from scd.autoencoders.diffusers import ImageAutoencoder, with_statistics
from scd.autoencoders.text_encoder import PromptEmbedder, TextConfig, default_cache
from scd.common.config import to_json
from scd.common.files import remove_leftovers, write_file
from scd.common.processes import Processes
from scd.common.threads import ThreadChoice
from scd.data.clip import Clip, by_latent
from scd.data.fingerprint import changes, read_fingerprint
from scd.data.fingerprint import fingerprint as data_fingerprint
from scd.data.frame_rate import check_rate
from scd.data.latents import (
    DATA_FILE,
    FORMAT,
    PLACE,
    EncodedEpisode,
    LatentsInfo,
    begin,
    is_latents,
    is_whole,
    write_episodes,
    write_null_text,
)
from scd.data.loader import Loader, UnreadableClip, read_clip
from scd.data.source import DataCard, EmptySplit, Source, open_source
from scd.data.spaces import OnError, Split
from scd.models.shipped import find_world_parts
from scd.preprocessing.settings import EncodeConfig

PIXELS = "pixels"
"""Name of the autoencoder that only standardises."""

MEASURED_BATCHES, MEASURED_CLIPS, MEASURED_FRAMES = 16, 4, 8
"""Clips on which mean and deviation of pixels or latents are measured."""

READ_AHEAD = 2
"""Episodes that are read while another is encoded."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What this process did, and those that were started with it."""

    folder: Path
    files_written: int
    files_found: int
    """Files of these processes that were there before."""
    files_left: int
    """Files that other processes still have to write."""
    frames: int
    """Latent frames written now."""
    left_out: int
    """Episodes written now that could not be read, and are stored without frames."""
    seconds: float
    """Time that took, reading included."""


def encode(config: EncodeConfig) -> Encoded:
    """Write this process's files, going on where an earlier call was interrupted.

    Raises:
        FileNotFoundError: no such data, autoencoder or text encoder.
        FileExistsError: the folder holds another encoding, or something else.
        ValueError: data that this autoencoder cannot encode, or that has changed since the folder
            was begun, an episode without a prompt, latents that are not finite, or no episodes.
        OSError: the folder cannot be written.
    """
    processes = Processes(config.device, config.precision)
    index, num_processes = processes.share(config.shard)
    out, encoding = Path(config.out), Encoding(config, processes)
    info = encoding.info
    marks: dict[Split, Any] = {one: encoding.fingerprint(one) for one in encoding.sources}
    with processes.one_by_one():
        # First: other pictures have other statistics too, and this says why.
        check_data(config, marks)
        begin(out, info)
        for split, mark in marks.items():
            write_file(out / DATA_FILE.format(split), json.dumps(mark))
        if encoding.null_text is not None:
            write_null_text(out, info, encoding.null_text)
    jobs: list[tuple[Split, int]] = [
        (split, number) for split in encoding.sources for number in range(info.num_files(split))
    ]
    if num_processes == 1:
        # Others might be writing what all of them say about the folder.
        remove_leftovers(out)
    mine = jobs[index::num_processes]
    todo = [job for job in mine if not is_whole(out, info, *job)]
    began, num_frames, left_out = time.perf_counter(), 0, 0
    for split, number in track(todo, f"encoding into {out}", disable=not todo):
        remove_leftovers(out, info.file_name(split, number))
        with encoding.threads:
            try:
                episodes = encoding.episodes(split, number)
            except UnreadableClip as error:
                raise UnreadableClip(
                    f"{error}. What {out} holds is kept, and the same command goes on from there"
                ) from error
        write_episodes(out, info, split, number, episodes)
        num_frames += sum(len(episode.latents) for episode in episodes if episode)
        left_out += episodes.count(None)
    seconds = time.perf_counter() - began
    all_done = processes.gather((len(todo), len(mine) - len(todo), num_frames, left_out))
    files_written, files_found, num_frames, left_out = map(sum, zip(*all_done, strict=True))
    left = [job for job in jobs if not (out / info.file_name(*job)).is_file()]
    processes.end()
    return Encoded(
        folder=out,
        files_written=files_written,
        files_found=files_found,
        files_left=len(left),
        frames=num_frames,
        left_out=left_out,
        seconds=seconds,
    )


def check_data(config: EncodeConfig, marks: Mapping[Split, Any]) -> None:
    """Refuse to go on with other episodes than a folder was begun with (ValueError)."""
    for split, mark in marks.items():
        path = Path(config.out) / DATA_FILE.format(split)
        # Folders of an earlier scd have none.
        if path.is_file() and (found := changes(read_fingerprint(path), mark)):
            raise ValueError(
                f"{config.data} is not the data that {config.out} was begun with ({split}): "
                f"{'; '.join(found)}. Another --out encodes it as it is now"
            )


def readable(encoded: Encoded) -> str:
    """Say in one line for people what was done."""
    line = (
        f"{encoded.folder}: {encoded.files_written} files written, {encoded.files_found} were there"
    )
    if encoded.frames:
        line += f", {encoded.frames / encoded.seconds:.0f} latent frames/s"
    if encoded.left_out:
        line += f"; {encoded.left_out} episodes could not be read and are left out"
    if encoded.files_left:
        line += f"; {encoded.files_left} files are left to other processes (--shard)"
    return line


class Encoding:
    """Episodes, autoencoder and text encoder of an encoding, and what its folder will hold.

    Raises:
        FileNotFoundError, ValueError: as `encode`.
    """

    def __init__(self, config: EncodeConfig, processes: Processes) -> None:
        self.config = config
        device = processes.device
        self.sources = open_sources(config)
        self.autoencoder = choose_autoencoder(config, self.sources, device)
        small = isinstance(self.autoencoder, PixelAutoencoder)
        active = device.type == "cpu" and processes.number == 1
        self.threads = ThreadChoice(config.threads, active=active, small=small)
        # A text encoder is large, and its prompts may be found in the cache, in no time.
        self.text_threads = ThreadChoice(config.threads, active=False)
        self.embedder: PromptEmbedder | None = None
        self.null_text: Tensor | None = None
        if config.text_encoder:
            settings = TextConfig(
                length=config.text_length, device=str(device), cache=default_cache()
            )
            self.embedder = PromptEmbedder(parts_of(config.text_encoder), settings)
            self.null_text = self._embed("")
        self.info = self._describe()

    def _describe(self) -> LatentsInfo:
        config, autoencoder = self.config, self.autoencoder
        card = next(iter(self.sources.values())).card
        factor = autoencoder.config.frames_per_latent
        if autoencoder.config.is_video and card.conditions.has_actions:
            several = replace(card.conditions, actions_per_frame=factor)
            card = replace(card, conditions=several)
        if self.null_text is not None:
            text_dim = self.null_text.shape[-1]
            conditions = replace(card.conditions, text_length=config.text_length, text_dim=text_dim)
            card = replace(card, conditions=conditions)
        lengths = {
            split: tuple(
                1 + (source.num_frames(episode) - 1) // factor
                for episode in range(source.num_episodes)
            )
            for split, source in self.sources.items()
        }
        # Of the weights as they are stored: training compares them so.
        exact = autoencoder if config.precision == "fp32" else build_autoencoder(autoencoder.config)
        return LatentsInfo(
            format=FORMAT,
            data=config.data,
            card=card,
            autoencoder=to_json(autoencoder.config),
            fingerprint=fingerprint(exact),
            shape=autoencoder.latent_shape(card.height, card.width),
            frames_per_latent=factor,
            stored=config.stored,
            text="" if self.embedder is None else self.embedder.name,
            episodes_per_file=config.episodes_per_file,
            train=lengths.get("train", ()),
            val=lengths.get("val", ()),
            test=lengths.get("test", ()),
        )

    def fingerprint(self, split: Split) -> dict[str, Any]:
        """Return what tells the episodes of a split from others, with what is encoded of them."""
        return data_fingerprint(self.sources[split], prompts=self.embedder is not None)

    def episodes(self, split: Split, number: int) -> list[EncodedEpisode | None]:
        """Return the episodes of one file, encoded; None: one that is left out."""
        source, episodes, encoded = self.sources[split], self.info.episodes(split, number), []
        on_error = self.config.data_on_error
        for episode, clip in zip(episodes, _read_ahead(source, episodes, on_error), strict=True):
            if clip is None:
                encoded.append(None)
                continue
            latents = self._latents(clip, f"{split} episode {episode}")
            text = self._embed(source.prompt(episode)) if self.embedder else None
            encoded.append(
                EncodedEpisode(
                    latents=latents[: self.info.lengths(split)[episode]],
                    actions=self._actions(clip),
                    label=clip.label,
                    text=text,
                )
            )
        return encoded

    def _actions(self, clip: Clip) -> Tensor | None:
        return None if clip.actions is None else by_latent(self.info.card.conditions, clip.actions)

    @torch.no_grad()
    def _latents(self, clip: Clip, where: str) -> Float[Tensor, "t c h w"]:
        """Encode an episode, or take over its published latents; as they are stored, on the CPU."""
        config, info = self.config, self.info
        where = f"{config.data}: {where} has latents"
        if not clip.encoded and config.latent_scale != 1:
            raise ValueError(f"latent_scale is for published latents, {config.data} holds videos")
        if clip.encoded:
            if tuple(clip.frames.shape[1:]) != info.shape:
                raise ValueError(
                    f"{where} of {tuple(clip.frames.shape[1:])}, {config.autoencoder} makes "
                    f"{info.shape} (channels, rows, columns)"
                )
            latents = clip.frames * config.latent_scale
        elif self.autoencoder.config.is_video:
            num_frames = 1 + (len(clip) - 1) // info.frames_per_latent * info.frames_per_latent
            latents = self._encode(clip.frames[:num_frames])
        else:
            parts = clip.frames.split(config.batch_size)
            latents = torch.cat([self._encode(part) for part in parts])
        if not torch.isfinite(latents).all():
            raise ValueError(f"{where} that are not finite")
        largest = float(latents.abs().max())
        if config.stored == "fp16" and largest > torch.finfo(torch.float16).max:
            raise ValueError(f"{where} up to {largest:.3g}: --stored bf16")
        return latents

    def _encode(self, frames: Float[Tensor, "t 3 h w"]) -> Float[Tensor, "_ c _ _"]:
        with self.threads.piece(len(frames)):
            return self.autoencoder.encode(frames[None])[0].cpu()

    def _embed(self, prompt: str) -> Float[Tensor, "l d"]:
        """Embed one prompt, without what fills it up."""
        assert self.embedder is not None
        with self.text_threads.piece():
            return self.embedder.embed([prompt])[0, : len(self.embedder.tokens(prompt))]


def _read_ahead(source: Source, episodes: range, on_error: OnError) -> Iterator[Clip | None]:
    """Read whole episodes in order, some of them ahead; None: one that cannot be read."""
    waiting: deque[Future[Clip | None]] = deque()

    def read(episode: int) -> Clip | None:
        return read_clip(source, episode, 0, source.num_frames(episode), on_error)

    left = deque(episodes)
    with ThreadPoolExecutor(READ_AHEAD, "episodes") as pool:
        while left or waiting:
            while left and len(waiting) <= READ_AHEAD:
                episode = left.popleft()
                waiting.append(pool.submit(read, episode))
            yield waiting.popleft().result()


def open_sources(config: EncodeConfig) -> dict[Split, Source]:
    """Open the splits that there are; refuse what cannot be encoded or need not be (ValueError)."""
    if config.data.startswith("toy:"):
        raise ValueError(f"{config.data} is made while it is read: record it first (scd record)")
    if is_latents(config.data):
        raise ValueError(f"{config.data} holds latents already: name the videos")
    sources: dict[Split, Source] = {}
    for split in config.splits:
        try:
            sources[split] = open_source(config.data, split, config.strict, whole=True)
        except EmptySplit as error:
            logger.warning("%s", error)
    if not sources:
        raise ValueError(f"{config.data} has no episodes in {', '.join(config.splits)}")
    return sources


def choose_autoencoder(
    config: EncodeConfig, sources: dict[Split, Source], device: torch.device
) -> Autoencoder:
    """Open the autoencoder, at the scale that is asked for."""
    settings = None
    if config.autoencoder == PIXELS:
        settings = PixelConfig()
    else:
        world = find_world_parts(config.autoencoder)
        if world is not None:
            settings = world["autoencoder"]
            _warn_of_rate(config, world, next(iter(sources.values())).card)
    if config.precision != "fp32" and isinstance(settings, PixelConfig):
        raise ValueError(
            f"precision {config.precision} has no effect: {config.autoencoder} has pixels for "
            "latents, which are only brought to mean 0 and deviation 1"
        )
    if config.autoencoder == PIXELS:
        measured = PixelAutoencoder.measure(_measured_frames(sources, config.data_on_error))
        # Rounded, so that another machine has the same settings to the last digit.
        return PixelAutoencoder(
            replace(measured, mean=round(measured.mean, 3), std=round(measured.std, 3))
        )
    if settings is None:
        autoencoder = open_autoencoder(config.autoencoder, device, config.precision)
    else:
        autoencoder = build_autoencoder(settings, device, config.precision)
    if config.statistics == "measured":
        if not isinstance(autoencoder, ImageAutoencoder):
            raise ValueError(
                f"{config.autoencoder} is no autoencoder of pictures: its latents have the "
                "statistics that belong to it, --statistics given"
            )
        return with_statistics(autoencoder, _measured_frames(sources, config.data_on_error))
    return autoencoder


def parts_of(source: str) -> str:
    """Return where a text encoder lies: beside a world, or where it says; else in `source` itself.

    Raises:
        FileNotFoundError: the world does not say it.
    """
    world = find_world_parts(source)
    if world is None:
        return source
    place = getattr(world["autoencoder"], PLACE, "")
    if not world["autoencoder"].has_text_encoder or not place:
        raise FileNotFoundError(
            f"{source} does not say where a text encoder lies: name the folder with text_encoder/ "
            "and tokenizer/"
        )
    return place


def _warn_of_rate(config: EncodeConfig, world: Mapping[str, Any], card: DataCard) -> None:
    """Say that latents are of another rate than a Wan world, whose training will refuse them."""
    if world["model"].takes_text:
        try:
            check_rate(config.autoencoder, world["card"].fps, config.data, card.fps)
        except ValueError as error:
            logger.warning("these latents are not for training that world: %s", error)


def _measured_frames(
    sources: dict[Split, Source], on_error: OnError
) -> Iterator[Float[Tensor, "b t 3 h w"]]:
    """Draw the clips on which statistics are measured: the same in every process."""
    source = next(iter(sources.values()))
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    num_frames = min(MEASURED_FRAMES, max(lengths))
    loader = Loader(source, MEASURED_CLIPS, num_frames, seed=0, on_error=on_error)
    for index in range(MEASURED_BATCHES):
        yield loader.batch(index).frames
