"""UCF-101: class folders of .avi videos and the lists of its three splits, by two protocols.

    UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
    ucfTrainTestlist/classInd.txt            1 ApplyEyeMakeup
    ucfTrainTestlist/trainlist03.txt         ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 1
    ucfTrainTestlist/testlist03.txt          ApplyEyeMakeup/v_ApplyEyeMakeup_g21_c01.avi

`mcvd`: prediction at 64 x 64; learn from trainlist03, test on every tenth video of testlist03.
`latte`: generation at 256 x 256, every third frame; learn from all videos, and compare with them.

Source: the settings of MCVD, Latte and FAR; paper (optimisation, UCF-101).
"""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from scd.common.config import at_least
from scd.common.files import text_lines
from scd.data.clip import Clip, pixels_to_frames
from scd.data.published import Files, Header, PublishedSource
from scd.data.source import DataCard, Findings
from scd.data.spaces import ConditionSpec, Split
from scd.data.video import probe_video, read_frames

NUM_CLASSES = 101
"""Classes of the whole collection."""

NUM_LISTED = {"trainlist03": 9_624, "testlist03": 3_696}
"""Videos that the published lists name. Source: paper (evaluation)."""

FPS = 25.0
"""Frames per second of most videos; frames are taken one by one as they are stored."""

EVERY = 10
"""MCVD tests on every tenth video of the test list."""

MEANWHILE = 5
# While a model trains it is watched on videos that MCVD does not test on: those half way between.

EVERY_WATCHED = 100
# Latte holds nothing back: to watch the training every hundredth video does.

