"""What few denoising steps cost in quality and save in time: one result of many evaluations.

    python tools/few_steps.py NAME FOLDER

FOLDER is that of runs/few_steps.sh: for each model and number of steps an evaluation over the
training's length, MODEL-STEPS.json, and one over four times that, MODEL-STEPS-long.json; and
turns.json, the seconds of all of them in turns. It writes docs/results/NAME.json. The first model
is the one that the others are compared with: the teacher at its most steps.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cells import interval, markdown, millions, milliseconds

from scd.common.provenance import command, write_json
from scd.evaluation.metrics import find_row

DOCS = Path(__file__).resolve().parent.parent / "docs"

ORDER = (
    "teacher",
    "teacher_forced",
    "context_noise",
    "regression",
    "consistency",
    "sid",
    "gan",
    "dmd",
)
"""Models, as they stand in the table; others come after them."""

HORIZONS = (1, 4, 8)
"""Predicted frames at which PSNR and SSIM are shown, as far as the evaluation goes."""

SHARED = ("data", "context", "num_clips", "split", "seed", "batch_size", "guidance", "judge")
"""Settings of an evaluation in which all must agree; those of one length also in the horizon."""

MEASURED = ("psnr", "ssim")
DRIFTING = ("psnr", "sharpness", "contrast", "control", "control_error")

Evaluation = Mapping[str, Any]


def gather(evaluations: Mapping[str, tuple[Evaluation, Evaluation]], turns: Any) -> dict[str, Any]:
    """Put evaluations and seconds together.

    Args:
        evaluations: the short and the long one by name, MODEL-STEPS, in the order of the table.
        turns: what benchmarks/turns.py wrote; it timed all of the names.

    Raises:
        ValueError: evaluations that cannot be compared, or names without seconds.
    """
    missing = sorted(set(evaluations) - set(turns["worlds"]))
    if not evaluations or missing:
        raise ValueError(f"needed seconds of {sorted(evaluations)} in one run, missing {missing}")
    for length in (0, 1):
        kinds = {
            json.dumps([one[length]["settings"][key] for key in (*SHARED, "horizon")])
            + str((one[length]["judge"] or {}).get("digest"))
            for one in evaluations.values()
        }
        if len(kinds) > 1:
            raise ValueError(f"the evaluations differ in data, clips, judge or horizon: {kinds}")
    rows = []
    for name, (short, long) in evaluations.items():
        sampling, timed = short["model"]["sampling"], turns["worlds"][name]
        if any(timed["sampling"][key] != sampling[key] for key in ("num_steps", "solver")):
            raise ValueError(f"{name} was timed with other steps than it was measured with")
        quality, base = _quality(short), rows[0]["quality"] if rows else None
        rows.append(
            {
                "name": name.rpartition("-")[0],
                "steps": sampling["num_steps"],
                "solver": sampling["solver"],
                "quality": quality,
                "against_first": _against(quality, base or quality),
                "drift": _drift(long),
                "seconds_per_frame": timed["seconds_per_frame"],
                "time_over_first": timed["time_over_first"],
            }
        )
    first, long = next(iter(evaluations.values()))
    return {
        "rows": rows,
        "horizons": [horizon for horizon in HORIZONS if horizon <= first["settings"]["horizon"]],
        "protocol": {key: first["settings"][key] for key in (*SHARED, "horizon")},
        "long_horizon": long["settings"]["horizon"],
        "judge": first["judge"],
        "timed": turns["timed"],
        "command": command(),
        "commit": first["commit"],
        "hardware": turns["hardware"],
    }


def _quality(evaluation: Evaluation) -> dict[str, Any]:
    """Return PSNR and SSIM by horizon, and what actions are read back, with intervals."""
    last = evaluation["settings"]["horizon"]
    found: dict[str, Any] = {
        metric: {
            str(horizon): _numbers(find_row(evaluation["rows"], metric, horizon))
            for horizon in HORIZONS
            if horizon <= last
        }
        for metric in MEASURED
    }
    for row in evaluation["overall"]:
        if row["metric"] in ("control", "control_error", "frechet_own"):
            found.setdefault(row["metric"], {})[row["baseline"]] = _numbers(row)
    return found


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in ("mean", "ci_low", "ci_high")}


def _against(quality: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Return how far control lies above the first model's, and the ratio of the distances."""
    found = {}
    if "control" in quality:
        found["control"] = quality["control"]["model"]["mean"] - base["control"]["model"]["mean"]
    if "frechet_own" in quality:
        distances = [one["frechet_own"]["model"]["mean"] for one in (quality, base)]
        found["frechet_own"] = distances[0] / max(distances[1], 1e-12)
    return found


