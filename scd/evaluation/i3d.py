"""I3D: the network of FVD. Its 400 classes before the softmax are the features of a clip.

An Inception network whose kernels reach over time (Carreira and Zisserman, "Quo Vadis, Action
Recognition?", arXiv 1705.07750), for the weights that TF-Hub published as i3d-kinetics-400. Padding
is TensorFlow's "SAME": as many zeros as the last place of a window needs, half of them before, the
odd one behind. `scd weights i3d` puts the weights where `cached_weights` finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn

from scd.common.runtime import cache_folder

NUM_FEATURES = 400
"""Numbers of a clip: classes before the softmax."""

SIDE = 224
"""Rows and columns of the frames that the network was trained on."""

EPSILON = 1e-3
"""Added to variances; Sonnet's, with which it was trained."""

STEM = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
"""Channels in and out, and kernel, of the convolutions before the modules."""

MODULES: dict[str, tuple[int, ...]] = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
"""Channels in; out of branch 0; within and out of branches 1 and 2; out of branch 3."""

POOLED: dict[str, tuple[int, int]] = {"Mixed_4b": (3, 2), "Mixed_5b": (2, 2)}
"""Window and stride, in time too, of the maxima before a module."""

LOGITS = "Logits/Conv3d_0c_1x1"

WEIGHTS_FILE = "i3d-kinetics-400.safetensors"
"""Name of the converted weights in the cache."""

CONTENT_SHA256 = "e47c9b787e5aa0324cb0b64bf0951c0f13351715023190aa2afebd5f29064e39"
"""Of the converted weights, as `digest_of_arrays` takes it."""


class I3dNetwork(nn.Module):
    """The network, normalisation folded into its convolutions. Made by `network_of`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict(
            {name: nn.Conv3d(given, made, kernel) for name, (given, made, kernel) in STEM.items()}
        )
        self.mixed = nn.ModuleDict({name: Mixed(*sizes) for name, sizes in MODULES.items()})
        self.logits = nn.Conv3d(1024, NUM_FEATURES, 1)

    def forward(self, clips: Float[Tensor, "b 3 t 224 224"]) -> Float[Tensor, "b 400"]:
        """Return the classes of clips, 9 frames or more, in [-1, 1], before the softmax."""
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
        features = same_convolution(self.stem["Conv3d_1a_7x7"], clips, stride=2).relu_()
        features = same_maximum(features, (1, 3, 3), (1, 2, 2))
        for name in ("Conv3d_2b_1x1", "Conv3d_2c_3x3"):
            features = same_convolution(self.stem[name], features).relu_()
        features = same_maximum(features, (1, 3, 3), (1, 2, 2))
        for name, module in self.mixed.items():
            if name in POOLED:
                window, stride = POOLED[name]
                features = same_maximum(features, (window,) * 3, (stride,) * 3)
            features = module(features)
        features = F.avg_pool3d(features, (2, 7, 7), stride=1)
        # The means over places in time are taken of the classes, which are linear in the features.
        return self.logits(features.mean(2, keepdim=True)).flatten(1)


class Mixed(nn.Module):
    """Four branches side by side; the 1 x 1 x 1 convolutions that open three of them are one."""

    def __init__(self, given: int, *made: int) -> None:
        super().__init__()
        self.split = (made[0], made[1], made[3])
        self.opening = nn.Conv3d(given, sum(self.split), 1)
        self.first = nn.Conv3d(made[1], made[2], 3, padding=1)
        self.second = nn.Conv3d(made[3], made[4], 3, padding=1)
        self.pooled = nn.Conv3d(given, made[5], 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return the branches one after another [b c t h w]."""
        plain, one, other = self.opening(features).relu_().split(self.split, dim=1)
        pooled = self.pooled(F.max_pool3d(features, 3, stride=1, padding=1))
        return torch.cat(
            [plain, self.first(one).relu_(), self.second(other).relu_(), pooled.relu_()], dim=1
        )


