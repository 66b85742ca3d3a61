"""Does what was hidden come back? The smallest world in which only memory can tell.

    python tools/remembered.py --out docs/results/remembered.json [--hidden 1 2 4 8 16 32] ...

The world is a curtain before four fields of a colour each, drawn anew for each episode; actions
open and close it, and nothing else moves. Trained on it are a separable model and the dense one of
the same size, from the same seeds on the same clips, for each number of `--steps`. Then a stream is
given two frames with the curtain open, closes it for `--hidden` frames, which it makes itself, and
opens it: the share of fields whose colour is nearest to the true one is what came back. Chance is
one in eight. `--caches` asks the same runs again with KV caches of WINDOW/SINKS frames: the sinks
are the first frames of a stream, which stay for good, and the separable model's first one is its
start frame, which shows nothing. FILE.png is the plot. What is trained stays in `--runs`: the same
command goes on.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
import tyro
from cells import markdown
from decide import run
from jaxtyping import Float, Int
from long_streams import check_caches, named, with_cache
from torch import Tensor

import scd
from scd.common.config import at_least
from scd.common.provenance import command, provenance, write_json
from scd.data.clip import Conditions, pixels_to_frames
from scd.evaluation.image import bootstrap
from scd.evaluation.metrics import row_of
from scd.evaluation.plots import plot_metrics
from scd.models.checkpoint import load_world
from scd.streaming.rollout import Rollout

COLOURS = np.array(
    [[r, g, b] for r in (40, 215) for g in (40, 215) for b in (40, 215)], dtype=np.uint8
)
"""Corners of the colour cube, which differ by as much as can be."""

CURTAIN = 128
"""Grey of the closed curtain, as far from all of them."""

SIDE, FIELD = 16, 8
"""Pixels of a frame and of a field, which is one token."""

OPEN, CLOSED = 0, 1
"""Actions."""

LENGTH, GIVEN = 64, 2
"""Frames of an episode, and those that a stream is given."""

ASKED = 2**32
"""Seed of the colours that streams are asked for; those of episodes are their numbers."""

KINDS = {
    "separable": "toy --model.encoder.num-layers 2 --model.decoder.num-layers 1",
    "dense": "toy-dense --model.num-layers 3",
}
"""Presets, with as many layers."""

FLAGS = (
    "--model.shape.height 16 --model.shape.width 16 --model.block.width 64 "
    "--model.block.head-dim 32 --model.block.rotary-axes 8 12 12 --model.conditions.num-actions 2 "
    "--num-frames 24 --batch-size 8 --validate-every 200 --sample-every 0 --threads 1"
)


@dataclass(frozen=True, kw_only=True)
class RememberedConfig:
    """What is trained and asked."""

    out: str
    """The result, a .json file."""
    runs: str = "runs/out/remembered"
    """Folder of clips and trainings."""
    kinds: tuple[Literal["separable", "dense"], ...] = ("separable", "dense")
    """What is trained."""
    caches: tuple[str, ...] = ()
    """WINDOW/SINKS of the KV cache of streams, in frames; none: as the models were trained."""
    hidden: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Frames for which the curtain is closed; the longest in training is `longest`."""
    longest: int = 12
    """Frames for which it is closed in training, at most."""
    episodes: int = 240
    """To train on."""
    steps: tuple[int, ...] = (800,)
    """Of training."""
    seeds: int = 3
    """Trainings of each kind."""
    clips: int = 64
    """Streams of each question."""

    def __post_init__(self) -> None:
        at_least(1, longest=self.longest, seeds=self.seeds, clips=self.clips)
        at_least(40, episodes=self.episodes)
        if not self.kinds or not self.hidden or not self.steps:
            raise ValueError("needed one or more of each of kinds, hidden and steps")
        at_least(1, hidden=min(self.hidden), steps=min(self.steps))
        check_caches(self.caches)
        if not self.out.endswith(".json"):
            raise ValueError(f"out must be a .json file, got {self.out}")


def pictures(colours: Int[np.ndarray, "4"], actions: Sequence[int]) -> np.ndarray:
    """Draw frames [t 16 16 3] of one episode; the fields go from left to right, then down."""
    fields = COLOURS[colours].reshape(2, 2, 3).repeat(FIELD, 0).repeat(FIELD, 1)
    closed = np.full_like(fields, CURTAIN)
    return np.stack([closed if action == CLOSED else fields for action in actions])