def _drift(evaluation: Evaluation) -> list[dict[str, float]]:
    """Return each quarter of the long horizon: means over its frames, and the distance."""
    last, rows = evaluation["settings"]["horizon"], evaluation["rows"]
    parts = []
    for start, stop in ((last * part // 4, last * (part + 1) // 4) for part in range(4)):
        values = {
            metric: [
                row["mean"]
                for row in rows
                if row["metric"] == metric
                and row["baseline"] == "model"
                and start < row["horizon"] <= stop
            ]
            for metric in (*DRIFTING, "frechet_own")
        }
        means = {metric: fmean(found) for metric, found in values.items() if found}
        parts.append({"first": start + 1, "last": stop} | means)
    return parts


def read(folder: Path) -> tuple[dict[str, tuple[Evaluation, Evaluation]], Any]:
    """Read a folder of runs/few_steps.sh, its evaluations in the order of the table.

    Raises:
        FileNotFoundError: no evaluation, or a part of one is missing.
    """
    names = [path.stem for path in folder.glob("*.json")]
    names = [name for name in names if re.fullmatch(r"[a-z_]+-\d+", name)]
    if not names:
        raise FileNotFoundError(f"{folder} holds no evaluation MODEL-STEPS.json")

    def place(name: str) -> tuple[int, str, int]:
        model, _, steps = name.rpartition("-")
        return ORDER.index(model) if model in ORDER else len(ORDER), model, -int(steps)

    def load(name: str) -> Any:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    evaluations = {name: (load(name), load(f"{name}-long")) for name in sorted(names, key=place)}
    return evaluations, load("turns")


def few_steps(results: Mapping[str, Any]) -> str:
    """One row per model and number of steps: quality, control, distance, seconds in turns."""
    lines = [line for result in results.values() for line in result["rows"]]
    horizons = next(iter(results.values()))["horizons"]
    judged = [
        (metric, label)
        for metric, label in (("control", "control"), ("control_error", "control, error"))
        if all(metric in line["quality"] for line in lines)
    ]
    if all("frechet_own" in line["quality"] for line in lines):
        judged.append(("frechet_own", "Frechet, own"))
    rows = []
    for line in lines:
        quality = line["quality"]
        row = [_few_steps_name(line)]
        row += [f"{quality['psnr'][str(horizon)]['mean']:.2f}" for horizon in horizons]
        row += [f"{quality['ssim'][str(horizon)]['mean']:.3f}" for horizon in horizons]
        row += [interval(quality[metric]["model"] | {"metric": metric}) for metric, _ in judged]
        ratio = line["time_over_first"]
        row.append(milliseconds(line["seconds_per_frame"]["total"]["p50"]))
        row.append(f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
        rows.append(row)
    for metric, _ in judged:
        rows += _baselines(lines[0], metric, [one for one, _ in judged], 2 * len(horizons))
    head = ["model, steps", *(f"PSNR +{horizon}" for horizon in horizons)]
    head += [*(f"SSIM +{horizon}" for horizon in horizons), *(label for _, label in judged)]
    return markdown([*head, "ms per frame", "time over the first's"], rows)


def _baselines(
    line: Mapping[str, Any], metric: str, judged: Sequence[str], num_before: int
) -> list[list[str]]:
    """What a number of read actions is to be compared with, a row each; other cells are empty."""
    labels = {
        "truth": "real frames",
        "unsteered": "real frames, actions of another clip",
        "repeat_last": "repeat the last frame",
    }
    rows = []
    for baseline, label in labels.items():
        if baseline in line["quality"][metric]:
            cells = [""] * len(judged)
            cells[judged.index(metric)] = interval(
                line["quality"][metric][baseline] | {"metric": metric}
            )
            rows.append([label, *[""] * num_before, *cells, "", ""])
    return rows


def _few_steps_name(line: Mapping[str, Any]) -> str:
    return f"{line['name']}, {line['steps']}"


def drift(results: Mapping[str, Any]) -> str:
    """One row per model and number of steps: the first and last quarter of a long stream."""
    lines = [line for result in results.values() for line in result["rows"]]
    labels = {
        "psnr": "PSNR",
        "sharpness": "sharpness",
        "contrast": "contrast",
        "control": "control",
        "control_error": "control, error",
        "frechet_own": "Frechet, own",
    }
    shown = [
        metric
        for metric in labels
        if all(metric in part for line in lines for part in line["drift"])
    ]
    rows = [
        [
            _few_steps_name(line),
            *(
                " to ".join(
                    f"{line['drift'][part][metric]:.{2 if metric == 'psnr' else 3}f}"
                    for part in (0, -1)
                )
                for metric in shown
            ),
        ]
        for line in lines
    ]
    parts = [lines[0]["drift"][part] for part in (0, -1)]
    frames = " to ".join(f"+{part['first']}..{part['last']}" for part in parts)
    return markdown([f"model, steps; frames {frames}", *(labels[name] for name in shown)], rows)


def updates(results: Mapping[str, Any]) -> str:
    """One row per teacher: what an update of its student costs, in turns."""
    rows = []
    for result in results.values():
        for name, one in result["worlds"].items():
            ratio = one["time_over_first"]
            rows.append(
                [
                    name,
                    millions(one["parameters"]),
                    f"{one['seconds_per_update']:.2f}",
                    f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
                    f"{one['peak_gib']:.2f}",
                ]
            )
    return markdown(["student", "parameters", "s per update", "over the first's", "GiB"], rows)


def main(arguments: Sequence[str], docs: Path = DOCS) -> int:
    """Gather; return the exit status."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    try:
        result = gather(*read(Path(arguments[1])))
        write_json(result, docs / f"results/{arguments[0]}.json")
    except (ValueError, OSError) as error:
        print(f"few_steps.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
