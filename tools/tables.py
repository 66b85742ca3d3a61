"""Tables of README.md and some pages of docs/, generated from the result files in docs/results/.

    python tools/tables.py            rewrite what stands between the markers
    python tools/tables.py --check    exit with 1 if that would change a page

A marker says what stands below it; the pages show no other measured numbers:

    <!-- table: quality of NAME NAME ..., METRIC at HORIZON HORIZON ... -->
    <!-- table: speed of NAME NAME ... -->
    <!-- table: training of NAME NAME ... -->
    <!-- table: runs of NAME NAME ... -->
    <!-- table: memory of NAME -->
    <!-- table: stream of NAME NAME ... -->
    <!-- table: recording of NAME NAME ... -->
    <!-- table: bench of NAME NAME ... -->
    <!-- table: comparison of NAME NAME ... -->
    <!-- table: pairs of NAME -->
    <!-- table: ablations of NAME -->
    <!-- table: claims of NAME NAME ... -->
    <!-- table: decided of NAME NAME ... -->
    <!-- table: autoencoders of NAME NAME ... -->
    <!-- table: loading of NAME NAME ... -->
    <!-- table: few_steps of NAME NAME ... -->
    <!-- table: drift of NAME NAME ... -->
    <!-- table: updates of NAME NAME ... -->
    <!-- table: played of NAME NAME ... -->
    <!-- table: loads of NAME NAME ... -->
    <!-- table: equal_time of NAME -->
    <!-- table: probes of NAME -->
    <!-- table: intervention of NAME -->
    <!-- table: bias of NAME -->
    <!-- table: checkpoints of NAME -->
    <!-- table: streams of NAME -->
    <!-- table: remembered of NAME -->
    <!-- table: origin of NAME NAME ... -->
    <!-- end of table -->

NAME is a result file without its ending, written by `scd evaluate`, `scd demo` (report.json),
tools/curves.py (runs), tools/pairs.py (pairs), tools/ablations.py (ablations, claims),
tools/decide.py (decided), tools/equal_time.py (equal_time), tools/few_steps.py (few_steps, drift),
tools/probes.py (probes), tools/distances.py (bias), tools/healthy.py (checkpoints),
tools/long_streams.py (streams), tools/remembered.py, `scd train-autoencoder` (held_out.json), `scd
intervene`, the scripts in benchmarks/ (stream, recording, updates, played, loads, loading), `scd
bench` and `scd bench compare`, whose files hold one result per line (.jsonl).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations import ablations
from cells import interval, markdown, millions, milliseconds
from claims import claims, decided
from clips import autoencoders, loading
from distances import bias_table
from equal_time import table as equal_time
from few_steps import drift, few_steps, updates
from healthy import checkpoint_table
from long_streams import stream_table
from probes import probes
from remembered import remembered_table
from served import loads, played

from scd.common.provenance import hardware_line, write_text
from scd.evaluation.metrics import find_row
from scd.evaluation.plots import speed_names
from scd.probing.compare import markdown as intervention

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = (
    DOCS.parent / "README.md",
    *(DOCS / f"{name}.md" for name in ("results", "metrics", "healthy-runs")),
)
RESULTS = DOCS / "results"

MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

UNITS = {"psnr": "dB", "psnr_per_frame": "dB", "psnr_gain": "dB over repeating the last frame"}
"""What stands behind the name of a metric, where its numbers have a unit."""

Result = Mapping[str, Any]


def render(page: str, folder: Path) -> str:
    """Return a page with all its tables made anew.

    Args:
        page: text with markers.
        folder: of the result files.

    Raises:
        FileNotFoundError: a result file is missing.
        ValueError: a marker cannot be read, or a result has no such metric or horizon.
    """
    return MARKED.sub(lambda found: found[1] + table(found[2], folder) + found[3], page)


def table(request: str, folder: Path) -> str:
    """Return the table that a marker asks for; see the module."""
    if found := re.fullmatch(r"quality of ([\w\-. ]+), (\w+) at ([\d ]+)", request):
        horizons = [int(horizon) for horizon in found[3].split()]
        return quality(read_results(found[1], folder), found[2], horizons)
    makers = {
        "speed": speed,
        "training": training,
        "runs": runs,
        "memory": memory,
        "stream": stream,
        "recording": recording,
        "bench": bench,
        "comparison": comparison,
        "pairs": pairs,
        "ablations": ablations,
        "claims": claims,
        "decided": decided,
        "autoencoders": autoencoders,
        "loading": loading,
        "few_steps": few_steps,
        "drift": drift,
        "updates": updates,
        "played": played,
        "loads": loads,
        "equal_time": equal_time,
        "probes": probes,
        "intervention": lambda results: intervention(*results.values()),
        "bias": lambda results: bias_table(*results.values()),
        "checkpoints": lambda results: checkpoint_table(*results.values()),
        "streams": lambda results: stream_table(*results.values()),
        "remembered": lambda results: remembered_table(*results.values()),
        "origin": origin,
    }
    found = re.fullmatch(r"(\w+) of ([\w\-. ]+)", request)
    if found and found[1] in makers:
        return makers[found[1]](read_results(found[2], folder))
    raise ValueError(f"no table is called {request!r}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a result file says about one model."""

    name: str
    """How the model is called in a table."""
    parameters: int
    """Its weights."""
    rows: Sequence[Mapping[str, Any]]
    """metric, horizon, mean, ci_low, ci_high, baseline."""
    seconds: Mapping[str, Mapping[str, float]] | None
    """Seconds per frame by part and statistic; None: not timed."""
    denoising_steps: int
    """Steps per frame."""
    streams: int
    """Frames that each timed step made, side by side."""
    training: Mapping[str, float] | None
    """Steps and seconds of training, where the file knows them."""


