"""Does reading keep up with training? Frames per second of each, in turns.

    python benchmarks/loading.py --data data/doom-64 --preset doom-play

encodes one split of the data into a folder that is thrown away afterwards, and then, round by
round, so that whatever else the machine does hits all alike, reads clips from the videos, reads
clips from the latents, and trains. Reading uses the loader's own threads. A training step is the
forward and backward pass of one batch without the optimiser, so it looks faster than it is.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device, make_generator
from scd.data.latents import LatentSource
from scd.data.loader import Loader
from scd.data.source import Source, open_source
from scd.data.spaces import Split
from scd.preprocessing.encode import EncodeConfig, encode
from scd.training.config import TrainConfig
from scd.training.fit import fit_to_data
from scd.training.presets import preset
from scd.training.world import build_model, clip_objective


@dataclass(frozen=True, kw_only=True)
class LoadingConfig:
    """One comparison."""

    data: str
    """Folder of episodes; the preset's model is fitted to it."""
    preset: str = "doom-64"
    """Run whose model, clips and precision are used."""
    autoencoder: str = "pixels"
    """As of `scd encode`; the model is fitted to its latents."""
    split: Split = "val"
    """Part of the data that is encoded and read."""
    rounds: int = 3
    """Rounds."""
    batches: int = 40
    """Batches read in a round, from videos and from latents; a quarter of them come before and
    are not timed."""
    steps: int = 4
    """Training steps of a round; one more comes before and is not timed."""
    out: str = "docs/results/loading.json"
    """The result."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.batches, self.steps) < 1:
            raise ValueError("rounds, batches and steps must be 1 or more")


def read_rate(source: Source, run: TrainConfig, num_batches: int) -> float:
    """Return frames per second that a loader gives to somebody who does nothing else."""
    workers = run.num_loader_workers
    stream = Loader(source, run.batch_size, run.num_frames, run.seed, workers=workers).stream()
    try:
        for _ in islice(stream, max(1, num_batches // 4)):
            pass
        began = time.perf_counter()
        for _ in islice(stream, num_batches):
            pass
        return num_batches * run.batch_size * run.num_frames / (time.perf_counter() - began)
    finally:
        stream.close()


def trainer(run: TrainConfig, source: LatentSource) -> Callable[[int], float]:
    """Return a function from a number of steps to the frames per second that training takes."""
    device = choose_device("auto" if run.device == "auto" else run.device)
    model = build_model(run).to(device).train()
    objective = clip_objective(run, model)
    batch = Loader(source, run.batch_size, run.num_frames, run.seed).batch(0).to(device)

    def step(number: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            value, _ = objective.loss(
                model, batch, make_generator(0, "loading", number, device=device)
            )
        value.backward()
        model.zero_grad(set_to_none=True)
        value.item()

    def rate(num_steps: int) -> float:
        step(0)
        began = time.perf_counter()
        for number in range(num_steps):
            step(number)
        return num_steps * run.batch_size * run.num_frames / (time.perf_counter() - began)

    return rate


def compare(config: LoadingConfig, folder: Path) -> dict[str, Any]:
    """Encode, read and train in turns; return the result.

    Raises:
        ValueError, OSError: the data or the autoencoder cannot be used.
    """
    settings = EncodeConfig(
        data=config.data, autoencoder=config.autoencoder, out=str(folder), splits=(config.split,)
    )
    encoded = encode(settings)
    latents = LatentSource(folder, config.split)
    videos = open_source(config.data, config.split)
    run = fit_to_data(replace(preset(config.preset), data=config.data))
    train = trainer(run, latents)
    rates: dict[str, list[float]] = {"videos": [], "latents": [], "training": []}
    for _ in range(config.rounds):
        rates["videos"].append(read_rate(videos, run, config.batches))
        rates["latents"].append(read_rate(latents, run, config.batches))
        rates["training"].append(train(config.steps))
    ratios = {
        name: [rate / used for rate, used in zip(rates[name], rates["training"], strict=True)]
        for name in ("videos", "latents")
    }
    encoding = encoded.frames / encoded.seconds
    ratios["encoding"] = [encoding / used for used in rates["training"]]
    return {
        "frames_per_second": {"encoding": encoding}
        | {name: median(values) for name, values in rates.items()},
        "over_training": {
            name: {"median": median(values), "low": min(values), "high": max(values)}
            for name, values in ratios.items()
        },
        "shape": list(latents.info.shape),
        "timed": "wall clock; reading: clips of random places, by the loader's threads, alone; "
        "training: forward and backward passes of one batch, without the optimiser; encoding: "
        "reading and writing included",
        "settings": to_json(config),
    } | provenance()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    config = tyro.cli(LoadingConfig, args=arguments, description=__doc__)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(config, Path(folder) / "latents")
    except (ValueError, OSError) as error:
        print(f"loading.py: {error}", file=sys.stderr)
        return 2
    write_json(result, Path(config.out))
    for name, rate in result["frames_per_second"].items():
        print(f"{name:9} {rate:10.0f} frames/s")
    for name, ratio in result["over_training"].items():
        print(
            f"{name} over training: {ratio['median']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}]"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