def record(folder: Path, episodes: int, longest: int) -> None:
    """Write the clips: the curtain is open for 1 to 3 frames, then closed for 1 to `longest`."""
    space = gymnasium.spaces.Discrete(2)
    with scd.ClipWriter(folder, space, fps=10, names=("open", "close"), pixel_art=True) as clips:
        while clips.num_episodes < episodes:
            generator = np.random.default_rng(clips.num_episodes)
            actions: list[int] = []
            while len(actions) < LENGTH:
                actions += [OPEN] * int(generator.integers(1, 4))
                actions += [CLOSED] * int(generator.integers(1, longest + 1))
            actions = actions[:LENGTH]
            clips.write(pictures(generator.integers(len(COLOURS), size=4), actions), actions)


def train(kind: str, steps: int, seed: int, data: Path, folder: Path) -> None:
    """Train one kind, or go on where it was interrupted (ValueError: the command failed)."""
    words = ["train", *KINDS[kind].split(), *FLAGS.split(), "--data", str(data)]
    words += ["--max-steps", str(steps), "--seed", str(seed), "--out", str(folder)]
    run(words)


@torch.no_grad()
def comes_back(run: Path, hidden: int, num_clips: int, cache: str = "") -> Float[Tensor, " clips"]:
    """Return the share of fields of each stream whose colour is right when the curtain opens."""
    generator = np.random.default_rng(ASKED)
    colours = generator.integers(len(COLOURS), size=(num_clips, 4))
    true = np.stack([pictures(one, [OPEN] * GIVEN) for one in colours])
    opened = torch.full((num_clips,), OPEN)
    rollout = Rollout(with_cache(load_world(run), cache), seed=0, engine="fast")
    rollout.begin(
        pixels_to_frames(torch.from_numpy(true)),
        Conditions(actions=opened[:, None].expand(-1, GIVEN)),
    )
    for _ in range(hidden):
        rollout.step(torch.full_like(opened, CLOSED))
    return right(rollout.step(opened).cpu(), colours)


def right(
    frames: Float[Tensor, "clips 3 16 16"], colours: Int[np.ndarray, "clips 4"]
) -> Float[Tensor, " clips"]:
    """Return the share of fields whose mean colour is nearest to the true one."""
    means = frames.unflatten(-1, (2, FIELD)).unflatten(-3, (2, FIELD)).mean((-1, -3))
    palette = pixels_to_frames(torch.from_numpy(COLOURS)[:, None, None])[:, :, 0, 0]
    nearest = torch.cdist(means.flatten(-2).mT.contiguous(), palette[None]).argmin(-1)
    return (nearest == torch.from_numpy(colours)).float().mean(1)


def remembered(config: RememberedConfig) -> dict[str, Any]:
    """Train and ask; return a row for each kind, number of steps and length out of sight."""
    runs = Path(config.runs)
    record(runs / "clips", config.episodes, config.longest)
    rows = []
    for steps in config.steps:
        for kind in config.kinds:
            folders = [runs / f"{kind}-{steps}-{seed}" for seed in range(config.seeds)]
            for seed, folder in enumerate(folders):
                train(kind, steps, seed, runs / "clips", folder)
            for cache, hidden in itertools.product(config.caches or ("",), config.hidden):
                found = [comes_back(one, hidden, config.clips, cache) for one in folders]
                shares = torch.stack(found)
                name = f"{kind}, {steps} steps" + (f", {named(cache)}" if cache else "")
                row = row_of("memory", bootstrap(shares.mean(0)), name) | {"horizon": hidden}
                rows.append(row | {"by_seed": [round(one, 4) for one in shares.mean(1).tolist()]})
                print(f"{name}, hidden for {hidden}: {row['mean']:.2f}", flush=True)
    return {"rows": rows, "chance": 1 / len(COLOURS), "command": command()} | provenance()


def remembered_table(result: Mapping[str, Any]) -> str:
    """Return the share that comes back by the frames out of sight, and that of each seed."""
    asked = list(dict.fromkeys(row["horizon"] for row in result["rows"]))
    rows = []
    for name in dict.fromkeys(row["baseline"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["baseline"] == name]
        cells = (f"{row['mean']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]" for row in mine)
        rows.append([name, *cells])
        by_seed = (", ".join(f"{one:.2f}" for one in row["by_seed"]) for row in mine)
        rows.append(["by seed", *by_seed])
    return markdown(["hidden for, frames", *map(str, asked)], rows)


def main(arguments: Sequence[str]) -> int:
    """Train, ask, write the result and its plot; return the exit status."""
    try:
        config = tyro.cli(RememberedConfig, args=arguments)
        result = remembered(config)
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, out)
        plot_metrics(result["rows"], ["memory"], out.with_suffix(".png"))
        print(remembered_table(result))
    except (ValueError, OSError) as error:
        print(f"remembered.py: {error}", file=sys.stderr)
        return 2
    print(f"saved {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
