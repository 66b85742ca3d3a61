"""FVD: Frechet distance between the I3D features of predicted and of true clips.

The network is I3D with the weights of TF-Hub (i3d.py), or a TorchScript file that the caller has;
it gives 400 numbers per clip. StyleGAN-V's file is a copy of the same network that scales frames
itself. What scaling changes can be told by the kind: numbers of different kinds are not to be
compared. Source: Unterthiner et al., "Towards Accurate Generative Models of Video"; Skorokhodov et
al., "StyleGAN-V"; Yan et al., "Temporally Consistent Transformers for Video Generation" (TECO).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from scd.common.published_weights import I3D_STYLEGAN_V, I3D_TF_HUB, KnownFile
from scd.data.source import DataCard
from scd.evaluation.frechet import frechet_of_sets
from scd.evaluation.i3d import NUM_FEATURES, SIDE, cached_weights, load_arrays, network_of
from scd.evaluation.image import Estimate, centred_estimate
from scd.evaluation.metrics import Found, Metric, Numbers, Seen
from scd.evaluation.protocols import MIN_FRAMES, I3dKind, Protocol, Sets

KNOWN: dict[I3dKind, KnownFile] = {
    "stylegan-v": I3D_STYLEGAN_V,
    "tf-hub": I3D_TF_HUB,
    "original": I3D_TF_HUB,
}
"""The TorchScript file of each kind."""

NUM_RESAMPLES = 100
"""Resamplings of the clips from which the interval is read; each takes a decomposition."""


class I3d:
    """A network that turns clips into features. Made by `load_i3d` or `cached_i3d`."""

    def __init__(
        self,
        module: Callable[..., Any],
        kind: I3dKind,
        device: torch.device,
        scales: bool = False,
    ) -> None:
        """Keep a network.

        Args:
            module: gives [1, 400] or [1, 400, places in time] of one clip.
            kind: how frames are scaled.
            device: of the module.
            scales: the module scales frames itself, as StyleGAN-V's file does.
        """
        self.module, self.device, self.scales = module, device, scales
        self.kind: I3dKind = kind

    @torch.no_grad()
    def features(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b 400"]:
        """Return the features of clips, pixels in [-1, 1], one clip after another.

        Raises:
            ValueError: too few frames, pixels that are not finite, or no such network.
        """
        if frames.shape[1] < MIN_FRAMES:
            raise ValueError(
                f"FVD needs clips of at least {MIN_FRAMES} frames, got {frames.shape[1]}"
            )
        finite = frames.isfinite().flatten(2).all(2)
        if not finite.all():
            clip, frame = (~finite).nonzero()[0].tolist()
            raise ValueError(f"FVD needs finite pixels: frame {frame} of clip {clip} has others")
        found = [self._features_of(clip[None].to(self.device).float()) for clip in frames]
        return torch.cat(found).float().cpu()

    def _features_of(self, clip: Tensor) -> Tensor:
        try:
            if self.scales:
                clip = rearrange(clip, "b t c h w -> b c t h w")
                made = self.module(clip, rescale=False, resize=True, return_features=True)
            else:
                made = self.module(at_side(clip, self.kind))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"this file is not an I3D of kind {self.kind}: {reason}") from error
        if isinstance(made, Tensor) and made.ndim == 3:
            made = made.mean(2)
        if not isinstance(made, Tensor) or tuple(made.shape) != (1, NUM_FEATURES):
            shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"an I3D of kind {self.kind} gives [1, {NUM_FEATURES}] for one clip, got {shape}"
            )
        return made


def at_side(
    clip: Float[Tensor, "b t 3 h w"], kind: I3dKind = "tf-hub"
) -> Float[Tensor, "b 3 t 224 224"]:
    """Scale frames to 224 x 224, bilinearly and without a filter.

    Pixels are squares: place p of n new ones is at (p + 1/2) * old / n - 1/2, as in TECO's code
    (TensorFlow 2) and, by PyTorch's function, in StyleGAN-V's. In the original code (TensorFlow 1)
    they are corners: p * old / n, which moves the picture by up to half a pixel.
    """
    frames = clip.flatten(0, 1)
    if kind == "original":
        rows, columns = (from_corners(size).to(frames) for size in frames.shape[-2:])
        scaled = rows @ frames @ columns.mT
    else:
        scaled = F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return rearrange(scaled, "(b t) c h w -> b c t h w", b=len(clip))


def from_corners(size: int) -> Float[Tensor, "224 size"]:
    """Return the weights of old places in new ones, of TensorFlow 1's `resize_bilinear`."""
    place = torch.arange(SIDE) * (size / SIDE)
    below = place.floor().long().clamp(max=size - 1)
    share = (place - below).clamp(0, 1)[:, None]
    whole = torch.eye(size)
    return whole[below] * (1 - share) + whole[(below + 1).clamp(max=size - 1)] * share


