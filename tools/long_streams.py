"""Drift of long streams: what is left after hundreds of frames, for memories of several sizes.

    python tools/long_streams.py RUN DATA --out FILE.json [--caches 16/1 8/1 16/0] [--fvd] ...

streams RUN, steered by the recorded actions of DATA, for 1,000 frames, once for each WINDOW/SINKS
of its KV cache and each `--observe-every`: a true frame is put in every so many frames, 0 never.
Each part of 100 frames is compared with the true frames: sharpness and contrast, with `--judge`
action accuracy and the Frechet distance of its features, with `--fvd` FVD of clips of 16 frames
(scd weights i3d). Recordings are played one after another; where one ends the next begins, which a
stream learns only by being shown. "recordings" are as many other ones, measured in the same way:
what a stream that loses nothing would get, which for a distance of so few clips is far from 0.
FILE.png is the plot, FILE-1.png and so on show some frames of each setting. All are written after
each setting: the same command goes on, with more of `--caches` and `--observe-every` too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from cells import markdown
from jaxtyping import Float
from torch import Tensor

from scd.common.config import at_least, differences, to_json
from scd.common.files import read_json
from scd.common.places import refuse_another
from scd.common.provenance import provenance, write_json
from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.data.source import Source, open_source
from scd.data.spaces import Split
from scd.evaluation.frechet import frechet_of_sets
from scd.evaluation.fvd import I3d, cached_i3d
from scd.evaluation.grids import PictureRow, write_grid
from scd.evaluation.image import Estimate, bootstrap
from scd.evaluation.inverse_dynamics import ReadActions, load_inverse_dynamics, pairs
from scd.evaluation.media import spread
from scd.evaluation.metrics import drift_estimates, drift_statistics, row_of
from scd.evaluation.plots import plot_metrics
from scd.evaluation.predict import check_fit
from scd.evaluation.protocols import Protocol
from scd.models.checkpoint import World, load_world
from scd.models.flow import with_num_steps
from scd.streaming.rollout import Rollout

FVD_FRAMES = 16
"""Frames of the clips of FVD."""

NUM_SHOWN = 10
"""Frames of a stream that are shown."""

NUM_PARTS = 5
"""Parts in a line of the table."""


@dataclass(frozen=True, kw_only=True)
class StreamsConfig:
    """One set of long streams."""

    run: Annotated[str, tyro.conf.Positional]
    """World, or folder of a run."""
    data: Annotated[str, tyro.conf.Positional]
    """Recordings that steer the streams, as for scd evaluate."""
    out: str
    """The result, a .json file."""
    split: Split = "val"
    """Part of the data."""
    frames: int = 1000
    """Frames of each stream."""
    part: int = 100
    """Frames that are measured together."""
    streams: int = 4
    """Streams side by side, of other recordings."""
    context: int = 8
    """True frames at the beginning."""
    caches: tuple[str, ...] = ()
    """WINDOW/SINKS of the KV cache, in frames; none: as the world was trained."""
    observe_every: tuple[int, ...] = (0,)
    """Put in a true frame every so many frames; 0: never."""
    judge: str = ""
    """Inverse dynamics model of the same data (scd train-judge)."""
    fvd: bool = False
    """Measure FVD of clips of 16 frames of each part; half a second of a core each."""
    num_steps: int | None = None
    """Denoising steps per frame; None: as the checkpoint says."""
    seed: int = 0
    """Of the noise and of the choice of recordings."""

    def __post_init__(self) -> None:
        at_least(1, frames=self.frames, part=self.part, streams=self.streams, context=self.context)
        if not self.out.endswith(".json"):
            raise ValueError(f"out must be a .json file, got {self.out}")
        check_caches(self.caches)
        if min(self.observe_every, default=0) < 0:
            raise ValueError(f"observe_every must be 0 or more, got {self.observe_every}")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What happened: recordings one after another."""

    frames: Float[Tensor, "b t 3 h w"]
    conditions: Conditions


def recorded(source: Source, num_streams: int, num_frames: int, seed: int) -> Recorded:
    """Read as many frames for each stream, its recordings drawn one after another."""
    generator = make_generator(seed, "recordings")
    frames, actions = [], []
    for _ in range(num_streams):
        clips, length = [], 0
        while length < num_frames:
            episode = int(torch.randint(source.num_episodes, (), generator=generator))
            taken = min(source.num_frames(episode), num_frames - length)
            clips.append(source.read(episode, 0, taken))
            length += taken
        frames.append(torch.cat([clip.frames for clip in clips]))
        steering = [clip.actions for clip in clips if clip.actions is not None]
        actions.append(torch.cat(steering) if steering else None)
    known = [one for one in actions if one is not None]
    conditions = Conditions(actions=torch.stack(known) if known else None)
    return Recorded(frames=torch.stack(frames), conditions=conditions)


