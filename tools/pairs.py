"""Two kinds of a model trained from the same seeds: does one predict better than the other?

    python tools/pairs.py NAME A B EVALUATION ...

EVALUATION files are those of `scd evaluate`, called A-SEED.json and B-SEED.json, each pair trained
from the same seed and measured on the same clips. It writes docs/results/NAME.json: means of each
kind over seeds, and the mean difference A - B with its 95 % interval over seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from scd.common.provenance import command, write_json

DOCS = Path(__file__).resolve().parent.parent / "docs"

METRICS = ("psnr_gain", "psnr", "ssim", "lpips", "fvd")
"""What is compared, as far as it was measured."""

QUANTILES = {num: float(t.ppf(0.975, num - 1)) for num in range(2, 31)}
"""Of Student's distribution at 97.5 %, by number of seeds."""


def compare(
    kinds: tuple[str, str],
    evaluations: Mapping[tuple[str, str], Any],
    free: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare two kinds seed by seed.

    Args:
        kinds: A and B.
        evaluations: the evaluation of each (kind, seed).
        free: settings of the evaluation in which the kinds may differ.

    Raises:
        ValueError: a seed of one kind has no partner, there are too few or too many, or the two
            were measured differently.
    """
    seeds = sorted({seed for _, seed in evaluations})
    lonely = [seed for seed in seeds if any((kind, seed) not in evaluations for kind in kinds)]
    if lonely or len(seeds) not in QUANTILES:
        raise ValueError(
            f"needed {min(QUANTILES)} to {max(QUANTILES)} seeds, each with {kinds[0]} and "
            f"{kinds[1]}; got {seeds}, without a partner {lonely}"
        )
    measured = {json.dumps(_protocol(one, free), sort_keys=True) for one in evaluations.values()}
    if len(measured) != 1:
        raise ValueError("the evaluations differ in data, clips, horizon, steps or seed")
    values: dict[tuple[str, int], dict[str, list[float]]] = {}
    for kind in kinds:
        for seed in seeds:
            for row in evaluations[kind, seed]["rows"]:
                if row["baseline"] == "model" and row["metric"] in METRICS:
                    place = values.setdefault((row["metric"], row["horizon"]), {})
                    place.setdefault(kind, []).append(row["mean"])
    first = evaluations[kinds[0], seeds[0]]
    return {
        "kinds": list(kinds),
        "seeds": seeds,
        "rows": [
            {"metric": metric, "horizon": horizon} | _difference(kinds, by_kind)
            for (metric, horizon), by_kind in values.items()
        ],
        "protocol": _protocol(first, free),
        "settings": {kind: evaluations[kind, seeds[0]]["model"] for kind in kinds},
        "command": command(),
    } | {key: first[key] for key in ("commit", "hardware")}


def _protocol(evaluation: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
    skipped = ("run", "out", *free)
    return {key: value for key, value in evaluation["settings"].items() if key not in skipped}


def _difference(kinds: tuple[str, str], by_kind: Mapping[str, list[float]]) -> dict[str, Any]:
    differences = [a - b for a, b in zip(by_kind[kinds[0]], by_kind[kinds[1]], strict=True)]
    half = QUANTILES[len(differences)] * stdev(differences) / len(differences) ** 0.5
    mean = fmean(differences)
    return {
        "means": {kind: fmean(by_kind[kind]) for kind in kinds},
        "values": {kind: list(by_kind[kind]) for kind in kinds},
        "deviations": {kind: stdev(by_kind[kind]) for kind in kinds},
        "difference": mean,
        "ci_low": mean - half,
        "ci_high": mean + half,
    }


def main(arguments: Sequence[str]) -> int:
    """Compare; return the exit status."""
    if len(arguments) < 7:
        print(__doc__)
        return 2
    name, a, b, *paths = arguments
    try:
        evaluations = {}
        for path in map(Path, paths):
            kind, _, seed = path.stem.rpartition("-")
            if kind not in (a, b):
                raise ValueError(f"{path.name} is called neither {a}-SEED.json nor {b}-SEED.json")
            evaluations[kind, seed] = json.loads(path.read_text(encoding="utf-8"))
        write_json(compare((a, b), evaluations), DOCS / f"results/{name}.json")
    except (ValueError, OSError) as error:
        print(f"pairs.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
