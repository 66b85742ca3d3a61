"""How good are streams of few steps? Rollouts that go on from held-out clips, against two measures.

    python benchmarks/rollouts.py --data LATENTS --reference RUN@48 --ways RUN@2 STUDENT@2

goes on from each clip several times, with other noise, under the clip's own actions, and says of
each way, a run and its denoising steps:

* `score`, the energy score against the recorded frames, the mean distance of a sample from them
  less half the mean distance of two samples: in expectation smallest for samples of the truth, so
  that neither blur nor noise pays. Distances of frames are root mean squares of their latents.
* `distance`, the energy distance of its frames from those of the reference: 0 where both are
  distributed alike, after the same frames and under the same actions.
* `spread`, how far two samples lie apart, over that of the reference.
* `wrong_db`, by how many dB the mean squared error rises under the actions of another episode, on
  the same noise: 0 for what obeys nothing; and `nearer`, the share of clips in which it rises: half
  of them then.

Intervals are of 95 %, episodes resampled. Wan worlds and small ones; latents as of `scd encode`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from scd.common.config import at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import derive_seed
from scd.data.clip import Batch, Conditions
from scd.data.loader import read_clips
from scd.data.source import open_source
from scd.data.spaces import Split
from scd.engine.open import open_engine
from scd.evaluation.grids import PictureRow, write_grid
from scd.evaluation.image import bootstrap, psnr_gain
from scd.models.checkpoint import load_world
from scd.models.flow import with_num_steps
from scd.streaming.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """One comparison."""

    data: str
    """Latents."""
    reference: str
    """World, run or step folder, and its denoising steps: "RUN@48"."""
    ways: tuple[str, ...]
    """Likewise; all are compared with the first."""
    split: Split = "val"
    """Part of the data."""
    given: int = 5
    """First frames of each clip, that are given."""
    frames: int = 8
    """Frames that are made after them."""
    clips_per_episode: int = 4
    """Clips of each episode, from other places."""
    samples: int = 4
    """Rollouts of each clip, 2 or more."""
    threads: int = 1
    """CPU threads."""
    out: str = ""
    """JSON file of the result; empty: none."""
    picture: str = ""
    """PNG of one clip as it was recorded and as each way goes on: of each latent frame its last
    picture, from the last given one on; empty: none."""
    clip: int = 0
    """Which clip that is."""
    held: tuple[str, ...] = ()
    """Names of actions: the picture also shows the last way under each of them, held."""

    def __post_init__(self) -> None:
        at_least(1, given=self.given, frames=self.frames, clips_per_episode=self.clips_per_episode)
        at_least(1, threads=self.threads)
        at_least(2, samples=self.samples)
        at_least(0, clip=self.clip)
        if self.held and not self.picture:
            raise ValueError("held actions are seen in the picture alone: name one")


def parse_way(way: str) -> tuple[str, int]:
    """Read "RUN@STEPS" (ValueError: another form)."""
    run, at, steps = way.rpartition("@")
    if not at or not run or not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"a way is a run and its denoising steps, RUN@2, got {way!r}")
    return run, int(steps)


def read_batch(config: RolloutsConfig) -> Batch:
    """Read the clips of all episodes that are long enough, those of one in a row (ValueError: of
    fewer than two)."""
    source = open_source(config.data, config.split, latents=True)
    length, places = config.given + config.frames, []
    for episode in range(source.num_episodes):
        room = source.num_frames(episode) - length + 1
        for number in range(config.clips_per_episode if room > 0 else 0):
            places.append((episode, derive_seed(0, "rollouts", episode, number) % room))
    if len(places) < 2 * config.clips_per_episode:
        raise ValueError(
            f"needed two episodes of {length} latent frames in {config.split} of {config.data}"
        )
    return Batch.of(read_clips(source, places, length, "stop"))


@torch.no_grad()
def follow(
    way: str, batch: Batch, conditions: Conditions, config: RolloutsConfig, purpose: str
) -> Float[Tensor, "samples b m c h w"]:
    """Return what a way makes of the given frames of clips; noise follows from the purpose."""
    run, steps = parse_way(way)
    world = load_world(run)
    sampling = with_num_steps(world.sampling, steps)
    engine = open_engine(world.model, "fast", "fp32")
    samples = []
    for number in range(config.samples):
        stream = Rollout(world, sampling, None, derive_seed(0, purpose, number), None, engine)
        given = batch.frames[:, : config.given]
        past = conditions.frames(0, config.given)
        stream.begin(conditions=past, latents=given, can_reset=False)
        actions = conditions.actions
        made = [
            stream.step_latents(None if actions is None else actions[:, config.given + place])
            for place in range(config.frames)
        ]
        samples.append(torch.stack(made, dim=1))
    return torch.stack(samples)


def apart(
    one: Float[Tensor, "samples b m ..."], other: Float[Tensor, "samples2 b m ..."]
) -> Float[Tensor, " b"]:
    """Return the mean distance of frames of two sets of samples, by clip. Of a set and itself, a
    sample is not compared with itself."""
    flat, of = (rearrange(each.flatten(3), "r b m d -> b m r d") for each in (one, other))
    total = torch.cdist(flat.double(), of.double()).sum((-2, -1)).mean(1) / flat.shape[-1] ** 0.5
    return total / (len(one) * (len(other) - (one is other)))


def measure(config: RolloutsConfig) -> dict[str, Any]:
    """Compare all ways (ValueError: too few clips, or no such way; OSError: no such run)."""
    torch.set_num_threads(config.threads)
    for way in (config.reference, *config.ways):
        parse_way(way)
    batch = read_batch(config)
    if config.clip >= len(batch.frames):
        raise ValueError(f"clip must be one of {len(batch.frames)}, from 0 on, got {config.clip}")
    own = batch.conditions
    true = batch.frames[None, :, config.given :]
    reference = follow(config.reference, batch, own, config, "reference")
    apart_there = apart(reference, reference)
    others = None
    if own.actions is not None:
        others = replace(own, actions=own.actions.roll(config.clips_per_episode, 0))
    by_clip: dict[str, dict[str, Tensor]] = {}
    shown = {"recorded": true[0, config.clip]}
    for way in config.ways:
        made = follow(way, batch, own, config, "ways")
        run, steps = parse_way(way)
        shown[f"{Path(run).name}, {steps} steps"] = made[0, config.clip]
        between = apart(made, made)
        by_clip[way] = {
            "score": apart(made, true) - between / 2,
            "distance": apart(made, reference) - between / 2 - apart_there / 2,
            "apart": between,
            "error": (made - true).square().flatten(2).mean((0, 2)),
        }
        if others is not None:
            wrong = follow(way, batch, others, config, "ways")
            by_clip[way]["wrong"] = (wrong - true).square().flatten(2).mean((0, 2))
    if config.picture:
        shown |= under_held(config, batch)
        draw(config, batch.frames[config.clip, : config.given], shown)
    found = _summary(by_clip, apart_there, config.clips_per_episode)
    score = apart(reference, true) - apart_there / 2
    return {"ways": found, "clips": len(batch.frames), "reference_score": score.mean().item()}


def under_held(config: RolloutsConfig, batch: Batch) -> dict[str, Float[Tensor, "m c h w"]]:
    """Return the clip of the picture as the last way goes on under held actions, by their names
    (ValueError: the world has no such action)."""
    names, found = open_source(config.data, config.split, latents=True).card.action_names, {}
    alone = slice(config.clip, config.clip + 1)
    conditions = vars(batch.conditions).items()
    parts = {name: None if one is None else one[alone] for name, one in conditions}
    first = replace(batch, frames=batch.frames[alone], conditions=Conditions(**parts))
    for name in config.held:
        if name not in names:
            raise ValueError(f"held must be of {list(names)}, got {name!r}")
        actions = parts["actions"].clone()
        actions[:, config.given :] = names.index(name)
        held = replace(first.conditions, actions=actions)
        found[f"{name} held"] = follow(config.ways[-1], first, held, config, "ways")[0, 0]
    return found


@torch.no_grad()
def draw(
    config: RolloutsConfig, given: Float[Tensor, "t c h w"], made: Mapping[str, Tensor]
) -> None:
    """Write what rollouts look like, one in a row, as the reference's autoencoder shows them."""
    autoencoder = load_world(parse_way(config.reference)[0]).autoencoder
    step = autoencoder.config.frames_per_latent
    rows = []
    for name, latents in made.items():
        frames = autoencoder.decode(torch.cat([given, latents])[None])[0, ::step]
        rows.append(PictureRow(name=name, frames=frames[len(given) - 1 :].float().cpu()))
    numbers = range(config.frames + 1)
    write_grid(rows, [f"+{number * step}" for number in numbers], Path(config.picture))


