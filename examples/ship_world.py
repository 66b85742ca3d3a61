"""A trained run -> a small folder to pass on: weights in bfloat16, and held-out clips.

    python examples/ship_world.py RUN --data DATA --out FOLDER

`scd play FOLDER`, `scd serve FOLDER` and `scd sample FOLDER` take it like any run.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from scd.data.clip import Batch, Conditions
from scd.data.source import open_source
from scd.evaluation.predict import choose_windows, count_windows, read_windows
from scd.models.shipped import ship


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
    seed: int = 0
    """Seed of the choice of clips."""


def main(config: ShipConfig) -> None:
    """Choose clips of the test split and write the folder.

    Of eight times as many those with the most contrast go along: a stream that begins at a bare
    wall shows nothing.
    """
    source = open_source(config.data, "test")
    num_choices = min(8 * config.clips, count_windows(source, config.frames))
    windows = choose_windows(source, num_choices, config.frames, config.seed)
    batch = read_windows(source, windows, config.frames)
    best = batch.frames.std(dim=(-2, -1)).mean(dim=(1, 2)).argsort(descending=True)[: config.clips]
    actions = batch.conditions.actions
    chosen = Batch(
        frames=batch.frames[best],
        conditions=Conditions(actions=None if actions is None else actions[best]),
    )
    print(f"saved {ship(config.run, chosen, config.out)}")


if __name__ == "__main__":
    main(tyro.cli(ShipConfig))