VIDEO_FOLDERS = ("UCF-101", "UCF101", "videos", ".")
LIST_FOLDERS = ("ucfTrainTestlist", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist", ".")
# Where the two archives put things, and where people do.


@dataclass(frozen=True, kw_only=True)
class UCF101Config:
    """How the collection is read."""

    protocol: Literal["mcvd", "latte"] = "mcvd"
    """Which videos belong to which split."""
    size: int = 0
    """Height and width of a frame, in pixels; 0: 64 for mcvd, 256 for latte."""
    interval: int = 0
    """Every how manieth frame is taken; 0: 1 for mcvd, 3 for latte."""
    list: int = 3
    """Which of the three pairs of lists."""
    labels: bool = False
    """Steer by the class."""
    augment: bool = True
    """Cut clips to learn from out of a random place and mirror half of them. The same clip is
    always cut in the same way: place and side follow from its episode and first frame."""

    def __post_init__(self) -> None:
        if self.list not in (1, 2, 3):
            raise ValueError(f"list must be 1, 2 or 3, got {self.list}")
        at_least(0, size=self.size, interval=self.interval)

    @property
    def filled(self) -> UCF101Config:
        """The same with the protocol's own size and interval where none was chosen."""
        is_mcvd = self.protocol == "mcvd"
        return replace(
            self,
            size=self.size or (64 if is_mcvd else 256),
            interval=self.interval or (1 if is_mcvd else 3),
        )


@dataclass(frozen=True, kw_only=True)
class UCF101Files:
    """Where things are, and what the lists say."""

    videos: Path
    classes: dict[str, int]
    """Class by name, from 0."""
    train: tuple[str, ...]
    """Videos of the training list, relative to `videos`."""
    test: tuple[str, ...]

    def missing_classes(self) -> list[str]:
        """Say which class folders are not there, and which folder may be meant."""
        found = sorted(entry.name for entry in self.videos.iterdir() if entry.is_dir())
        strangers = [name for name in found if name not in self.classes]
        lines = []
        for name in self.classes:
            if name not in found:
                close = difflib.get_close_matches(name.lower(), [s.lower() for s in strangers], 1)
                meant = [stranger for stranger in strangers if stranger.lower() in close]
                hint = f": is it {meant[0]}? Then rename that folder" if meant else ""
                lines.append(f"{self.videos / name}: no such class folder{hint}")
        return lines


def list_paths(root: Path, number: int) -> list[Path]:
    """Return the three list files where they are, or where they should be."""
    names = ["classInd.txt", f"trainlist{number:02d}.txt", f"testlist{number:02d}.txt"]
    folder = next(
        (
            root / name
            for name in LIST_FOLDERS
            if any((root / name / one).is_file() for one in names)
        ),
        root / LIST_FOLDERS[0],
    )
    return [folder / name for name in names]


def video_folder(root: Path) -> Path:
    """Return the folder of the class folders: the first that has a folder with videos."""
    for name in VIDEO_FOLDERS:
        folder = root / name
        if folder.is_dir() and next(folder.glob("*/*.avi"), None) is not None:
            return folder
    return root / VIDEO_FOLDERS[0]


def find_ucf101(root: Path, number: int = 3) -> UCF101Files:
    """Read the lists.

    Raises:
        FileNotFoundError: no such folder, no videos, or a list is missing: says which.
        ValueError: a line that is not as it should be.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {UCF101Source.origin}")
    paths = list_paths(root, number)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"missing list files: {', '.join(missing)}; {UCF101Source.origin}")
    videos = video_folder(root)
    if not videos.is_dir():
        raise FileNotFoundError(
            f"{videos}: no class folders with .avi videos; {UCF101Source.origin}"
        )
    classes: dict[str, int] = {}
    for place, words in _lines(paths[0]):
        if len(words) != 2 or not words[0].isdigit():
            raise ValueError(f"{place}: needed a number and a class, got {' '.join(words)!r}")
        classes[words[1]] = int(words[0]) - 1
    found = []
    for path in paths[1:]:
        names = []
        for place, words in _lines(path):
            name = words[0]
            if name.count("/") != 1 or name.split("/")[0] not in classes:
                raise ValueError(
                    f"{place}: needed Class/video.avi of a class that {paths[0].name} "
                    f"names, got {name!r}"
                )
            names.append(name)
        found.append(tuple(names))
    return UCF101Files(videos=videos, classes=classes, train=found[0], test=found[1])


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    return [
        (f"{path} line {number}", words)
        for number, line in enumerate(text_lines(path), start=1)
        if (words := line.split())
    ]


def videos_of(files: UCF101Files, config: UCF101Config, split: Split) -> tuple[str, ...]:
    """Return the videos of a split, in the order of the lists.

    Latte's `val` and `test` are parts of what it learns from: the protocol holds nothing back.
    """
    if config.protocol == "mcvd":
        if split == "train":
            return files.train
        return files.test[::EVERY] if split == "test" else files.test[MEANWHILE::EVERY]
    every = files.train + files.test
    return every[::EVERY_WATCHED] if split == "val" else every


class UCF101Source(PublishedSource):
    """Videos of one split.

    Raises:
        FileNotFoundError: no such folder, or a list is missing.
        ValueError: a class is missing or misspelt, a damaged list, no videos, or one by `strict`.
    """

    kind = "ucf101"
    origin = (
        "videos: https://www.crcv.ucf.edu/data/UCF101/UCF101.rar; lists: "
        "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip"
    )
    settings = UCF101Config
    header_depends_on_settings = False

    def __init__(
        self,
        root: Path,
        split: Split,
        config: UCF101Config | None = None,
        strict: bool = False,
        whole: bool = False,
    ) -> None:
        config = (config or UCF101Config()).filled
        self.files = find_ucf101(root, config.list)
        if missing := self.files.missing_classes():
            raise ValueError("; ".join(missing[:3]) + f" ({len(missing)} in all)")
        super().__init__(root, split, config, strict, whole)

    @classmethod
    def inspect(cls, data: str) -> Findings:
        findings = Findings()
        root, config = cls.parse(data)
        missing = [one for one in list_paths(root, config.list) if not one.is_file()]
        findings.missing += [f"{one}: no such list" for one in missing]
        videos = video_folder(root)
        if not videos.is_dir():
            findings.missing.append(f"{videos}: no class folders with .avi videos")
        if findings.missing:
            return findings
        try:
            files = find_ucf101(root, config.list)
        except (ValueError, OSError) as error:
            findings.missing.append(str(error))
            return findings
        findings.there.append(f"lists: {len(files.classes)} classes in {videos}")
        if len(files.classes) != NUM_CLASSES:
            findings.notes.append(
                f"classInd.txt names {len(files.classes)} classes of {NUM_CLASSES}"
            )
        findings.missing += files.missing_classes()
        for stem, listed in (("trainlist", files.train), ("testlist", files.test)):
            name = f"{stem}{config.list:02d}"
            expected = NUM_LISTED.get(name, len(listed))
            if len(listed) != expected:
                findings.notes.append(f"{name}.txt names {len(listed):,} videos, not {expected:,}")
            gone = [one for one in listed if not (videos / one).is_file()]
            if gone:
                findings.missing.append(
                    f"{len(gone)} of {len(listed)} videos of {name}.txt, the first is "
                    f"{videos / gone[0]}"
                )
        return findings

    def oddities(self) -> list[str]:
        rates = Counter(round(header.fps, 2) for header in self.headers)
        sizes = Counter((header.height, header.width) for header in self.headers)
        return [
            f"videos of several {what} ({_listed(counts)}); {then}"
            for what, counts, then in (
                ("frame rates", rates, "frames are taken as they are stored"),
                ("sizes", sizes, "all are reduced and cut"),
            )
            if len(counts) > 1
        ]

    def _find(self, split: Split) -> list[Files]:
        return [(self.files.videos / name,) for name in videos_of(self.files, self.config, split)]

    def _look(self, files: Files) -> Header:
        info = probe_video(files[0])
        if not 0 < info.fps < float("inf"):
            raise ValueError(f"{files[0]}: says no frame rate")
        return Header(**vars(info))

    def _card(self) -> DataCard:
        return DataCard(
            height=self.config.size,
            width=self.config.size,
            fps=FPS / self.config.interval,
            conditions=ConditionSpec(
                num_labels=len(self.files.classes) if self.config.labels else 0
            ),
            action_names=(),
        )

    def _length(self, header: Header) -> int:
        return 1 + (header.num_frames - 1) // self.config.interval

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        (path,), interval = self.episodes[episode], self.config.interval
        numbers = range(start * interval, (start + num_frames) * interval, interval)
        pixels = read_frames(path, numbers)
        place, mirrored = 0.5, False
        if self.split == "train" and self.config.augment and not self.whole:
            draws = np.random.default_rng((episode, start)).random(2)
            place, mirrored = float(draws[0]), bool(draws[1] < 0.5)
        frames = square(pixels_to_frames(torch.from_numpy(pixels)), self.config.size, place)
        return Clip(
            frames=frames.flip(-1) if mirrored else frames,
            label=self.files.classes[path.parent.name] if self.config.labels else None,
            fps=self.card.fps,
        )


def _listed(counts: Counter) -> str:
    return ", ".join(f"{value}: {number}" for value, number in counts.most_common(5))


def square(
    frames: Float[torch.Tensor, "t 3 h w"], size: int, place: float = 0.5
) -> Float[torch.Tensor, "t 3 {size} {size}"]:
    """Reduce frames so that the shorter side fits, by antialiased bilinear weights, and cut.

    Along the longer side `place` says where: 0 its beginning, 0.5 the middle, 1 its end.
    """
    height, width = frames.shape[-2:]
    scale = size / min(height, width)
    reduced = (max(size, int(height * scale)), max(size, int(width * scale)))
    if reduced != (height, width):
        frames = F.interpolate(frames, size=reduced, mode="bilinear", antialias=True)
    top, left = (round((side - size) * place) for side in reduced)
    return frames[..., top : top + size, left : left + size].clamp(-1, 1)
