"""Settings of `scd export`, by format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scd.convert.settings import ExportConfig

WeightType = Literal["auto", "fp16", "fp32"]
"""How weights are stored; all arithmetic is in float32."""


@dataclass(frozen=True, kw_only=True)
class OnnxConfig:
    """Which world becomes ONNX files."""

    run: str = ""
    """World or run folder, or the name of a world."""
    out: str = ""
    """Folder to write; it must not exist, or be empty."""
    weights: WeightType = "auto"
    """How weights are stored. auto: each in bfloat16 if that loses nothing, as in worlds that are
    passed on, else in float32; fp16 halves those too, and rounds them."""

    def __post_init__(self) -> None:
        if not self.run or not self.out:
            raise ValueError("scd export onnx needs a run and --out")


@dataclass(frozen=True, kw_only=True)
class WebConfig:
    """Which world becomes a static site."""

    run: str = ""
    """World or run folder, or the name of a world."""
    out: str = ""
    """Folder to write: a new or empty one, or a site that was written before, which is replaced."""
    weights: WeightType = "auto"
    """How weights are stored: as of scd export onnx."""
    ort: str = ""
    """Folder of the npm package onnxruntime-web, or its dist/; empty: npm fetches the package."""
    serve: int | None = None
    """Port at which the site is then served on this machine, until Ctrl+C; 0: any free one."""

    def __post_init__(self) -> None:
        if not self.run or not self.out:
            raise ValueError("scd export web needs a run and --out")
        if self.serve is not None and not 0 <= self.serve < 2**16:
            raise ValueError(f"serve must be a port, 0 .. 65535, got {self.serve}")


FORMATS: dict[str, type] = {"diffusers": ExportConfig, "onnx": OnnxConfig, "web": WebConfig}
"""Settings of each format by name."""
