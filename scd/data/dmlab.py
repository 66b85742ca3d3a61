"""DMLab in TECO's layout: an episode is an .npz with `video` [300 64 64 3] and `actions` [300].

train/0/1234.npz in TECO's archive; training/ and validation/ with the lists dmlab_train.json and
dmlab_val.json in FAR's copy.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from scd.data.clip import pixels_to_frames
from scd.data.headers import Files, Header
from scd.data.source import Split
from scd.data.teco import Listing, TecoConfig, TecoSource, check_header, find_split, read_ids

ORIGIN = (
    "https://archive.org/details/dmlab_dataset_aa .. _ac (TECO, 54 GB), or the data set "
    "guyuchao/DMLab on huggingface.co, its shard-*.tar unpacked"
)
"""Where the collection comes from."""

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
# What reading an archive raises that is missing, cut off, damaged, or something else.


@dataclass(frozen=True, kw_only=True)
class DMLabConfig(TecoConfig):
    """What is expected of DMLab."""

    size: int = 64
    """Height and width of a frame, in pixels."""


def list_dmlab(root: Path, split: Split) -> Listing:
    """List the episodes of the folder that holds a split, by FAR's list if there is one.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a damaged list.
    """
    found = find_split(root, split, "dmlab", ("video_path",), ORIGIN)
    if found.list_file is not None or found.folder is None:
        return found
    return replace(found, episodes=tuple((file,) for file in sorted(found.folder.rglob("*.npz"))))


def open_dmlab(root: Path, split: Split, config: DMLabConfig, strict: bool = False) -> TecoSource:
    """Open a split: `test` and `val` share the held-out folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no episodes can be used.
    """

    def find_out(files: Files) -> Header:
        length, height, width = _video_shape(files[0])
        num_actions = len(read_ids(files[0], config))
        if num_actions < length:
            return Header(error=f"{files[0]}: {length} frames, but {num_actions} actions")
        header = Header(num_frames=length, height=height, width=width)
        return check_header(header, config, files[0])

    def read_frames(files: Files, start: int, num_frames: int) -> torch.Tensor:
        return pixels_to_frames(torch.from_numpy(read_pixels(files[0])[start : start + num_frames]))

    listing, name = list_dmlab(root, split), f"dmlab:{root.absolute()}"
    return TecoSource(name, listing, split, config, find_out, read_frames, strict=strict)


def read_pixels(path: Path) -> UInt8[np.ndarray, "t h w 3"]:
    """Read all pictures of an episode.

    Raises:
        ValueError: missing, damaged or something else.
    """
    try:
        with np.load(path) as arrays:
            pixels = arrays["video"]
    except _DAMAGED as error:
        raise ValueError(f"{path}: is no .npz file with the key 'video' ({error})") from error
    _check_pixels(path, pixels.dtype, pixels.shape)
    return pixels


def _video_shape(path: Path) -> tuple[int, int, int]:
    """Return frames, rows and columns without reading the pictures."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("video.npy") as file:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            shape, _, dtype = (read if major == 1 else np.lib.format.read_array_header_2_0)(file)
    except _DAMAGED as error:
        raise ValueError(f"{path}: is no .npz file with the key 'video' ({error})") from error
    _check_pixels(path, dtype, shape)
    return shape[0], shape[1], shape[2]


def _check_pixels(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"{path}: video must be 8-bit [t, h, w, 3], got {dtype} {list(shape)}")