def read_results(names: str, folder: Path) -> dict[str, Result]:
    """Read result files by name; the results in one of lines are its "lines"."""
    results = {}
    for name in names.split():
        lines = folder / f"{name}.jsonl"
        if lines.exists():
            results[name] = {"lines": [json.loads(line) for line in lines.open(encoding="utf-8")]}
        else:
            results[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return results


def models(results: Mapping[str, Result]) -> list[Measured]:
    """List the models of some results: one of an evaluation, all of a demo."""
    found = []
    for name, result in results.items():
        if "models" not in result:
            found.append(
                Measured(
                    name=name,
                    parameters=result["model"]["parameters"],
                    rows=result["rows"],
                    seconds=result["seconds_per_frame"],
                    denoising_steps=result["model"]["sampling"]["num_steps"],
                    streams=min(result["settings"]["batch_size"], result["settings"]["num_clips"]),
                    training=None,
                )
            )
            continue
        for kind, model in result["models"].items():
            found.append(
                Measured(
                    name=kind.replace("_", " "),
                    parameters=model["parameters"],
                    rows=result["quality"][kind]["rows"],
                    seconds=result["timing"].get(kind),
                    denoising_steps=model["denoising_steps"],
                    streams=1,
                    training={"steps": model["steps"], "seconds": model["train_seconds"]},
                )
            )
    return found


def quality(results: Mapping[str, Result], metric: str, horizons: Sequence[int]) -> str:
    """One row per model and baseline: a metric by horizon, with its 95 % interval over clips."""
    rows, still = [], []
    for model in models(results):
        measured = {row["baseline"] for row in model.rows if row["metric"] == metric}
        if "model" not in measured:
            raise ValueError(f"{model.name} was not measured by {metric}")
        for baseline, label in (
            ("model", model.name),
            ("shuffled_actions", f"{model.name}, actions of another clip"),
            ("repeat_last", "repeat the last frame"),
        ):
            if baseline not in measured:
                continue
            found = [find_row(model.rows, metric, horizon, baseline) for horizon in horizons]
            row = [label, *map(interval, found)]
            if baseline != "repeat_last":
                rows.append(row)
            elif row not in still:
                # The same for every model, as long as they were shown the same clips.
                still.append(row)
    rows += still
    unit = f", {UNITS[metric]}" if metric in UNITS else ""
    head = [f"{metric}{unit}", *(f"frame +{horizon}" for horizon in horizons)]
    return markdown(head, rows)


def speed(results: Mapping[str, Result]) -> str:
    """One row per timed model: its size, and milliseconds per frame by part."""
    rows = []
    for model in models(results):
        if model.seconds is not None:
            parts = [f"{1000 * model.seconds[part]['p50']:.1f}" for part in ("encoder", "decoder")]
            total = [f"{1000 * model.seconds['total'][which]:.1f}" for which in ("p50", "p99")]
            size = [millions(model.parameters), str(model.denoising_steps), str(model.streams)]
            rows.append([model.name, *size, *parts, *total])
    head = ["ms per frame", "parameters", "steps", "streams"]
    return markdown([*head, "causal pass, p50", "all steps, p50", "total, p50", "total, p99"], rows)


def training(results: Mapping[str, Result]) -> str:
    """One row per model: its size, and the steps and seconds it was trained."""
    rows = [
        [
            model.name,
            millions(model.parameters),
            f"{model.training['steps']:.0f}",
            f"{model.training['seconds']:.0f}",
            f"{model.training['steps'] / model.training['seconds']:.2f}",
        ]
        for model in models(results)
        if model.training is not None
    ]
    return markdown(["model", "parameters", "training steps", "seconds", "steps/s"], rows)


def runs(results: Mapping[str, Result]) -> str:
    """One row per training run: what it took and where its loss ended."""
    rows = [
        [
            result["run"],
            millions(result["parameters"]),
            str(result["steps"]),
            f"{result['seconds'] / 60:.0f}",
            f"{result['memory_gib']:.1f}",
            *(f"{result['curves'][which]['loss'][-1]:.3f}" for which in ("training", "held out")),
        ]
        for result in results.values()
    ]
    head = ["run", "parameters", "steps", "minutes", "peak GiB", "last training loss", "held out"]
    return markdown(head, rows)


def memory(results: Mapping[str, Result]) -> str:
    """One row per model of a demo: the memory score by frames of context."""
    (result,) = results.values()
    measured = result["memory"]["rows"]
    contexts = sorted({row["context"] for row in measured})
    rows = [
        [
            name.replace("_", " "),
            *(
                interval(row)
                for context in contexts
                for row in measured
                if (row["baseline"], row["context"]) == (name, context)
            ),
        ]
        for name in dict.fromkeys(row["baseline"] for row in measured)
    ]
    events = f"share of {result['memory']['events']} hidden shapes that come back"
    return markdown([events, *(f"context {context}" for context in contexts)], rows)


def stream(results: Mapping[str, Result]) -> str:
    """One row per long stream: whether memory and seconds per frame stayed the same."""
    rows = [
        [
            f"`{name}`",
            str(result["frames"]),
            str(result["window"]),
            f"{1000 * result['seconds_per_frame']['total']['p50']:.1f}",
            f"{1000 * result['seconds_per_frame']['total']['p99']:.1f}",
            f"{100 * result['memory_growth']:+.1f} %",
            f"{100 * result['time_growth']:+.1f} %",
        ]
        for name, result in results.items()
    ]
    head = [
        "stream",
        "frames",
        "window",
        "ms per frame, p50",
        "p99",
        "memory growth",
        "time growth",
    ]
    return markdown(head, rows)


def recording(results: Mapping[str, Result]) -> str:
    """One row per recording: frames per second, files included."""
    rows = [
        [
            f"{result['scenario']}, {result['size']}x{result['size']}",
            str(result["frames"]),
            f"{result['seconds']:.1f}",
            f"{result['frames_per_second']:.0f}",
        ]
        for result in results.values()
    ]
    return markdown(["recording", "frames", "seconds", "frames/s"], rows)


def bench(results: Mapping[str, Result]) -> str:
    """One row per timed configuration: its parts, its rates, its memory, its share of the limit."""
    lines = [line for result in results.values() for line in result["lines"]]
    rows = [
        [
            f"{name}, context {line['context']}, {line['steps']} steps",
            milliseconds(line["seconds_per_frame_median"]),
            milliseconds(line["p99_s"]),
            milliseconds(line["encoder_s"]),
            milliseconds(line["decoder_step_s"]),
            milliseconds(line["autoencoder_s"]),
            f"{line['frames_per_s_denoise']:.3g}",
            f"{line['frames_per_s_end_to_end']:.3g}",
            milliseconds(line["first_frame_s"]),
            f"{line['peak_memory_bytes'] / 2**30:.2f}",
            f"{line['peak_memory_bytes'] / line['memory_needed_bytes'] - 1:+.0%}",
            f"{line['fraction_of_limit']:.2f}",
        ]
        for name, line in zip(speed_names(lines), lines, strict=True)
    ]
    head = ["ms per step of all streams", "p50", "p99", "encoder", "decoder step", "autoencoder"]
    head += ["frames/s, denoising only", "end to end", "first frame, ms", "peak GiB"]
    return markdown([*head, "over weights and caches", "share of the limit"], rows)


def comparison(results: Mapping[str, Result]) -> str:
    """One row per comparison in turns: both sides, and how many times as long A takes as B."""
    lines = [line for result in results.values() for line in result["lines"]]
    sides = [line[side] | {"device": line["device"]} for line in lines for side in ("a", "b")]
    names = speed_names(sides)
    rows = []
    for index, line in enumerate(lines):
        a, b = line["a"], line["b"]
        settings = [
            f"{key} {a[key]}" if a[key] == b[key] else f"{key} {a[key]} against {b[key]}"
            for key in ("context", "steps")
        ]
        rows.append(
            [
                f"{names[2 * index]} / {names[2 * index + 1]}; {', '.join(settings)}",
                f"{line['ratio_a_over_b']:.2f} [{line['ratio_low']:.2f}, {line['ratio_high']:.2f}]",
                *(milliseconds(side["seconds_per_frame_median"]) for side in (a, b)),
                *(f"{side['fraction_of_limit']:.2f}" for side in (a, b)),
            ]
        )
    head = ["A / B", "time of A over B", "A, ms per frame", "B, ms per frame"]
    return markdown([*head, "A, share of the limit", "B, share of the limit"], rows)


def pairs(results: Mapping[str, Result]) -> str:
    """One row per metric and horizon: two kinds over seeds, and their difference."""
    (result,) = results.values()
    kinds = result["kinds"]
    rows = [
        [
            f"{row['metric']}, frame +{row['horizon']}",
            *(f"{row['means'][kind]:.3f} (std {row['deviations'][kind]:.3f})" for kind in kinds),
            f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]",
        ]
        for row in result["rows"]
        if row["horizon"] in (1, 4, 8) and row["metric"] in ("psnr_gain", "ssim")
    ]
    head = [f"mean over {len(result['seeds'])} seeds", *(kind.replace("_", " ") for kind in kinds)]
    return markdown([*head, "difference"], rows)


def origin(results: Mapping[str, Result]) -> str:
    """One row per result and command: what made it, its commit and its hardware."""
    rows = [
        [
            f"`{name}`",
            f"`{line['command']}`",
            f"`{line['commit'][:10]}`",
            hardware_line(line["hardware"]),
        ]
        for name, result in results.items()
        for line in result.get("lines", [result])
    ]
    # The lines of a file that one command wrote have one origin.
    distinct = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    return markdown(["result", "command", "commit", "hardware"], distinct)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the pages, or only check them; return the exit status."""
    if list(arguments) not in ([], ["--check"]):
        print(__doc__)
        return 2
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        made = render(page, RESULTS)
        if made != page:
            stale.append(path.name)
            if not arguments:
                write_text(made, path)
    if stale and arguments:
        print(f"{', '.join(stale)}: not as the result files say; run python tools/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
