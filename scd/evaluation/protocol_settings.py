"""Settings of `scd evaluate --protocol`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from scd.evaluation.protocols import NamedProtocol
from scd.streaming.rollout import Guidance


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """One evaluation of one checkpoint by a named protocol."""

    run: str = ""
    """Run folder, one of its step folders, or a world folder; needed."""
    data: str = ""
    """"toy:32", "toy:64", a folder of episodes, or "minecraft:PATH", "ucf101:PATH", "dmlab:PATH";
    needed."""
    protocol: Annotated[NamedProtocol, tyro.conf.arg(name="")]
    """The protocol, and what is changed of it; the result lists the changes."""
    out: str = "evaluation.json"
    """The result; a plot (.png) and a page (.html) with the same name go beside it."""
    num_steps: int | None = None
    """Denoising steps per frame; None: as the checkpoint says."""
    guidance: Guidance = field(default_factory=Guidance)
    """How predictions are pushed away from an unconditional branch."""
    judge: str = ""
    """Folder of a judge of the same data (scd train-judge): measures control and frechet_own too.
    Empty: neither."""
    alexnet: str = ""
    """File of torchvision's AlexNet, for LPIPS."""
    alexnet_sha256: str = ""
    """SHA-256 by which you identify another file for it, or how it begins."""
    lpips_heads: str = ""
    """File of LPIPS's linear heads; empty: the one that comes with torchmetrics."""
    lpips_heads_sha256: str = ""
    """SHA-256 by which you identify another file for it, or how it begins."""
    i3d: str = ""
    """TorchScript file of I3D, for FVD."""
    i3d_sha256: str = ""
    """SHA-256 by which you identify it, or how it begins; needed, since this project does not know
    that of either network for certain."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or those the optimiser moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; with several processes each takes a GPU of its own."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix != ".json":
            raise ValueError(f"out must be a .json file, got {self.out}")
