"""Does reading keep up with training? Frames per second of each, in turns.

    python benchmarks/loading.py --data data/doom-64 --preset doom-play

encodes one split of the data into a folder that is thrown away afterwards, and then, round by
round, so that whatever else the machine does hits all alike, reads clips from the videos, reads
clips from the latents, and trains. Reading uses the loader's own threads. A training step is the
forward and backward pass of one batch without the optimiser, so it looks faster than it is.

    python benchmarks/loading.py --data data/doom-64 --against ../older-checkout

reads clips of the videos by this checkout and by another one, A B B A, each in a process of its
own: of random places by the loader's threads, and one after another by one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
    against: str = ""
    """Another checkout of this project, to compare reading with and nothing else."""
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


class Reader:
    """A process that reads clips by some checkout's code, for the time of a with block."""

    def __init__(self, checkout: Path, config: LoadingConfig, run: TrainConfig) -> None:
        numbers = (run.batch_size, run.num_frames, run.num_loader_workers)
        script = Path(__file__).with_name("reader.py")
        self._words = [sys.executable, str(script), str(Path(config.data).resolve()), config.split]
        self._words += map(str, numbers)
        self._environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        self._num_clips = run.batch_size * config.batches
        self._num_batches = config.batches

    def __enter__(self) -> Reader:
        self._process = subprocess.Popen(
            self._words,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.clip_mb: float = self._answer()["clip_mb"]
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def clips_per_s(self, order: str) -> float:
        """Let it read the batches of a round."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order} {self._num_batches}\n")
        self._process.stdin.flush()
        return self._num_clips / self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"{' '.join(self._words)} ended with status {self._process.wait()}")
        return json.loads(line)


def compare_checkouts(config: LoadingConfig) -> dict[str, Any]:
    """Read by two checkouts in turns; return the result.

    Raises:
        ValueError, OSError: one of them cannot read the data.
    """
    run = preset(config.preset)
    rates: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        readers = [
            stack.enter_context(Reader(checkout, config, run))
            for checkout in (Path(__file__).parents[1], Path(config.against))
        ]
        for order in ("random", "ordered"):
            for reader in readers:
                reader.clips_per_s(order)
            pair: list[list[float]] = [[], []]
            for number in range(config.rounds):
                for one in (0, 1) if number % 2 == 0 else (1, 0):
                    pair[one].append(readers[one].clips_per_s(order))
            rates[order] = {"this": pair[0], "other": pair[1]}
    ratios = {
        order: [ours / theirs for ours, theirs in zip(*pair.values(), strict=True)]
        for order, pair in rates.items()
    }
    return {
        "clips_per_second": {
            order: {name: median(values) for name, values in pair.items()}
            for order, pair in rates.items()
        },
        "megabytes_per_clip": readers[0].clip_mb,
        "this_over_other": {
            order: {"median": median(values), "low": min(values), "high": max(values)}
            for order, values in ratios.items()
        },
        "timed": "wall clock; a megabyte is 10^6 bytes of 8-bit pixels; random: by the loader's "
        "threads; ordered: clip after clip by one thread; a round of each comes before and is not "
        "timed",
        "settings": to_json(config),
    } | provenance()


def readable(result: dict[str, Any]) -> str:
    """Say of two checkouts how fast they read."""
    lines = []
    for order, rates in result["clips_per_second"].items():
        ratio, mb = result["this_over_other"][order], result["megabytes_per_clip"]
        speeds = ", ".join(
            f"{name} {rate:.0f} clips/s ({rate * mb:.0f} MB/s)" for name, rate in rates.items()
        )
        spread = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        lines.append(f"{order:8} {speeds}; this over other: {spread}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    config = tyro.cli(LoadingConfig, args=arguments, description=__doc__)
    try:
        if config.against:
            result = compare_checkouts(config)
            write_json(result, Path(config.out))
            print(readable(result))
            return 0
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
