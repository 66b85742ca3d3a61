"""Settings of `scd data check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from scd.common.config import at_least


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Look at a collection of clips: exit status 2 if something that is needed is missing."""

    path: Annotated[str, tyro.conf.Positional]
    """The folder, or KIND:PATH as --data takes it, such as lerobot:PATH --camera NAME. Settings
    may follow: PATH?protocol=latte, PATH?fps=16."""
    layout: Annotated[str, tyro.conf.arg(name="as")] = "folder"
    """What it should be: `folder`, of episodes or of their latents, or a kind of published
    collection, as in KIND:PATH of --data: `minecraft`, `ucf101`, `dmlab`."""
    num_frames: int | None = None
    """Frames of the clips that are to be taken from it: names the episodes that are too short, and
    asks for one that is long enough in each split. None: as long as they are."""
    preset: str = ""
    """Preset of scd train, whose clips are to be taken from it: its num_frames."""
    decode: bool = False
    """Decode every frame, and name the episodes that cannot be read to their end. Without it only
    headers, first frames of videos and the sample are looked at."""
    clips: int = 64
    """Clips of the sample, of up to 48 frames, in which actions are counted and it is measured at
    which lag pictures show them. 0: none."""
    json: str = ""
    """File to write all that was found to, in JSON. Empty: none."""
    sheet: str = ""
    """Picture to draw, of frames of the sample with their actions under them. Empty: beside the
    JSON file, where there is one."""

    def __post_init__(self) -> None:
        at_least(1, num_frames=self.num_frames)
        at_least(0, clips=self.clips)
        if self.preset and self.num_frames is not None:
            raise ValueError("preset and num_frames both say how long clips are: give one")
