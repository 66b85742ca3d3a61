"""The demo's report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from scd.common.provenance import write_text
from scd.evaluation.html import inline, origin, page_of, show_plot, table
from scd.evaluation.measure import find_row

NAMES = {
    "repeat_last": "repeat the last frame",
    "separable": "separable",
    "shuffled_actions": "separable, steered by another clip's actions",
    "dense": "dense, as many steps",
    "dense_equal_time": "dense, as many seconds of training",
}
"""What the curves and rows are called."""

NOT_CLAIMED = (
    "That these models are good: they were trained for minutes on a toy world of 32x32 pixels. The "
    "paper's have a hundred times as many parameters.",
    "That one way of building a model gives better pictures: this is one seed. The intervals say "
    "how the numbers vary over clips, not over trainings.",
    "That the ratio of seconds per frame holds elsewhere: it depends on layers, frame size, number "
    "of denoising steps, batch size and hardware. Here it is one stream at a time, without an "
    "autoencoder, and neither model is compiled.",
    "That a higher PSNR looks better: it rewards blur. Look at the pictures too.",
    "That the memory score is precise: it counts a few dozen events, as its interval shows.",
)
"""Shown at the end of the report."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Files that go into the report; of each plot one for light and one for dark pages."""

    quality: tuple[Path, Path]
    """PSNR against the horizon."""
    loss: tuple[Path, Path]
    """Training losses."""
    video: Path
    """The streams side by side, MP4."""
    frames: Path
    """Some frames of the streams, PNG."""


def quality_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one curve per model and baseline, named as in NAMES, from a demo's result."""
    quality = result["quality"]
    rows = [row for row in quality["separable"]["rows"] if row["baseline"] != "model"]
    for name in ("separable", "dense", "dense_equal_time"):
        rows += [
            row | {"baseline": name} for row in quality[name]["rows"] if row["baseline"] == "model"
        ]
    return [row for name in NAMES for row in rows if row["baseline"] == name]


def write_report(result: Mapping[str, Any], pictures: Pictures, path: Path) -> None:
    """Write the report of a demo's result."""
    title = "Separable and dense causal diffusion, side by side"
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            _summary(result),
            _streams(result, pictures),
            _quality(result, pictures),
            _speed(result),
            _memory(result),
            _training(result, pictures),
            "<h2>What this does not claim</h2>",
            "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in NOT_CLAIMED) + "</ul>",
            origin(result),
        ]
    )
    write_text(page_of(title, body), path)


def _summary(result: Mapping[str, Any]) -> str:
    seconds = result["seconds_per_frame"]
    cards = [
        (f"{result[f'psnr_gain_db_h{horizon}']:+.2f} dB", f"PSNR above repeating the last frame, "
         f"{horizon} frame{'s' if horizon > 1 else ''} ahead")
        for horizon in (1, 4, 8)
    ]  # fmt: skip
    cards += [
        (f"{seconds['separable'] * 1e3:.1f} ms", "per frame, separable"),
        (f"{seconds['dense'] * 1e3:.1f} ms", "per frame, dense"),
        (f"{result['ratio_dense_over_separable']:.2f}x", "dense over separable"),
    ]
    shown = "".join(
        f'<div class="card"><b>{value}</b><span>{escape(text)}</span></div>'
        for value, text in cards
    )
    models = result["models"]
    quick = ""
    if result["settings"]["quick"]:
        quick = (
            '<p class="warning">A quick run: trained far too little for its numbers to mean '
            "anything. <code>scd demo --train</code> without <code>--quick</code> takes some "
            "minutes.</p>"
        )
    return (
        f"{quick}<p>A small world was learnt twice, by a <em>separable</em> model, which reads the "
        "past once per frame and then renders in "
        f"{models['separable']['denoising_steps']} cheap denoising steps, and by a <em>dense</em> "
        "one of about the same size, which reads it again in every step. Training three models "
        f"took {result['stages_s']['training'] / 60:.1f} minutes, interruptions not counted; with "
        f"measuring and streaming it were {result['total_s'] / 60:.1f}.</p>"
        f'<div class="cards">{shown}</div>'
    )


