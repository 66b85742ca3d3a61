"""Separable Causal Diffusion: video frames from one causal pass and a light diffusion decoder.

Paper: "Causality in Video Diffusers is Separable from Denoising", arXiv 2602.10095.

Dimension names in shape annotations, the same in every file:

    b  batch: clips or streams side by side
    r  draws of (time, noise) for the same frames
    t  frames: time steps of a video or latent
    f  frames of any clips or streams, side by side
    m  frames that are denoised: the last m of t
    c  channels of a frame
    h  rows of a frame, w columns of a frame, in pixels or latent cells
    n  tokens per frame
    s  tokens of a sequence that attention sees
    d  hidden size
    k  attention heads
    e  size of one head
    a  entries of a continuous action
    l  tokens of a text
"""

from importlib import import_module
from typing import TYPE_CHECKING

from scd.streaming.gym_names import register_when_loaded

if TYPE_CHECKING:
    from scd import probe as probe
    from scd.data.clip import frames_to_pixels, pixels_to_frames
    from scd.data.writer import ClipWriter
    from scd.evaluation.media import write_video
    from scd.models.checkpoint import World, load
    from scd.streaming.environment import WorldEnv, WorldVectorEnv
    from scd.streaming.rollout import Rollout

__version__ = "0.1.0"

__all__ = [
    "ClipWriter",
    "Rollout",
    "World",
    "WorldEnv",
    "WorldVectorEnv",
    "frames_to_pixels",
    "load",
    "pixels_to_frames",
    "write_video",
]

_MODULES = {
    "ClipWriter": "scd.data.writer",
    "Rollout": "scd.streaming.rollout",
    "World": "scd.models.checkpoint",
    "WorldEnv": "scd.streaming.environment",
    "WorldVectorEnv": "scd.streaming.environment",
    "frames_to_pixels": "scd.data.clip",
    "load": "scd.models.checkpoint",
    "pixels_to_frames": "scd.data.clip",
    "write_video": "scd.evaluation.media",
}


def __getattr__(name: str) -> object:
    """Give the names that users take from the root; nothing is loaded before they ask."""
    if name == "probe":
        # A module: to probe is more than one name.
        return import_module("scd.probe")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(
        f"module 'scd' has no attribute {name!r}; it has {', '.join(__all__)}, and folders of "
        "modules such as scd.streaming"
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_when_loaded()
