"""How much a world listens: the loss of held-out clips under the actions of other clips, less own.

    python benchmarks/action_gap.py RUN --data DATA --num-frames 13 --out FILE

measures every held-out clip by itself, on the same noise under its own actions and under those of
some others, and gives the mean rise of the loss with its 95 % bootstrap interval over episodes.
A model that does not listen has 0. The trainer logs the mean over its own clips as `action_gap`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from scd.autoencoders.build import latents_of
from scd.common.config import at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import derive_seed
from scd.data.clip import Batch
from scd.data.loader import read_clips
from scd.data.source import open_source
from scd.data.spaces import Split
from scd.evaluation.image import bootstrap
from scd.models.checkpoint import load_world
from scd.objectives.denoise import validation_loss


@dataclass(frozen=True, kw_only=True)
class GapConfig:
    """A measurement."""

    run: Annotated[str, tyro.conf.Positional]
    """Run or world that actions steer."""
    data: str
    """Clips with actions, or their latents."""
    split: Split = "val"
    """Part of it."""
    num_frames: int = 16
    """Frames of a clip; of latents latent ones."""
    clips_per_episode: int = 2
    """Clips of each episode, from other places."""
    others: int = 4
    """Clips whose actions take the place of a clip's own, one after another."""
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels."""
    out: str = ""
    """JSON file of the result; empty: none."""

    def __post_init__(self) -> None:
        at_least(1, clips_per_episode=self.clips_per_episode, others=self.others)


@torch.no_grad()
def measure(config: GapConfig) -> dict[str, Any]:
    """Measure all clips (ValueError: none is long enough, or there are too few)."""
    world, source = load_world(config.run), open_source(config.data, config.split, latents=True)
    places = []
    for episode in range(source.num_episodes):
        room = source.num_frames(episode) - config.num_frames + 1
        for number in range(config.clips_per_episode if room > 0 else 0):
            places.append((episode, derive_seed(0, "gap", episode * 1000 + number) % room))
    if len(places) <= config.others:
        raise ValueError(
            f"{config.data} has {len(places)} clips of {config.num_frames} frames in "
            f"{config.split}, needed more than others={config.others}"
        )
    batches = [Batch.of([clip]) for clip in read_clips(source, places, config.num_frames, "stop")]
    own, gaps = [], []
    for place, batch in enumerate(batches):
        clean, seed = latents_of(world.autoencoder, batch), derive_seed(0, "gap of", place)
        more: dict[str, Any] = {
            "times": config.times,
            "seed": seed,
            "needs_first_frame": world.model.needs_first_frame,
        }
        mine = validation_loss(world.model, clean, batch.conditions, **more)["loss"]
        rises = []
        for offset in range(1, config.others + 1):
            # Actions of another episode, as far as there is one.
            at = (place + offset * config.clips_per_episode) % len(batches)
            theirs = replace(batch.conditions, actions=batches[at].conditions.actions)
            rises.append(validation_loss(world.model, clean, theirs, **more)["loss"] - mine)
        own.append(mine)
        gaps.append(sum(rises) / len(rises))
    # Clips of one episode are not independent: episodes are resampled.
    episodes = sorted({episode for episode, _ in places})
    by_episode = torch.tensor(gaps).view(len(episodes), config.clips_per_episode).mean(1)
    return {
        "clips": len(gaps),
        "episodes": len(episodes),
        "loss": sum(own) / len(own),
        "gap": to_json(bootstrap(by_episode)),
        "gaps": gaps,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    config = tyro.cli(GapConfig, args=arguments, description=__doc__)
    try:
        result = measure(config)
    except (ValueError, OSError) as error:
        print(f"action_gap.py: {error}", file=sys.stderr)
        return 2
    gap = result["gap"]
    print(
        f"{result['clips']} clips of {result['episodes']} episodes: loss {result['loss']:.4f}, "
        f"action gap {gap['mean']:.6f} [{gap['ci_low']:.6f}, {gap['ci_high']:.6f}]"
    )
    if config.out:
        write_json({"config": to_json(config), **result, **provenance()}, Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
