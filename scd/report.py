"""The demo's report: one HTML file that needs nothing else, for light and dark, wide and narrow."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from scd.evaluate import find_row
from scd.results import hardware_line, write_text

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

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #22252a; --soft: #666c75;
  --line: #dcdfe4; --card: #ffffff; --accent: #2f6bbf; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e4e6ea; --soft: #9aa1ab;
  --line: #333840; --card: #1e2126; --accent: #7fb0f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 44rem; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
.warning { border: 1px solid var(--accent); border-radius: .5rem; padding: .6rem .9rem; }
.cards { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem .9rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .92rem; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
thead th { color: var(--soft); font-weight: 600; }
tbody tr { border-top: 1px solid var(--line); }
td small { display: block; color: var(--soft); font-size: .76rem; line-height: 1.2; }
figure { margin: 1rem 0; } video, figure img { width: 100%; height: auto; display: block;
  border-radius: .4rem; }
figure .grid { min-width: 44rem; } figure .two { min-width: 34rem; }
figure .one { max-width: 30rem; } figure .wide { overflow-x: auto; border-radius: .4rem; }
video { image-rendering: pixelated; background: #ccc; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


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
            _origin(result),
        ]
    )
    write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
        path,
    )


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
            "anything. <code>scd demo</code> without <code>--quick</code> takes some minutes.</p>"
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
        f'<figure><video controls autoplay loop muted playsinline src="{_inline(pictures.video)}">'
        "</video><figcaption>From left to right: the truth, the separable model, the dense one. "
        f"The first 8 frames are given; the next {result['frames']} are generated, steered by the "
        "same actions as the truth: they move the white square.</figcaption></figure>"
        f'<figure><div class="wide"><img class="grid" alt="Frames of the truth and of both models" '
        f'src="{_inline(pictures.frames)}"></div></figure>'
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
        + _table(["", *(f"{labels[metric]} +{horizon}" for metric, horizon in columns)], lines)
        + f'<p class="soft">{protocol["num_clips"]} held-out clips, {protocol["context"]} frames '
        "given; +4 is the fourth predicted frame, and that frame alone. PSNR is that of the mean "
        "squared error over clips, in dB; gain is the PSNR above repeating the last given frame. "
        "Below each number its 95 % interval, by resampling clips. A model that heeds its actions "
        "loses when it gets another clip's.</p>"
        + _plot(pictures.quality, "PSNR and gain against the number of predicted frames", "two")
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
        + _table(header, lines)
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
        + _table(["", *(f"{context} frames given" for context in contexts)], lines)
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
        + _table(["", "parameters", "steps", "time", "per step"], lines)
        + _plot(pictures.loss, "Training loss against steps", "one")
    )


def _origin(result: Mapping[str, Any]) -> str:
    entries = {
        "command": f"<code>{escape(result['command'])}</code>",
        "commit": f"<code>{escape(result['commit'])}</code>",
        "hardware": escape(hardware_line(result["hardware"])),
        "settings": f"<code>{escape(json.dumps(result['settings']))}</code>",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries.items())
    return f"<h2>Where the numbers come from</h2><dl>{listed}</dl>"


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:.2f}<small>{row['ci_low']:.2f} .. {row['ci_high']:.2f}</small>"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _plot(files: tuple[Path, Path], text: str, size: str) -> str:
    light, dark = map(_inline, files)
    return (
        '<figure><div class="wide"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="{size}" alt="{escape(text)}" src="{light}"></picture></div></figure>'
    )


def _inline(path: Path) -> str:
    kind = {".png": "image/png", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