def load_i3d(path: str, kind: I3dKind, device: torch.device) -> I3d:
    """Read a TorchScript file (ValueError: it is none)."""
    try:
        module = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not a TorchScript file: {reason}") from error
    return I3d(module, kind, device, scales=kind == "stylegan-v")


def cached_i3d(kind: I3dKind, device: torch.device) -> I3d:
    """Make the network of the weights that `scd weights i3d` put into the cache.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are damaged.
    """
    return I3d(network_of(load_arrays(cached_weights())).to(device), kind, device)


def fvd(
    predicted: Float[Tensor, "b trajectories d"],
    true: Float[Tensor, "b trajectories d"],
    sets: Sets = "each",
) -> float:
    """Return the distance between features of clips; "pooled" takes each first truth only."""
    if sets == "pooled":
        return frechet_of_sets(predicted.flatten(0, 1), true[:, 0]).item()
    each = [
        frechet_of_sets(*both) for both in zip(predicted.unbind(1), true.unbind(1), strict=True)
    ]
    return torch.stack(each).mean().item()


def fvd_estimate(
    predicted: Float[Tensor, "b trajectories d"],
    true: Float[Tensor, "b trajectories d"],
    sets: Sets = "each",
    seed: int = 0,
) -> Estimate:
    """Return the distance of two clips or more, with its interval as of `frechet_estimate`."""
    if len(predicted) < 2:
        raise ValueError(f"FVD needs two clips or more, got {len(predicted)}")
    drawn = torch.tensor(
        [fvd(predicted[chosen], true[chosen], sets) for chosen in _resampled(len(true), seed)],
        dtype=torch.float64,
    )
    return centred_estimate(fvd(predicted, true, sets), drawn)


def _resampled(num_clips: int, seed: int) -> Int[Tensor, "draws b"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_clips, (NUM_RESAMPLES, num_clips), generator=generator)


class Fvd(Metric):
    """FVD of the model's clips, one after another or together as the protocol says."""

    kind = "fvd"

    def __init__(self, protocol: Protocol, network: I3d | None) -> None:
        """Keep a network; None: the protocol does not allow an FVD, which is said."""
        super().__init__(protocol)
        self.network = network

    def measure(self, seen: Seen) -> Numbers:
        """Return features of whole clips, by the model and of the data."""
        if seen.shuffled or self.network is None:
            return {}
        first = 0 if self.protocol.fvd_frames == "all" else seen.context
        clips = {"model": seen.predicted}
        # Beside another prediction a file in H.264 holds the truth in another form.
        if seen.is_first or self.protocol.h264:
            clips["truth"] = seen.true
        return {name: {"i3d": self.network.features(one[:, first:])} for name, one in clips.items()}

    def left_out(self, card: DataCard, num_clips: int) -> dict[str, str]:
        reason = replace(self.protocol, num_clips=num_clips).without_fvd
        return {"fvd": reason} if reason else {}

    def estimates(self, found: Numbers) -> Found:
        """Yield one distance, at the last horizon and of all frames."""
        made, true = found["model"]["i3d"], found["truth"]["i3d"]
        if len(made) < 2:
            return
        sets, seed = self.protocol.fvd_sets, self.protocol.seed
        estimate = fvd_estimate(made, true.expand_as(made), sets, seed)
        for horizon in (self.protocol.horizon, None):
            yield horizon, "fvd", "model", estimate
