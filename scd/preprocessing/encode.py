"""`scd encode`: the latents of a collection, written once, by any number of processes.

Each process writes the files whose number leaves its own number as a remainder. A file that is
there and whole is left alone, so the same command continues what was interrupted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from scd.autoencoders.build import Autoencoder, build_autoencoder, fingerprint
from scd.autoencoders.text_encoder import PromptEmbedder
from scd.common.config import to_json
from scd.common.runtime import choose_device, parse_shard
from scd.data.clip import Clip
from scd.data.latents import (
    FORMAT,
    EncodedEpisode,
    LatentsInfo,
    begin,
    is_whole,
    remove_leftovers,
    write_episodes,
    write_null_text,
)
from scd.data.source import Source, Split
from scd.preprocessing.parts import choose_autoencoder, choose_texts, embed, open_sources
from scd.preprocessing.settings import EncodeConfig

READ_AHEAD = 2
"""Episodes that are read while another is encoded."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What one process did."""

    folder: Path
    """The folder of latents."""
    files_written: int
    """Files written now."""
    files_found: int
    """Files of this process that were there before."""
    files_left: int
    """Files that other processes still have to write."""
    frames: int
    """Latent frames written now."""
    seconds: float
    """Time that took, reading included."""


def encode(config: EncodeConfig) -> Encoded:
    """Write this process's files, going on where an earlier call was interrupted.

    Raises:
        FileNotFoundError: no such data, autoencoder or text encoder.
        FileExistsError: the folder holds another encoding, or something else.
        ValueError: data that this autoencoder cannot encode, an episode without a prompt, latents
            that are not finite, or no episodes.
        OSError: the folder cannot be written.
    """
    out, device = Path(config.out), choose_device(config.device)
    sources = open_sources(config)
    autoencoder = choose_autoencoder(config, sources, device)
    embedder, null_text = choose_texts(config, device)
    info = _describe(config, sources, autoencoder, embedder, null_text)
    begin(out, info)
    if null_text is not None:
        write_null_text(out, info, null_text)
    jobs: list[tuple[Split, int]] = [
        (split, number) for split in sources for number in range(info.num_files(split))
    ]
    index, num_processes = parse_shard(config.shard)
    mine = jobs[index::num_processes]
    todo = [job for job in mine if not is_whole(out, info, *job)]
    began, num_frames = time.perf_counter(), 0
    for split, number in track(todo, f"encoding into {out}", disable=not todo):
        remove_leftovers(out, info.file_name(split, number))
        episodes = _encode_file(config, info, sources[split], autoencoder, embedder, split, number)
        write_episodes(out, info, split, number, episodes)
        num_frames += sum(len(episode.latents) for episode in episodes)
    return Encoded(
        folder=out,
        files_written=len(todo),
        files_found=len(mine) - len(todo),
        files_left=sum(not (out / info.file_name(*job)).is_file() for job in jobs),
        frames=num_frames,
        seconds=time.perf_counter() - began,
    )


def readable(encoded: Encoded) -> str:
    """Say in one line for people what was done."""
    line = (
        f"{encoded.folder}: {encoded.files_written} files written, {encoded.files_found} were there"
    )
    if encoded.frames:
        line += f", {encoded.frames / encoded.seconds:.0f} latent frames/s"
    if encoded.files_left:
        line += f"; {encoded.files_left} files are left to other processes (--shard)"
    return line


def _describe(
    config: EncodeConfig,
    sources: dict[Split, Source],
    autoencoder: Autoencoder,
    embedder: PromptEmbedder | None,
    null_text: Tensor | None,
) -> LatentsInfo:
    """Say what the folder will hold.

    Raises:
        ValueError: frames that this autoencoder cannot encode, or actions where it joins frames.
    """
    card = next(iter(sources.values())).card
    factor = autoencoder.config.frames_per_latent
    if factor > 1 and card.conditions.has_actions:
        raise ValueError(
            f"{config.autoencoder} makes one latent frame of {factor} frames, but {config.data} "
            "has an action for each: there is no one action of a latent frame"
        )
    if null_text is not None:
        conditions = replace(
            card.conditions, text_length=config.text_length, text_dim=null_text.shape[-1]
        )
        card = replace(card, conditions=conditions)
    lengths = {
        split: tuple(
            1 + (source.num_frames(episode) - 1) // factor for episode in range(source.num_episodes)
        )
        for split, source in sources.items()
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
        text="" if embedder is None else embedder.name,
        episodes_per_file=config.episodes_per_file,
        train=lengths.get("train", ()),
        val=lengths.get("val", ()),
        test=lengths.get("test", ()),
    )


def _encode_file(
    config: EncodeConfig,
    info: LatentsInfo,
    source: Source,
    autoencoder: Autoencoder,
    embedder: PromptEmbedder | None,
    split: Split,
    number: int,
) -> list[EncodedEpisode]:
    episodes = info.episodes(split, number)
    encoded = []
    for episode, clip in zip(episodes, _read_ahead(source, episodes), strict=True):
        latents = _encode_clip(config, info, clip, autoencoder, f"{split} episode {episode}")
        latents = latents[: info.lengths(split)[episode]]
        text = None
        if embedder is not None:
            text = embed(embedder, source.prompt(episode))
        encoded.append(
            EncodedEpisode(latents=latents, actions=clip.actions, label=clip.label, text=text)
        )
    return encoded


def _read_ahead(source: Source, episodes: range) -> Iterator[Clip]:
    """Read whole episodes in order, some of them ahead."""
    waiting: deque[Future[Clip]] = deque()
    left = deque(episodes)
    with ThreadPoolExecutor(READ_AHEAD, "episodes") as pool:
        while left or waiting:
            while left and len(waiting) <= READ_AHEAD:
                episode = left.popleft()
                waiting.append(pool.submit(source.read, episode, 0, source.num_frames(episode)))
            yield waiting.popleft().result()


@torch.no_grad()
def _encode_clip(
    config: EncodeConfig, info: LatentsInfo, clip: Clip, autoencoder: Autoencoder, where: str
) -> Float[Tensor, "t c h w"]:
    """Encode an episode, or take over its published latents; as they are stored, on the CPU.

    Raises:
        ValueError: published latents of another shape, or values that are not finite.
    """
    if not clip.encoded and config.latent_scale != 1:
        raise ValueError(f"latent_scale is for published latents, {config.data} holds videos")
    if clip.encoded:
        if tuple(clip.frames.shape[1:]) != info.shape:
            raise ValueError(
                f"{config.data}: {where} has latents of {tuple(clip.frames.shape[1:])}, "
                f"{config.autoencoder} makes {info.shape} (channels, rows, columns)"
            )
        latents = clip.frames * config.latent_scale
    elif info.frames_per_latent > 1:
        num_frames = 1 + (len(clip) - 1) // info.frames_per_latent * info.frames_per_latent
        latents = autoencoder.encode(clip.frames[None, :num_frames])[0].cpu()
    else:
        parts = clip.frames.split(config.batch_size)
        latents = torch.cat([autoencoder.encode(part[None])[0].cpu() for part in parts])
    if not torch.isfinite(latents).all():
        raise ValueError(f"{config.data}: {where} has latents that are not finite")
    largest = float(latents.abs().max())
    if config.stored == "fp16" and largest > torch.finfo(torch.float16).max:
        raise ValueError(f"{config.data}: {where} has latents up to {largest:.3g}: --stored bf16")
    return latents