def _streams(result: Mapping[str, Any], pictures: Pictures) -> str:
    return (
        "<h2>The streams</h2>"
        f'<figure><video controls autoplay loop muted playsinline src="{inline(pictures.video)}">'
        "</video><figcaption>From left to right: the truth, the separable model, the dense one. "
        f"The first 8 frames are given; the next {result['frames']} are generated, steered by the "
        "same actions as the truth: they move the white square.</figcaption></figure>"
        f'<figure><div class="wide"><img class="grid" alt="Frames of the truth and of both models" '
        f'src="{inline(pictures.frames)}"></div></figure>'
    )


def _quality(result: Mapping[str, Any], pictures: Pictures) -> str:
    rows = quality_rows(result)
    columns = [
        (metric, horizon) for metric in ("psnr", "psnr_gain", "ssim") for horizon in (1, 4, 8)
    ]
    labels = {"psnr": "PSNR", "psnr_gain": "gain", "ssim": "SSIM"}
    lines = []
    for name, text in NAMES.items():
        cells = [escape(text)]
        for metric, horizon in columns:
            if metric == "psnr_gain" and name == "repeat_last":
                cells.append("0")
            else:
                cells.append(_interval(find_row(rows, metric, horizon, name)))
        lines.append(cells)
    protocol = result["settings"]["protocol"]
    return (
        "<h2>Quality</h2>"
        + table(["", *(f"{labels[metric]} +{horizon}" for metric, horizon in columns)], lines)
        + f'<p class="soft">{protocol["num_clips"]} held-out clips, {protocol["context"]} frames '
        "given; +4 is the fourth predicted frame, and that frame alone. PSNR is that of the mean "
        "squared error over clips, in dB; gain is the PSNR above repeating the last given frame. "
        "Below each number its 95 % interval, by resampling clips. A model that heeds its actions "
        "loses when it gets another clip's.</p>"
        + show_plot(pictures.quality, "PSNR and gain against the number of predicted frames", "two")
    )


def _speed(result: Mapping[str, Any]) -> str:
    lines = []
    for name, parts in result["timing"].items():
        cells = [f"{parts[part]['mean'] * 1e3:.2f}" for part in ("encoder", "decoder", "total")]
        total = parts["total"]
        cells += [f"{total[at] * 1e3:.2f}" for at in ("p50", "p99")]
        lines.append([escape(name), *cells, f"{1 / total['mean']:.1f}"])
    header = ["ms per frame", "once per frame", "denoising", "total", "p50", "p99", "frames / s"]
    return (
        "<h2>Speed</h2>"
        + table(header, lines)
        + f'<p class="soft">{escape(result["timed"])}; {result["timed_frames"]} frames.</p>'
    )


def _memory(result: Mapping[str, Any]) -> str:
    memory = result["memory"]
    contexts = sorted({row["context"] for row in memory["rows"]})
    lines = []
    for name in dict.fromkeys(row["baseline"] for row in memory["rows"]):
        scores = {row["context"]: row for row in memory["rows"] if row["baseline"] == name}
        shown = [_interval(scores[context]) for context in contexts]
        lines.append([escape(NAMES[name].partition(",")[0]), *shown])
    return (
        "<h2>Memory</h2>"
        + table(["", *(f"{context} frames given" for context in contexts)], lines)
        + f'<p class="soft">The share of shapes behind the occluder that come back with the right '
        f"colour within 3 pixels: {memory['events']} shapes in {memory['clips']} clips, all seen "
        f"among the last {max(contexts)} frames before the prediction and back in view within "
        f"{memory['horizon']} predicted frames. The events are the same in all columns; with few "
        "frames given some of these shapes were never seen.</p>"
    )


def _training(result: Mapping[str, Any], pictures: Pictures) -> str:
    lines = [
        [
            escape(NAMES[name]),
            f"{model['parameters'] / 1e6:.2f} M",
            f"{model['steps']}",
            f"{model['train_seconds']:.0f} s",
            f"{model['train_seconds'] / model['steps'] * 1e3:.0f} ms",
        ]
        for name, model in result["models"].items()
    ]
    return (
        "<h2>Training</h2>"
        + table(["", "parameters", "steps", "time", "per step"], lines)
        + show_plot(pictures.loss, "Training loss against steps", "one")
    )


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:.2f}<small>{row['ci_low']:.2f} .. {row['ci_high']:.2f}</small>"
