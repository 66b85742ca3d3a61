"""A page of an evaluation by protocol: numbers, every setting, and clips to look at as videos."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.provenance import write_text
from scd.evaluation.html import inline, origin, page_of, table
from scd.evaluation.media import write_video
from scd.evaluation.protocols import ABOUT
from scd.evaluation.rows import HIGHER_IS_BETTER, Gathered, ranking
from scd.evaluation.trajectories import Trial, Unit

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


def write_page(result: Mapping[str, Any], trial: Trial, gathered: Gathered, path: Path) -> None:
    """Write the page; the clips on it are rolled out once more.

    Args:
        result: of the evaluation.
        trial: what made it.
        gathered: its numbers by clip.
        path: an .html file, replaced if it exists.
    """
    title = f"{result['protocol']}: {result['settings']['run']}"
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(ABOUT[result['protocol']])}. Data: {escape(result['settings']['data'])}."
            f"</p>{_changes(result)}",
            _numbers(result),
            _videos(trial, gathered),
            _settings(result),
            "<h2>What this does not claim</h2>",
            "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in NOT_CLAIMED) + "</ul>",
            origin(result),
        ]
    )
    write_text(page_of(title, body), path)


def _changes(result: Mapping[str, Any]) -> str:
    changes = [f"{change} (protocol, here)" for change in result["changed"]] + [
        f"without {name}: {reason}" for name, reason in result["left_out"].items()
    ]
    if result["short_episodes"]:
        changes.append(f"{len(result['short_episodes'])} episodes were too short and left out")
    if not changes:
        return "<p>The protocol as it is, nothing changed.</p>"
    listed = "".join(f"<li>{escape(change)}</li>" for change in changes)
    return f'<div class="warning">Not the protocol as it is:<ul>{listed}</ul></div>'


def _numbers(result: Mapping[str, Any]) -> str:
    rows = result["overall"]
    baselines = list(dict.fromkeys(row["baseline"] for row in rows))
    cells = {(row["metric"], row["baseline"]): row for row in rows}
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        line = [escape(metric)]
        for baseline in baselines:
            row = cells.get((metric, baseline))
            line.append(
                ""
                if row is None
                else f"{row['mean']:.4f}<small>{row['ci_low']:.4f} .. {row['ci_high']:.4f}</small>"
            )
        lines.append(line)
    settings = result["settings"]["protocol"]
    return (
        "<h2>All predicted frames</h2>"
        + table(["", *baselines], lines)
        + f'<p class="soft">{settings["num_clips"]} clips, {settings["context"]} frames given, '
        f"{settings['horizon']} predicted, {settings['num_trajectories']} trajectories each: "
        f"{settings['trajectories']}. Below each number its 95 % interval, by resampling clips. "
        "Numbers by frame and by clip are in the JSON file beside this page.</p>"
    )


def _settings(result: Mapping[str, Any]) -> str:
    entries = {
        name: value
        for name, value in result["settings"]["protocol"].items()
        if name not in ("kind", "name")
    }
    entries |= {f"SHA-256 of {name}": digest for name, digest in result["weights"].items()}
    if result["judge"] is not None:
        entries["judge"] = result["judge"]["digest"]
    lines = [[escape(name), escape(str(value))] for name, value in entries.items()]
    return "<h2>Every setting of the protocol</h2>" + table(["", ""], lines)


def _videos(trial: Trial, gathered: Gathered) -> str:
    if trial.protocol.from_nothing:
        return _unranked(trial)
    metric, numbers, trajectories = ranking(gathered, trial.protocol)
    order = numbers.argsort(descending=metric in HIGHER_IS_BETTER).tolist()
    chosen = dict(zip(RANKS, (order[0], order[len(order) // 2], order[-1]), strict=True))
    figures = []
    for rank, clip in chosen.items():
        frames = clip_beside_truth(trial, clip, int(trajectories[clip]))
        episode, start = trial.windows[clip]
        text = (
            f"{rank} of {len(order)} clips by {metric} ({numbers[clip].item():.3f}): episode "
            f"{episode} from frame {start}, trajectory {int(trajectories[clip])}. Left the truth, "
            f"right the model; the first {trial.protocol.context} frames are given."
        )
        figures.append(_figure(frames, trial, text))
    return "<h2>Best, median and worst clip</h2>" + "".join(figures)


def _unranked(trial: Trial) -> str:
    """Show some clips of a protocol that gives no frame: none of them is better than another."""
    shown = range(min(len(RANKS), len(trial.windows)))
    text = "Left a clip of the data, right one of the model's, made from nothing: not a pair."
    figures = (_figure(clip_beside_truth(trial, clip, 0), trial, text) for clip in shown)
    return "<h2>Some clips</h2>" + "".join(figures)


def _figure(frames: Tensor, trial: Trial, text: str) -> str:
    return (
        f'<figure><video controls loop muted playsinline src="{_video(frames, trial)}">'
        f"</video><figcaption>{escape(text)}</figcaption></figure>"
    )


def clip_beside_truth(trial: Trial, clip: int, trajectory: int) -> Float[Tensor, "t 3 h w2"]:
    """Roll a clip's batch out again and return the clip with its truth at the left."""
    size = trial.rolled.batch_size
    rolled = trial.roll_out(Unit(clip // size, trajectory))
    true = rolled.batch.frames[clip % size]
    made = torch.cat([true[: trial.protocol.context], rolled.frames[clip % size].to(true)])
    gap = torch.ones(*true.shape[:3], GAP)
    return torch.cat([true, gap, made], dim=-1)


def _video(frames: Tensor, trial: Trial) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(frames, file, trial.source.card.fps)
        return inline(file)
