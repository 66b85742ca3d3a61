"""What a folder of episodes says about itself, and the files of one episode.

    dataset.json      the card: height, width, fps, conditions, action_names
    manifest.jsonl    one line per episode: video, actions, num_frames, split, label, rewards
    videos/, actions/ the files that the manifest names

docs/your-clips.md tells how to make such a folder.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8

from scd.common.config import added, at_least, from_json, to_json
from scd.common.files import file_aside, parse_json, read_json, refuse_pipe, text_lines, write_file
from scd.data.source import DataCard
from scd.data.spaces import Split
from scd.data.video import write_video

CARD_FILE = "dataset.json"
MANIFEST_FILE = "manifest.jsonl"

RECORDING = "recording"
"""Key of the card's file under which a recording keeps its own settings; readers pass it over."""


DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,  # By a damaged flag the archive claims to be encrypted, or compressed otherwise.
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading an archive raises that is cut off, damaged, or something else."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the manifest."""

    video: str
    """Video file, relative to the folder."""
    num_frames: int
    """Frames of the episode."""
    split: Split
    """Part of the collection that the episode belongs to."""
    actions: str | None = added(None)
    """Actions file (.npz with the key `actions`), relative to the folder."""
    label: int | None = added(None)
    """Class of the whole episode."""
    prompt: str | None = added(None)
    """What the episode shows, in words."""
    rewards: tuple[float, ...] | None = added(None)
    """Reward i came with frame i."""
    terminated: bool | None = added(None)
    """Whether the world itself ended after the last frame."""
    truncated: bool | None = added(None)
    """Whether a limit of time of the world ended it there; if neither, the recording stopped."""

    def __post_init__(self) -> None:
        at_least(1, num_frames=self.num_frames)
        if self.rewards is not None and len(self.rewards) != self.num_frames:
            raise ValueError(
                f"{self.num_frames} frames need as many rewards, got {len(self.rewards)}"
            )


def read_card(path: Path) -> DataCard:
    """Read the card of a folder (ValueError: not JSON, or a missing, unknown or wrong field)."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such data folder (or 'toy:32', 'toy:64')")
    values = read_json(path / CARD_FILE)
    if isinstance(values, dict):
        values.pop(RECORDING, None)
    return from_json(DataCard, values, str(path / CARD_FILE))


def write_card(path: Path, card: DataCard, recording: dict[str, Any] | None = None) -> None:
    """Write the card of a folder, and beside it the settings of the recording, if any."""
    values = to_json(card) | ({} if recording is None else {RECORDING: recording})
    write_file(path / CARD_FILE, json.dumps(values, indent=2))


def read_manifest(path: Path) -> list[Entry]:
    """Read the episodes of a folder (ValueError: a line with a missing, unknown or wrong field)."""
    return [
        from_json(Entry, parse_json(line, where), where)
        for number, line in enumerate(text_lines(path / MANIFEST_FILE), start=1)
        if line.strip() and (where := f"{path / MANIFEST_FILE} line {number}")
    ]


def write_manifest(path: Path, entries: list[Entry]) -> None:
    with file_aside(path / MANIFEST_FILE) as aside:
        aside.write_text("".join(map(_line, entries)), encoding="utf-8")


def append_to_manifest(path: Path, entry: Entry) -> None:
    with open(path / MANIFEST_FILE, "a", encoding="utf-8") as file:
        file.write(_line(entry))


def write_episode(
    path: Path,
    name: str,
    pixels: UInt8[np.ndarray, "t h w 3"],
    actions: Int[np.ndarray, " t"] | Float[np.ndarray, "t a"] | None,
    fps: float,
    split: Split,
    label: int | None = None,
) -> Entry:
    """Write one episode's files, without losing a bit, and return its line of the manifest.

    Files are called `name`, without an ending; action i led from picture i-1 to picture i.
    """
    if actions is not None and len(actions) != len(pixels):
        raise ValueError(f"{name}: {len(pixels)} frames need as many actions, got {len(actions)}")
    for folder in ("videos", "actions"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    video, actions_file = f"videos/{name}.mp4", f"actions/{name}.npz"
    write_video(path / video, pixels, fps, lossless=True)
    if actions is not None:
        with file_aside(path / actions_file) as aside, open(aside, "wb") as file:
            np.savez(file, actions=actions)
    return Entry(
        video=video,
        num_frames=len(pixels),
        split=split,
        actions=None if actions is None else actions_file,
        label=label,
    )


def read_actions(path: Path) -> np.ndarray:
    """Read an actions file: ids as int64 [t], or vectors as float32 [t a]."""
    actions = read_array(path, "actions")
    if np.issubdtype(actions.dtype, np.integer):
        return actions.astype(np.int64)
    if np.issubdtype(actions.dtype, np.floating):
        # What is too large for 32 bits becomes infinite, and is refused with what is.
        with np.errstate(over="ignore"):
            return actions.astype(np.float32)
    raise ValueError(f"{path}: actions must be integers or floats, got {actions.dtype}")


def read_array(path: Path, key: str) -> np.ndarray:
    """Read one array of an .npz file; ValueError: missing, damaged, or something else."""
    refuse_pipe(path)
    try:
        with np.load(path) as arrays:
            found = arrays[key]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such {key} file") from error
    except DAMAGED as error:
        raise ValueError(f"{path}: is no .npz file with the key {key!r} ({error})") from error
    # A member whose first bytes are damaged comes as bytes, without a word.
    if not isinstance(found, np.ndarray) or not found.ndim:
        got = f"a single {found.dtype}" if isinstance(found, np.ndarray) else "no array"
        raise ValueError(f"{path}: {key!r} must be an array with a row for each frame, got {got}")
    return found


def choose_splits(num_episodes: int, val_fraction: float, test_fraction: float) -> list[Split]:
    """Deal episodes out to the splits, each to the one that lags furthest behind its share.

    The second episode goes to `val` and the third to `test`, where these have shares at all, so
    that small collections have them too. The split of an episode does not depend on how many
    follow.
    """
    shares: dict[Split, float] = {
        "train": 1 - val_fraction - test_fraction,
        "val": val_fraction,
        "test": test_fraction,
    }
    if min(val_fraction, test_fraction) < 0 or shares["train"] <= 0:
        raise ValueError(
            "val_fraction and test_fraction must be 0 or more and leave episodes for training, "
            f"got {val_fraction} and {test_fraction}"
        )
    counts: dict[Split, int] = dict.fromkeys(get_args(Split), 0)
    first: list[Split] = [name for name in get_args(Split) if shares[name] > 0]
    splits: list[Split] = []
    for episode in range(num_episodes):
        lag = {name: shares[name] * (episode + 1) - counts[name] for name in shares}
        chosen = first[episode] if episode < len(first) else max(shares, key=lag.__getitem__)
        splits.append(chosen)
        counts[chosen] += 1
    return splits


def _line(entry: Entry) -> str:
    values = {name: value for name, value in dataclasses.asdict(entry).items() if value is not None}
    return json.dumps(values) + "\n"