def same_padding(sizes: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return "SAME" padding in the order of `F.pad`: the last dimension first."""
    pads: list[int] = []
    for size, width, step in reversed(list(zip(sizes, window, stride, strict=True))):
        total = max((-(-size // step) - 1) * step + width - size, 0)
        pads += [total // 2, total - total // 2]
    return pads


def same_convolution(layer: nn.Module, features: Tensor, stride: int = 1) -> Tensor:
    assert isinstance(layer, nn.Conv3d)
    pads = same_padding(features.shape[2:], layer.kernel_size, (stride,) * 3)
    if any(pads):
        features = F.pad(features, pads)
    return F.conv3d(features, layer.weight, layer.bias, stride)


def same_maximum(features: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Take maxima of features that are 0 or more, so that zeros around them change none."""
    pads = same_padding(features.shape[2:], window, stride)
    return F.max_pool3d(F.pad(features, pads), tuple(window), tuple(stride))


def digest_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of arrays by name, type, shape and numbers, however they are stored."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        one = arrays[name]
        digest.update(f"{name} {one.dtype.str} {one.shape};".encode())
        digest.update(np.ascontiguousarray(one).tobytes())
    return digest.hexdigest()


def cached_weights() -> Path:
    """Return where `scd weights i3d` puts the converted weights, whether they are there or not."""
    return cache_folder("weights") / WEIGHTS_FILE


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read converted weights, whole and unchanged.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are damaged, or others.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights of I3D at {path}: scd weights i3d fetches them")
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): scd weights i3d writes it anew") from error
    found = digest_of_arrays(arrays)
    if found != CONTENT_SHA256:
        raise ValueError(
            f"{path} holds numbers of SHA-256 {found}, needed {CONTENT_SHA256}: scd weights i3d "
            "writes it anew"
        )
    return arrays


def network_of(arrays: Mapping[str, np.ndarray]) -> I3dNetwork:
    """Make the network of arrays by the names in the package: params/..., batch_stats/..."""
    network = I3dNetwork()
    state = {}
    for name in STEM:
        state |= _parameters(f"stem.{name}", _folded(arrays, name))
    for name in MODULES:
        at = f"{name}/Branch_"
        opening = [_folded(arrays, f"{at}{number}/Conv3d_0a_1x1") for number in (0, 1, 2)]
        joined = tuple(torch.cat(parts) for parts in zip(*opening, strict=True))
        for part, folded in (
            ("opening", joined),
            ("first", _folded(arrays, f"{at}1/Conv3d_0b_3x3")),
            ("second", _folded(arrays, f"{at}2/Conv3d_0b_3x3")),
            ("pooled", _folded(arrays, f"{at}3/Conv3d_0b_1x1")),
        ):
            state |= _parameters(f"mixed.{name}.{part}", folded)
    last = f"params/{LOGITS}/Conv_0"
    kernel, bias = (torch.from_numpy(arrays[f"{last}/{part}"]) for part in ("kernel", "bias"))
    state |= _parameters("logits", (_as_here(kernel), bias))
    network.load_state_dict(state)
    for one in network.parameters():
        if one.ndim == 5:
            # As the clips lie; else every convolution would lay its weights out anew.
            one.data = one.data.contiguous(memory_format=torch.channels_last_3d)
    return network.requires_grad_(False).eval()


def _parameters(name: str, both: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.weight": both[0], f"{name}.bias": both[1]}


def _as_here(kernel: Float[Tensor, "t h w c d"]) -> Float[Tensor, "d c t h w"]:
    return rearrange(kernel, "t h w c d -> d c t h w")


def _folded(arrays: Mapping[str, np.ndarray], name: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution whose result is normalised afterwards."""
    kernel = torch.from_numpy(arrays[f"params/{name}/Conv_0/kernel"]).double()
    shift, mean, variance = (
        torch.from_numpy(arrays[f"{place}/{name}/BatchNorm_0/{part}"]).double().flatten()
        for place, part in (("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var"))
    )
    scale = (variance + EPSILON).rsqrt()
    return (_as_here(kernel * scale)).float(), (shift - mean * scale).float()
