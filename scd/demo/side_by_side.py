"""Several worlds on the same clips: memory, speed in turns, and pictures to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.threads import ThreadChoice
from scd.data.clip import Batch
from scd.data.toy import ToyWorld
from scd.evaluation.grids import GAP, PictureRow, write_grid
from scd.evaluation.media import Ink, write_video
from scd.evaluation.memory import count_batch, find_memory_clips, memory_score
from scd.evaluation.metrics import row_of
from scd.evaluation.predict import step_in_turns
from scd.evaluation.protocols import Protocol
from scd.models.checkpoint import World
from scd.streaming.rollout import Rollout, Timing

MEMORY_CONTEXTS = (4, 8, 16)
"""Given frames with which the memory score is measured; all on the same events."""

SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Horizons of the picture, as far as the stream goes."""

NUM_GIVEN, NUM_STREAMED = 8, 64
"""Frames of the stream that both models make in turns: given, and generated."""

NUM_WARM_UP = 8
"""First generated frames that are not timed: until then the memory of 16 frames still fills."""


def measure_memory(
    worlds: Mapping[str, World],
    source: ToyWorld,
    protocol: Protocol,
    threads: ThreadChoice | None = None,
) -> dict[str, Any]:
    """Measure the memory score of each world for several contexts, all on the same events."""
    assert protocol.num_clips is not None
    clips = find_memory_clips(source, protocol.num_clips, max(MEMORY_CONTEXTS), protocol.horizon)
    rows = []
    repeated: dict[str, Any] = {}
    for context in MEMORY_CONTEXTS:
        here = replace(protocol, context=context)
        for name, world in worlds.items():
            batches = [
                count_batch(world, clips, here, at, threads=threads)
                for at in range(len(here.batches()))
            ]
            made, last = (
                memory_score(torch.cat([batch[baseline] for batch in batches]), protocol.seed)
                for baseline in ("model", "repeat_last")
            )
            rows.append(row_of("memory", made, name) | {"context": context})
            repeated = row_of("memory", last, "repeat_last")
        # The last given frame is the same for every context.
        rows.append(repeated | {"context": context})
    return {
        "rows": rows,
        "events": sum(map(len, clips.events)),
        "clips": protocol.num_clips,
        "horizon": protocol.horizon,
    }


def stream_in_turns(
    worlds: Mapping[str, World], batch: Batch, seed: int
) -> tuple[dict[str, Float[Tensor, "m 3 h w"]], dict[str, list[Timing]]]:
    """Stream one clip from each world, one frame of each in turn."""
    rollouts = {name: Rollout(world, seed=seed) for name, world in worlds.items()}
    for rollout in rollouts.values():
        rollout.begin(batch.frames[:, :NUM_GIVEN], batch.conditions.frames(0, NUM_GIVEN))
    assert batch.conditions.actions is not None
    return step_in_turns(rollouts, batch.conditions.actions[:, NUM_GIVEN:].unbind(1))


def write_stream(
    true: Float[Tensor, "t 3 h w"],
    frames: Mapping[str, Float[Tensor, "_ 3 h w"]],
    num_given: int,
    horizons: Sequence[int],
    fps: float,
    out: Path,
) -> Callable[[Path, Ink], None]:
    """Write rollout.mp4, truth and streams side by side, and frames.png, one above the other.

    Args:
        true: given frames, and what followed.
        frames: what each stream made after the given frames.
        num_given: given frames.
        horizons: predicted frames of the picture, from 1, as far as the shortest stream goes.
        fps: of the video.
        out: folder.

    Returns:
        Draws the picture for another ground than white.
    """
    length = min(len(true), *(num_given + len(made) for made in frames.values()))
    rows = {"truth": true[:length]} | {
        name: torch.cat([true[:num_given], made])[:length] for name, made in frames.items()
    }
    gap = torch.full((length, 3, true.shape[2], GAP // 2), 0.0)
    strips = [part for row in rows.values() for part in (row, gap)][:-1]
    write_video(torch.cat(strips, dim=3), out / "rollout.mp4", fps)
    shown = [horizon for horizon in horizons if num_given + horizon <= length]
    chosen = [num_given - 1 + horizon for horizon in (0, *shown)]
    pictures = [PictureRow(name=name, frames=row[chosen]) for name, row in rows.items()]
    draw = partial(write_grid, pictures, ["given", *(f"+{horizon}" for horizon in shown)])
    draw(out / "frames.png")
    return draw
