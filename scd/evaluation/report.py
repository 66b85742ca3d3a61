"""A page of an evaluation by protocol: numbers, every setting, and clips to look at as videos."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.evaluation.html import inline, interval, write_page
from scd.evaluation.image import HIGHER_IS_BETTER
from scd.evaluation.media import write_video
from scd.evaluation.metrics import AgainstTruth
from scd.evaluation.protocols import ABOUT
from scd.evaluation.trial import Measurement, Trial, Unit

GAP = 2
"""Columns between truth and prediction."""

RANKS = ("best", "median", "worst")
"""Clips that are shown."""

NOT_CLAIMED = (
    "That FVD or LPIPS of other weights, another network or other frames can be compared: the "
    "hashes above say which files were used.",
    "That a distance between few clips is that between many: Frechet distances fall as clips are "
    "added. Compare at equal clips.",
    "That a higher PSNR looks better: it rewards blur.",
)
"""Shown at the end of the page."""


def write_report(result: Mapping[str, Any], trial: Trial, found: Measurement, path: Path) -> None:
    """Write the page; the clips on it are rolled out once more."""
    changes = [f"{change} (protocol, here)" for change in result["changed"]]
    changes += [f"without {name}: {reason}" for name, reason in result["left_out"].items()]
    if result["short_episodes"]:
        changes.append(f"{len(result['short_episodes'])} episodes were too short and left out")
    rows = {(row["metric"], row["baseline"]): row for row in result["overall"]}
    baselines = list(dict.fromkeys(baseline for _, baseline in rows))
    settings = {
        name: value
        for name, value in result["about"]["protocol"].items()
        if name not in ("kind", "name")
    }
    settings |= {f"SHA-256 of {name}": digest for name, digest in result["weights"].items()}
    if result["judge"] is not None:
        settings["judge"] = result["judge"]["digest"]
    write_page(
        "evaluation/report.html",
        path,
        title=f"{result['protocol']}: {result['settings']['run']}",
        result=result,
        not_claimed=NOT_CLAIMED,
        about=ABOUT[result["protocol"]],
        changes=changes,
        header=["", *baselines],
        lines=[
            [
                metric,
                *(
                    interval(rows[metric, baseline], 4) if (metric, baseline) in rows else ""
                    for baseline in baselines
                ),
            ]
            for metric in dict.fromkeys(metric for metric, _ in rows)
        ],
        videos=_videos(trial, found),
        settings=list(settings.items()),
    )


def _videos(trial: Trial, found: Measurement) -> list[tuple[str, str]]:
    """Return addresses and captions; of clips from nothing none is better than another."""
    if trial.protocol.from_nothing:
        text = "Left a clip of the data, right one of the model's, made from nothing: not a pair."
        shown = range(min(len(RANKS), len(trial.windows)))
        return [(_address(clip_beside_truth(trial, clip, 0), trial), text) for clip in shown]
    ranking = AgainstTruth(trial.protocol).ranking(found.numbers[AgainstTruth.kind])
    metric, numbers, trajectories = ranking
    order = numbers.argsort(descending=metric in HIGHER_IS_BETTER).tolist()
    videos = []
    for rank, clip in zip(RANKS, (order[0], order[len(order) // 2], order[-1]), strict=True):
        trajectory = int(trajectories[clip])
        episode, start = trial.windows[clip]
        text = (
            f"{rank} of {len(order)} clips by {metric} ({numbers[clip].item():.3f}): episode "
            f"{episode} from frame {start}, trajectory {trajectory}. Left the truth, right the "
            f"model; the first {trial.protocol.context} frames are given."
        )
        videos.append((_address(clip_beside_truth(trial, clip, trajectory), trial), text))
    return videos


def clip_beside_truth(trial: Trial, clip: int, trajectory: int) -> Float[Tensor, "t 3 h w2"]:
    """Roll a clip's batch out again and return the clip with its truth at the left."""
    size = trial.protocol.batch_size
    rolled = trial.roll_out(Unit(clip // size, trajectory))
    true = rolled.batch.frames[clip % size]
    made = torch.cat([true[: trial.protocol.context], rolled.frames[clip % size].to(true)])
    gap = torch.zeros(*true.shape[:3], GAP)
    return torch.cat([true, gap, made], dim=-1)


def _address(frames: Tensor, trial: Trial) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(frames, file, trial.source.card.fps)
        return inline(file)
