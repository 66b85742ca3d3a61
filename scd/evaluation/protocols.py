"""Named protocols of evaluation: which clips, how many trajectories, and every choice in between.

A name ending in -published repeats the choices of the evaluation that the paper shares with FAR,
its quirks included; without it they are the sound ones. Source: paper, section 4; the code that is
published with FAR and with TECO.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import tyro

from scd.common.config import differences, to_json
from scd.data.source import Source, Split
from scd.evaluation.fvd import MIN_FRAMES, I3dKind, Sets
from scd.evaluation.lpips import SMALLEST
from scd.evaluation.predict import Window, choose_windows


@dataclass(frozen=True, kw_only=True)
class NamedProtocol:
    """What is rolled out and how it is measured. Every field is part of the protocol."""

    name: Annotated[str, tyro.conf.arg(name="protocol")]
    """Name of the protocol that all other settings begin from; scd protocols lists them."""
    split: Split = "val"
    """Part of the data that the clips are from."""
    size: int = 0
    """Rows and columns of the frames; 0: any."""
    context: int = 8
    """Frames of each clip that the model is given. 0: it generates from nothing, so that no frame
    has one truth: only sets of clips are compared."""
    horizon: int = 8
    """Frames that it predicts after them."""
    num_clips: int = 256
    """Clips."""
    clips: Literal["first", "spread"] = "first"
    """The beginnings of the first episodes that are long enough, in the order of the data; or
    clips that do not overlap, drawn by the seed from as many episodes as possible."""
    every: int = 1
    """Take every n-th episode only, from the first one on."""
    num_trajectories: int = 1
    """Futures of each clip that the model predicts."""
    trajectories: Literal["mean", "best"] = "mean"
    """A clip's number: the mean over its trajectories; or that of its best one, chosen for each
    metric by itself, which flatters models of many futures."""
    mse_trajectory: Literal["lowest", "highest"] = "lowest"
    """Which error is the best one. The published code takes the highest, by mistake."""
    seed: int = 0
    """Seed of the noise, the drawn clips, the shuffling and the intervals."""
    batch_size: int = 16
    """Clips side by side. Other sizes draw other noise."""
    shuffled_actions: bool = False
    """Roll every clip out once more, steered by another clip's actions."""
    lpips: bool = False
    """Measure LPIPS, by both of its input conventions."""
    fvd: bool = False
    """Measure FVD."""
    i3d_kind: I3dKind = "stylegan-v"
    """The network of FVD: numbers of different ones cannot be compared."""
    fvd_frames: Literal["predicted", "all"] = "predicted"
    """Frames of FVD's clips: those that were predicted; or the given ones before them too, which
    are the truth or nearly so and lower the number."""
    fvd_context: Literal["true", "reconstructed"] = "true"
    """The given frames before the predicted ones, where fvd_frames is all or frames go through
    H.264: as they are, or through the model's autoencoder."""
    fvd_sets: Sets = "each"
    """One distance for each trajectory and their mean; or one distance of all together."""
    h264: bool = False
    """Measure frames as they come back from an H.264 file (8 frames/s, rate factor 25, prediction
    beside truth): both sides lose detail."""

    def __post_init__(self) -> None:
        for field in ("horizon", "num_clips", "every", "num_trajectories", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 or more, got {getattr(self, field)}")
        for field in ("size", "context"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be 0 or more, got {getattr(self, field)}")
        given = not self.from_nothing
        for field, value, needed in (
            ("lpips", self.lpips, given),
            ("shuffled_actions", self.shuffled_actions, given),
            ("trajectories", self.trajectories != "mean", given),
            ("fvd_frames", self.fvd_frames != "predicted", given),
            ("fvd_context", self.fvd_context != "true", given),
            ("every", self.every != 1, self.clips == "first"),
            ("mse_trajectory", self.mse_trajectory != "lowest", self.trajectories == "best"),
            ("fvd_frames", self.fvd_frames != "predicted", self.fvd),
            ("fvd_sets", self.fvd_sets != "each", self.fvd and self.num_trajectories > 1),
            ("fvd_context", self.fvd_context != "true", self.h264 or self.fvd_frames == "all"),
        ):
            if value and not needed:
                raise ValueError(
                    f"{field}={getattr(self, field)} has no effect with the other settings of "
                    f"protocol {self.name}"
                )
        if self.fvd and self.num_clips < 2:
            raise ValueError(f"FVD needs two clips or more, got num_clips={self.num_clips}")
        if self.fvd and self.num_fvd_frames < MIN_FRAMES:
            raise ValueError(
                f"FVD needs clips of at least {MIN_FRAMES} frames, this protocol gives it "
                f"{self.num_fvd_frames}; leave it out by --no-fvd"
            )

    @property
    def from_nothing(self) -> bool:
        """Whether the model is given no frame."""
        return self.context == 0

    @property
    def num_frames(self) -> int:
        """Length of a clip."""
        return self.context + self.horizon

    @property
    def num_fvd_frames(self) -> int:
        """Length of the clips that FVD compares."""
        return self.num_frames if self.fvd_frames == "all" else self.horizon

    def check_size(self, height: int, width: int, data: str) -> None:
        """Refuse frames of another size than the protocol's, or too small (ValueError)."""
        if self.size and (height, width) != (self.size, self.size):
            raise ValueError(
                f"protocol {self.name} is of frames of {self.size}x{self.size}, {data} has "
                f"{height}x{width}; --size 0 measures them all the same, and says so"
            )
        if self.lpips and min(height, width) < SMALLEST:
            raise ValueError(
                f"LPIPS needs frames of at least {SMALLEST}x{SMALLEST}, {data} has "
                f"{height}x{width}; leave it out by --no-lpips"
            )


def _published(protocol: NamedProtocol) -> NamedProtocol:
    """Return a protocol with the choices that FAR's evaluation makes."""
    changes: dict[str, object] = {"name": f"{protocol.name}-published", "h264": True}
    if protocol.num_trajectories > 1:
        changes |= {"trajectories": "best", "mse_trajectory": "highest"}
    if protocol.fvd:
        changes |= {"fvd_frames": "all"}
    return replace(protocol, **changes, fvd_context="reconstructed")


TECO_PIXELS = NamedProtocol(
    name="teco-144-156",
    split="test",
    size=128,
    context=144,
    horizon=156,
    num_trajectories=4,
    lpips=True,
)
TECO_FVD = NamedProtocol(
    name="teco-36-264",
    split="test",
    size=128,
    context=36,
    horizon=264,
    num_trajectories=4,
    fvd=True,
)
UCF101 = NamedProtocol(
    name="ucf101-mcvd-4-12",
    split="test",
    size=64,
    context=4,
    horizon=12,
    num_trajectories=100,
    lpips=True,
    fvd=True,
)
UCF101_GENERATION = NamedProtocol(
    name="ucf101-latte-0-16",
    split="train",
    size=256,
    context=0,
    horizon=16,
    num_clips=2048,
    clips="spread",
    fvd=True,
)
DOOM_FVD = NamedProtocol(
    name="doom-36-264",
    split="test",
    size=128,
    context=36,
    horizon=264,
    num_clips=64,
    shuffled_actions=True,
)

PROTOCOLS: dict[str, NamedProtocol] = {
    protocol.name: protocol
    for protocol in (
        TECO_PIXELS,
        _published(TECO_PIXELS),
        replace(TECO_PIXELS, name="teco-144-156-teco", num_trajectories=1),
        TECO_FVD,
        _published(TECO_FVD),
        replace(
            TECO_FVD,
            name="teco-36-264-teco",
            num_trajectories=1,
            i3d_kind="tf-hub",
            fvd_frames="all",
        ),
        UCF101,
        _published(UCF101),
        UCF101_GENERATION,
        replace(TECO_PIXELS, name="dmlab-144-156", size=64, num_trajectories=1),
        replace(TECO_FVD, name="dmlab-36-264", size=64, num_trajectories=1),
        replace(DOOM_FVD, name="doom-144-156", context=144, horizon=156),
        DOOM_FVD,
        NamedProtocol(name="toy-8-8", num_clips=64, clips="spread", shuffled_actions=True),
    )
}
"""Complete protocols by name."""

ABOUT: dict[str, str] = {
    "teco-144-156": "TECO-Minecraft: frames against the truth, over the second half of a clip",
    "teco-144-156-published": "the same with the choices of FAR's evaluation, as in the paper",
    "teco-144-156-teco": "the same as TECO measures it: one trajectory",
    "teco-36-264": "TECO-Minecraft: FVD of long predictions",
    "teco-36-264-published": "the same with the choices of FAR's evaluation, as in the paper",
    "teco-36-264-teco": "the same as TECO measures it: I3D of TF-Hub, given frames included",
    "ucf101-mcvd-4-12": "UCF-101, prediction as in MCVD: every tenth clip of the test list",
    "ucf101-mcvd-4-12-published": "the same with the choices of FAR's evaluation, as in the paper",
    "ucf101-latte-0-16": "UCF-101, generation as in Latte: FVD of clips made from nothing",
    "dmlab-144-156": "DMLab in the TECO layout: frames against the truth",
    "dmlab-36-264": "DMLab in the TECO layout: FVD of long predictions",
    "doom-144-156": "DoomMaze in the shape of TECO-Minecraft, without weights from elsewhere",
    "doom-36-264": "DoomMaze, long predictions, without weights from elsewhere",
    "toy-8-8": "any data with clips of 16 frames, such as toy:32: seconds to minutes",
}
"""What each protocol is for."""


def protocol(name: str) -> NamedProtocol:
    """Return a protocol by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def changes_of(used: NamedProtocol) -> list[str]:
    """List the settings in which a protocol differs from the one of its name: "theirs, ours"."""
    return differences(to_json(protocol(used.name)), to_json(used))


def choose_clips(
    source: Source, protocol: NamedProtocol, data: str
) -> tuple[list[Window], list[int]]:
    """Return the clips of a protocol, and the episodes that were too short for one.

    Raises:
        ValueError: the data has fewer clips than the protocol needs.
    """
    length = protocol.num_frames
    if protocol.clips == "spread":
        return choose_windows(source, protocol.num_clips, length, protocol.seed), []
    windows: list[Window] = []
    short: list[int] = []
    for episode in range(0, source.num_episodes, protocol.every):
        if len(windows) == protocol.num_clips:
            break
        if source.num_frames(episode) < length:
            short.append(episode)
        else:
            windows.append((episode, 0))
    if len(windows) < protocol.num_clips:
        which = f"every {protocol.every}th of " if protocol.every > 1 else ""
        raise ValueError(
            f"protocol {protocol.name} needs {protocol.num_clips} clips of {length} frames, one "
            f"from each episode; {which}the {source.num_episodes} {protocol.split} episodes of "
            f"{data} give {len(windows)}, {len(short)} are too short"
            + (f"; --num-clips {len(windows)} measures those, and says so" if windows else "")
        )
    return windows, short


def listing() -> str:
    """Return all protocols with every setting, for people."""
    lines = []
    for name, one in PROTOCOLS.items():
        lines.append(f"{name}: {ABOUT[name]}")
        lines += [
            f"  {field.name:18}{getattr(one, field.name)}"
            for field in fields(one)
            if field.name != "name"
        ]
        lines.append("")
    return "\n".join(lines).rstrip()