def check_caches(caches: Sequence[str]) -> None:
    """Refuse what is not WINDOW/SINKS (ValueError)."""
    for cache in caches:
        if not re.fullmatch(r"\d+/\d+", cache):
            raise ValueError(f"caches must be WINDOW/SINKS, such as 16/1, got {cache!r}")


def named(cache: str) -> str:
    """Say WINDOW/SINKS in words."""
    window, sinks = cache.split("/")
    return f"window {window}, sinks {sinks}"


def with_cache(world: World, cache: str) -> World:
    """Give a world a KV cache of WINDOW/SINKS; empty: leave it."""
    if cache:
        window, sinks = map(int, cache.split("/"))
        model = world.model
        changed = replace(model.config.cache, window=window, num_sinks=sinks)
        model.config = replace(model.config, cache=changed)
    return world


def streamed(
    world: World, true: Recorded, config: StreamsConfig, every: int
) -> Float[Tensor, "b m 3 h w"]:
    """Stream as long as was recorded, and return what came out after the context."""
    rollout = Rollout(
        world, with_num_steps(world.sampling, config.num_steps), seed=config.seed, engine="fast"
    )
    first = true.conditions.frames(0, config.context)
    rollout.begin(true.frames[:, : config.context], first)
    actions, made = true.conditions.actions, []
    for index in range(config.context, true.frames.shape[1]):
        now = None if actions is None else actions[:, index]
        if every and (index - config.context + 1) % every == 0:
            # What the stream would have made is measured; what it goes on from is the true frame.
            made.append(rollout.fork().step(now).cpu())
            rollout.observe(true.frames[:, index], now)
        else:
            made.append(rollout.step(now).cpu())
    return torch.stack(made, dim=1)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What parts of streams are compared with, and by what."""

    true: Recorded
    reader: ReadActions | None
    i3d: I3d | None
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Features of the true clips by the first frame of a part; each is compared many times."""

    def part(
        self, frames: Float[Tensor, "b t 3 h w"], actions: Tensor | None, part: slice
    ) -> dict[str, Estimate]:
        """Return the metrics of one part of streams, which were steered by these actions."""
        made, true = frames[:, part], self.true.frames[:, part]
        found = drift_estimates(drift_statistics(made), drift_statistics(true))
        del found["brightness"]
        if self.reader is not None and actions is not None:
            network = self.reader.reader.network
            # From the frame before it on.
            ours = network.features(*pairs(frames[:, part.start - 1 : part.stop]))
            errors = network.errors(ours, actions[:, part].flatten(0, 1))
            read = self.reader.values_of(errors.unflatten(0, made.shape[:2]))
            found |= {name: bootstrap(values.mean(1)) for name, values in read.items()}
            theirs = network.features(*pairs(true))
            found["frechet_own"] = _without_interval(frechet_of_sets(ours, theirs))
        if self.i3d is not None and len(made) * (made.shape[1] // FVD_FRAMES) > 1:
            if part.start not in self.kept:
                self.kept[part.start] = self.i3d.features(short_clips(true))
            ours = self.i3d.features(short_clips(made))
            found["fvd"] = _without_interval(frechet_of_sets(ours, self.kept[part.start]))
        return found


def short_clips(frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "_ 16 3 h w"]:
    """Cut streams into the clips of FVD, one after another; the rest is left out."""
    whole = frames[:, : frames.shape[1] // FVD_FRAMES * FVD_FRAMES]
    return whole.reshape(-1, FVD_FRAMES, *frames.shape[2:])


def _without_interval(value: Tensor) -> Estimate:
    number = value.item()
    return Estimate(mean=number, ci_low=number, ci_high=number)


@torch.no_grad()
def long_streams(config: StreamsConfig) -> list[dict[str, Any]]:
    """Stream with every memory and every repair, and measure the parts; return all rows."""
    source = open_source(config.data, config.split)
    check_fit(load_world(config.run), source.card, config.data)
    length = config.context + config.frames
    true = recorded(source, config.streams, length, config.seed)
    judge = load_inverse_dynamics(config.judge) if config.judge else None
    if judge is not None:
        judge.check_fit(source.card, config.data)
    i3d = cached_i3d("tf-hub", torch.device("cpu")) if config.fvd else None
    reader = ReadActions(Protocol(), judge) if judge else None
    measured = Measured(true=true, reader=reader, i3d=i3d)
    rows = rows_before(config)
    done = {row["baseline"] for row in rows}
    if "recordings" not in done:
        others = recorded(source, config.streams, length, config.seed + 1)
        rows += rows_of(others.frames, others.conditions.actions, config, "recordings", measured)
    for cache in config.caches or ("",):
        for every in config.observe_every:
            world = with_cache(load_world(config.run), cache)
            now = world.model.config.cache
            name = named(f"{now.window}/{now.num_sinks}")
            name += f", observe every {every}" if every else ""
            if name in done:
                continue
            made = streamed(world, true, config, every)
            whole = torch.cat([true.frames[:, : config.context], made], dim=1)
            rows += rows_of(whole, true.conditions.actions, config, name, measured)
            write(config, rows)
            number = len({row["baseline"] for row in rows}) - 1
            draw_frames(config, true, made, number)
            print(f"{name}: {made.shape[1]} frames", flush=True)
    return rows


def draw_frames(config: StreamsConfig, true: Recorded, made: Tensor, number: int) -> None:
    """Show frames of the first streams, evenly spread, each below what was recorded."""
    shown, rows = spread(made.shape[1], NUM_SHOWN), []
    for index in range(min(2, len(made))):
        recorded_frames = true.frames[index, config.context :]
        rows.append(PictureRow(name="recorded", frames=recorded_frames[shown]))
        rows.append(PictureRow(name="stream", frames=made[index, shown]))
    out = Path(config.out)
    write_grid(rows, [f"+{at + 1}" for at in shown], out.with_name(f"{out.stem}-{number}.png"))


def fixed(config: StreamsConfig) -> dict[str, Any]:
    """Return the settings that all rows of a result share."""
    free = ("kind", "out", "caches", "observe_every")
    return {name: value for name, value in to_json(config).items() if name not in free}


def rows_before(config: StreamsConfig) -> list[dict[str, Any]]:
    """Return what was measured before (FileExistsError: with other settings)."""
    out = Path(config.out)
    if not out.exists():
        return []
    found = read_json(out)
    refuse_another(out, "result", differences(found.get("settings", {}), fixed(config)))
    return found["rows"]


def rows_of(
    frames: Float[Tensor, "b t 3 h w"],
    actions: Tensor | None,
    config: StreamsConfig,
    name: str,
    measured: Measured,
) -> list[dict[str, Any]]:
    """Return the rows of one set of streams, at the last frame of each part."""
    rows = []
    for first in range(config.context, frames.shape[1], config.part):
        last = min(first + config.part, frames.shape[1])
        found = measured.part(frames, actions, slice(first, last))
        horizon = last - config.context
        rows += [row_of(metric, one, name) | {"horizon": horizon} for metric, one in found.items()]
    return rows


def write(config: StreamsConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the result and its plot."""
    out = Path(config.out)
    write_json({"rows": rows, "settings": fixed(config)} | provenance(), out)
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    plot_metrics(rows, metrics, out.with_suffix(".png"))


def stream_table(result: Mapping[str, Any]) -> str:
    """Return what is left in some parts, the first and the last among them, by metric."""
    rows = result["rows"]
    metrics, names = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("metric", "baseline")
    )
    lasts = sorted({row["horizon"] for row in rows})
    shown = [lasts[index] for index in spread(len(lasts), NUM_PARTS)]
    values = {(row["metric"], row["baseline"], row["horizon"]): row["mean"] for row in rows}
    lines = []
    for name in names:
        cells = [
            " / ".join(_cell(metric, values.get((metric, name, at))) for at in shown)
            for metric in metrics
        ]
        lines.append([name, *cells])
    frames = " / ".join(map(str, shown))
    return markdown([f"up to frame {frames}", *metrics], lines)


def _cell(metric: str, value: float | None) -> str:
    # A part may be shorter than a clip of FVD.
    return "-" if value is None else f"{value:.0f}" if metric == "fvd" else f"{value:.2f}"


def main(arguments: Sequence[str]) -> int:
    """Stream and measure; return the exit status."""
    try:
        config = tyro.cli(StreamsConfig, args=arguments)
        rows = long_streams(config)
    except (ValueError, OSError) as error:
        print(f"long_streams.py: {error}", file=sys.stderr)
        return 2
    print(stream_table({"rows": rows}))
    print(f"saved {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
