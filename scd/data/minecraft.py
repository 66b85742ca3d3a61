"""TECO-Minecraft: 300 frames of 128 x 128 pixels with actions, as videos or as published latents.

    train/0/1234.mp4, train/0/1234.npz     TECO's archive: a video, and its `actions` beside it
    training/..., minecraft_train.json     FAR's copy: the same files, and lists of them
    training/...pt                         FAR's latents, [t c h w], before they are scaled

Latents may also be .npy, or `latents` in the .npz that holds the actions.
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from scd.data.clip import pixels_to_frames
from scd.data.headers import Files, Header
from scd.data.source import Split
from scd.data.teco import Listing, TecoConfig, TecoSource, check_header, find_split, read_ids
from scd.data.video import probe_video, read_video

ORIGIN = (
    "videos: https://archive.org/details/minecraft_marsh_dataset_aa .. _ak (TECO, 210 GB), or the "
    "data set guyuchao/Minecraft on huggingface.co, its shard-*.tar unpacked; latents: "
    "guyuchao/Minecraft_Latent"
)
"""Where the collection comes from."""

LATENT_SCALE = 0.2889
"""By which the published latents are multiplied to be of unit scale. Source: FAR's settings."""

LATENT_ENDINGS = (".pt", ".npy")
"""Files that hold nothing but the latents of an episode."""

LATENT_KEYS = ("latents", "latent")
"""Names of latents in an .npz that holds the actions too."""


@dataclass(frozen=True, kw_only=True)
class MinecraftConfig(TecoConfig):
    """What is expected of TECO-Minecraft."""

    size: int = 128
    """Height and width of a frame, in pixels."""


def list_minecraft(root: Path, split: Split) -> Listing:
    """List the episodes of the folder that holds a split, by FAR's list if there is one.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a damaged list.
    """
    keys = ("video_path", "latent_path", "action_path")
    found = find_split(root, split, "minecraft", keys, ORIGIN)
    if found.list_file is not None or found.folder is None:
        return found
    files = sorted(found.folder.rglob("*"))
    pictures = [file for file in files if file.suffix == ".mp4"]
    pictures = pictures or [file for file in files if file.suffix in LATENT_ENDINGS]
    if pictures:
        pairs = tuple((file, file.with_suffix(".npz")) for file in pictures)
        return replace(found, episodes=pairs)
    alone = tuple((file,) for file in files if file.suffix == ".npz")
    return replace(found, episodes=alone)


def open_minecraft(
    root: Path, split: Split, config: MinecraftConfig, strict: bool = False, raw: bool = False
) -> TecoSource:
    """Open a split: `test` and `val` share the held-out folder.

    Args:
        root: the collection.
        split: which episodes.
        config: what is expected of them.
        strict: stop at the first episode that cannot be used, instead of leaving it out.
        raw: give published latents as they are; only `scd encode` can use them.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no episodes can be used, or they are latents and not `raw`.
    """
    listing = list_minecraft(root, split)
    are_latents = has_latents(listing)
    if are_latents and not raw:
        raise ValueError(
            f"{root} holds published latents, which do not say of which autoencoder: make them "
            f"usable by scd encode minecraft:{root} --autoencoder PATH --latent-scale "
            f"{LATENT_SCALE} --out LATENTS"
        )

    def find_out(files: Files) -> Header:
        if are_latents:
            header = Header(
                num_frames=len(read_latents(files[0])), height=config.size, width=config.size
            )
        else:
            info = probe_video(files[0])
            header = Header(**vars(info))
        num_actions = len(read_ids(files[-1], config))
        if num_actions < header.num_frames:
            return Header(
                error=f"{files[-1]}: {header.num_frames} frames need as many actions, "
                f"got {num_actions}"
            )
        return check_header(header, config, files[0])

    def read_frames(files: Files, start: int, num_frames: int) -> torch.Tensor:
        if are_latents:
            return read_latents(files[0])[start : start + num_frames].float()
        return pixels_to_frames(torch.from_numpy(read_video(files[0], start, num_frames)))

    name = f"minecraft:{root.absolute()}"
    return TecoSource(name, listing, split, config, find_out, read_frames, are_latents, strict)


def has_latents(listing: Listing) -> bool:
    """Tell whether episodes are latents instead of videos."""
    return bool(listing.episodes) and listing.episodes[0][0].suffix != ".mp4"


def read_latents(path: Path) -> torch.Tensor:
    """Read the published latents of an episode, [t c h w].

    Raises:
        ValueError: missing, damaged or something else.
    """
    try:
        if path.suffix == ".pt":
            latents = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".npy":
            latents = torch.from_numpy(np.load(path))
        else:
            with np.load(path) as arrays:
                latents = torch.from_numpy(arrays[next(k for k in LATENT_KEYS if k in arrays)])
    except (OSError, RuntimeError, ValueError, EOFError, StopIteration) as error:
        raise ValueError(f"{path}: holds no latents that can be read ({error!r})") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: is damaged ({error})") from error
    if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
        found = list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"{path}: needed latents [t, c, h, w], got {found}")
    return latents
