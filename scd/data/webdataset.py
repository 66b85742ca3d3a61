"""Tars of videos as webdataset has them, read in place: `wds:PATH`, a tar, a folder, a pattern.

    000017.mp4    the frames of an episode
    000017.json   {"actions": [...], "prompt": "...", "fps": 20, "label": 3}, all of it optional
    000017.txt    the prompt, where the json says none

Members whose names agree up to the first dot are one episode. Where each lies is found out once;
then FFmpeg reads its video from the middle of the tar, so nothing is unpacked, and any episode can
be read at any time. The package webdataset reads shards from beginning to end, which does not help
here: what the members of a tar are and where, Python's tarfile says.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from scd.data.shards import Found, Shard, ShardConfig, ShardSource, look_at_actions
from scd.data.video import PartOfFile, probe_video, read_frames

VIDEOS = ("mp4", "mkv", "webm", "mov", "avi")
"""Endings of members that are frames."""

PROMPTS = ("prompt", "caption", "text")
"""Names by which the json says the prompt, the first that is there."""

RECALLED = 1024
"""Episodes whose actions are kept in memory."""

Members = Mapping[str, tuple[int, int]]
"""Where the members of an episode begin, and how many bytes they have, by their endings."""


class WebDatasetSource(ShardSource):
    """Episodes of one split of tars."""

    kind = "wds"
    origin = "tars of KEY.mp4 and KEY.json, as webdataset's ShardWriter makes; docs/datasets.md"
    settings = ShardConfig
    suffixes = (".tar",)

    @classmethod
    def look(cls, file: Path, config: ShardConfig) -> Shard:
        found = []
        for name, members in _episodes(file).items():
            try:
                found.append(asdict(_look(file, name, members, config)))
            except (ValueError, OSError) as error:
                found.append(asdict(Found(name=name, error=str(error))))
        if not found:
            raise ValueError(f"{file}: has no members that end in .{', .'.join(VIDEOS)}")
        return Shard(episodes=found)

    def _pixels(
        self, file: Path, one: Found, numbers: Int[np.ndarray, " t"]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        video = PartOfFile(str(file), one.place[0], one.place[1], one.name)
        return read_frames(video, numbers.tolist(), self.config.shape)

    def _rows(self, file: Path, one: Found, start: int, stop: int) -> np.ndarray:
        name = one.name.rpartition(".")[0]
        return _actions(file, name, one.place[2], one.place[3])[start:stop]


def _episodes(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Find the members of each episode of a tar, in their order.

    Raises:
        ValueError: no tar, a compressed one, or cut off.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            end = file.stat().st_size
            for member in tar:
                path = PurePosixPath(member.name)
                key, dot, ending = path.name.partition(".")
                if not member.isfile() or not dot or not key:
                    continue
                if member.offset_data + member.size > end:
                    raise ValueError(f"{file}, {member.name}: is cut off before its end")
                place = (member.offset_data, member.size)
                found.setdefault(str(path.with_name(key)), {})[ending.lower()] = place
    except tarfile.TarError as error:
        hint = "; a compressed one is to be unpacked with gunzip" if file.suffix != ".tar" else ""
        raise ValueError(f"{file}: cannot be read as a tar ({error}){hint}") from error
    return {key: one for key, one in found.items() if any(end in one for end in VIDEOS)}


def _look(file: Path, name: str, members: Members, config: ShardConfig) -> Found:
    ending = next(end for end in VIDEOS if end in members)
    begin, size = members[ending]
    video = PartOfFile(str(file), begin, size, f"{name}.{ending}")
    info = probe_video(video)
    place, said, actions = [begin, size, 0, 0], {}, {}
    if "json" in members:
        place[2:] = members["json"]
        said = _parsed(file, name, *members["json"])
    if said.get("actions") is not None:
        values = _actions(file, name, place[2], place[3])
        where = f"{file}, {name}.json"
        actions = look_at_actions(values, info.num_frames, config.action_rows, where)
    prompt = next((said[key] for key in PROMPTS if isinstance(said.get(key), str)), None)
    if prompt is None and "txt" in members:
        prompt = _bytes(file, *members["txt"]).decode("utf-8", errors="replace").strip()
    fps, label = said.get("fps", info.fps), said.get("label")
    if not isinstance(fps, (int, float)) or not 0 <= fps < float("inf"):
        raise ValueError(f"{file}, {name}.json: fps must be a number of 0 or more, got {fps!r}")
    if label is not None and (not isinstance(label, int) or label < 0):
        raise ValueError(f"{file}, {name}.json: label must be a number from 0 on, got {label!r}")
    return Found(
        name=f"{name}.{ending}",
        num_frames=info.num_frames,
        height=info.height,
        width=info.width,
        fps=float(fps),
        place=place,
        prompt=prompt,
        label=label,
        **actions,
    )


@lru_cache(RECALLED)
def _actions(file: Path, name: str, begin: int, size: int) -> np.ndarray:
    """Read the actions of an episode."""
    values = _parsed(file, name, begin, size).get("actions")
    try:
        found = np.asarray(values)
    except ValueError:
        found = np.asarray(None)
    if found.dtype.kind not in "biuf":
        raise ValueError(
            f"{file}, {name}.json: actions must be a list of numbers, or of lists of equally many"
        )
    return found


def _parsed(file: Path, name: str, begin: int, size: int) -> dict[str, Any]:
    try:
        # Python's json knows NaN, which no action can be.
        said = json.loads(_bytes(file, begin, size))
    except ValueError as error:
        raise ValueError(f"{file}, {name}.json: is no JSON ({error})") from error
    if not isinstance(said, dict):
        raise ValueError(f"{file}, {name}.json: needed an object with actions, got {said!r:.40}")
    return said


def _bytes(file: Path, begin: int, size: int) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(begin)
        return opened.read(size)