def _summary(
    by_clip: Mapping[str, Mapping[str, Tensor]], apart_there: Tensor, clips_per_episode: int
) -> dict[str, dict[str, Any]]:
    """Return means and intervals of each way, and their differences from the first way's."""

    def episodes(values: Tensor) -> Tensor:
        # Clips of one episode are not independent.
        return values.view(-1, clips_per_episode).mean(1)

    first, *_ = by_clip.values()
    found = {}
    for way, values in by_clip.items():
        line: dict[str, Any] = {"spread": (values["apart"].mean() / apart_there.mean()).item()}
        for name in ("score", "distance"):
            line[name] = to_json(bootstrap(episodes(values[name])))
            line[f"{name}_over_first"] = to_json(bootstrap(episodes(values[name] - first[name])))
        if "wrong" in values:
            gain = psnr_gain(episodes(values["error"]), episodes(values["wrong"]))
            line["wrong_db"] = to_json(gain)
            rises = (values["wrong"] > values["error"]).double()
            line["nearer"] = to_json(bootstrap(episodes(rises)))
        found[way] = line
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    config = tyro.cli(RolloutsConfig, args=arguments, description=__doc__)
    try:
        result = measure(config)
    except (ValueError, OSError) as error:
        print(f"rollouts.py: {error}", file=sys.stderr)
        return 2

    def said(estimate: Mapping[str, float]) -> str:
        low, high = estimate["ci_low"], estimate["ci_high"]
        return f"{estimate['mean']:.4f} [{low:.4f}, {high:.4f}]"

    print(f"{result['clips']} clips; the reference scores {result['reference_score']:.4f}")
    for way, line in result["ways"].items():
        wrong = ""
        if "wrong_db" in line:
            wrong = f", wrong actions {said(line['wrong_db'])} dB, nearer {said(line['nearer'])}"
        print(
            f"{way}: score {said(line['score'])} ({said(line['score_over_first'])} over the first),"
            f" distance {said(line['distance'])}, spread {line['spread']:.3f}{wrong}"
        )
    if config.out:
        write_json({"config": to_json(config), **result, **provenance()}, Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
