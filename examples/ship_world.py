"""A trained run -> a small folder to pass on: weights in bfloat16, and held-out clips.

    python examples/ship_world.py RUN --data DATA --out FOLDER

`scd play FOLDER`, `scd serve FOLDER` and `scd sample FOLDER` take it like any run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from scd.data.clip import Batch, Conditions, frames_to_pixels
from scd.data.source import open_source
from scd.evaluation.predict import choose_windows, count_windows, read_windows
from scd.models.checkpoint import load_world
from scd.models.names import PICTURE_FILE
from scd.models.shelf import animated
from scd.models.shipped import ship
from scd.streaming.rollout import Rollout

GIVEN = 16
"""Frames of a clip from which the moving picture begins; they are not in it."""


@dataclass(frozen=True, kw_only=True)
class ShipConfig:
    """One folder to pass on."""

    run: tyro.conf.Positional[str]
    """World, run or step folder."""
    data: str
    """Where the clips are from, as in `scd train`."""
    out: str
    """A new folder."""
    clips: int = 4
    """Held-out clips."""
    frames: int = 48
    """Frames of each."""
    shown: int = 48
    """Frames of the moving picture, which the world makes itself."""
    seed: int = 0
    """Seed of the choice of clips."""
    steps: int | None = None
    """Denoising steps per frame with which it is passed on; None: as the run has them."""


def main(config: ShipConfig) -> None:
    """Choose clips of the test split and write the folder.

    Of eight times as many those with the most contrast go along: a stream that begins at a bare
    wall shows nothing.
    """
    source = open_source(config.data, "test")
    length = max(config.frames, GIVEN + config.shown)
    num_choices = min(8 * config.clips, count_windows(source, length))
    if not num_choices:
        raise ValueError(f"{config.data}: no episode kept for tests has {length} frames")
    windows = choose_windows(source, num_choices, length, config.seed)
    batch = read_windows(source, windows, length)
    best = batch.frames.std(dim=(-2, -1)).mean(dim=(1, 2)).argsort(descending=True)[: config.clips]
    actions = batch.conditions.actions
    chosen = Batch(
        frames=batch.frames[best],
        conditions=Conditions(actions=None if actions is None else actions[best]),
    )
    carried = Batch(
        frames=chosen.frames[:, : config.frames],
        conditions=chosen.conditions.frames(0, config.frames),
    )
    sampling = load_world(config.run).sampling
    if config.steps is not None:
        sampling = replace(sampling, num_steps=config.steps)
    folder = ship(config.run, carried, config.out, sampling)
    write_preview(folder, chosen)
    print(f"saved {folder}")


def write_preview(folder: Path, clips: Batch) -> None:
    """Write the moving picture of the start screen: the world's own frames under the actions of the
    first clip, whose beginning it is given."""
    world, actions = load_world(folder), clips.conditions.actions
    assert actions is not None
    rollout = Rollout(world, seed=0)
    rollout.begin(clips.frames[:1, :GIVEN], Conditions(actions=actions[:1, :GIVEN]))
    made = [rollout.step(action[None])[0] for action in actions[0, GIVEN:]]
    pixels = frames_to_pixels(torch.stack(made)).movedim(-1, -3)
    (folder / PICTURE_FILE).write_bytes(animated(pixels, world.card.fps))


if __name__ == "__main__":
    main(tyro.cli(ShipConfig))
