"""Changes of one thing at a time against a base: what each does to prediction and to time.

    python tools/ablations.py NAME FOLDER

FOLDER is that of runs/ablations.sh: evaluations KIND-SEED.json, `base` among the kinds, and
turns.json, seconds per frame in turns of the kinds that change them. It writes
docs/results/NAME.json: for each kind the mean over seeds of each metric, and the mean difference to
the base with its 95 % interval over seeds; and the same for each pair that the paper speaks of.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import difference, digits, markdown, milliseconds
from claims import CLAIMS, SHOWN, horizons_of, shown
from pairs import compare

from scd.common.provenance import command, write_json

DOCS = Path(__file__).resolve().parent.parent / "docs"

BASE = "base"


def gather(evaluations: Mapping[tuple[str, str], Any], turns: Mapping[str, Any]) -> dict[str, Any]:
    """Compare every kind with the base.

    Args:
        evaluations: by kind and seed.
        turns: what benchmarks/turns.py wrote.

    Raises:
        ValueError: there is no base, or evaluations that cannot be compared.
    """
    found = dict.fromkeys(kind for kind, _ in evaluations)
    # One seed has no interval: a kind of which more are still to come is left out.
    kinds = [kind for kind in found if sum(one == kind for one, _ in evaluations) > 1]
    if BASE not in kinds or len(kinds) < 2:
        raise ValueError(
            f"needed {BASE}-SEED.json and those of other kinds, two seeds of each or more, got "
            f"{list(found)}"
        )
    rows, compared = [], {}
    for kind in kinds:
        if kind != BASE:
            compared = _pair(kind, BASE, evaluations)
            rows.append({"kind": kind, "rows": compared["rows"], "seeds": compared["seeds"]})
    timed = {name: one["time_over_first"] for name, one in turns["worlds"].items()}
    return {
        "kinds": rows,
        "claims": [
            {"name": claim.name, "rows": shown(_pair(claim.of, claim.against, evaluations)["rows"])}
            for claim in CLAIMS
            if claim.of in kinds and claim.against in kinds
        ],
        "seconds_per_frame": turns["worlds"][BASE]["seconds_per_frame"]["total"]["p50"],
        "time_over_base": {kind: ratio for kind, ratio in timed.items() if kind != BASE},
        "timed": turns["timed"],
        "left_out": [kind for kind in found if kind not in kinds],
        "protocol": compared["protocol"],
        "command": command(),
        "commit": compared["commit"],
        "hardware": compared["hardware"],
    }


def _pair(of: str, against: str, evaluations: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """Compare two kinds over the seeds; their guidance may differ."""
    pair = {key: one for key, one in evaluations.items() if key[0] in (of, against)}
    return compare((of, against), pair, free=("guidance",))


def ablations(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per kind: its differences to the base, and its time over the base's."""
    (result,) = results.values()
    horizons = horizons_of(result["kinds"][0]["rows"])
    first = {(row["metric"], row["horizon"]): row for row in result["kinds"][0]["rows"]}
    places = [(metric, horizon) for metric in SHOWN for horizon in horizons]
    places = [place for place in places if place in first]
    head = ["against the base, over seeds"]
    head += [f"{metric.upper()}, frame +{horizon}" for metric, horizon in places]
    base = [f"{first[place]['means'][BASE]:.{digits(place[0])}f}" for place in places]
    seconds = milliseconds(result["seconds_per_frame"])
    lines = [["base, itself", *base, _by_seed(first[places[0]], BASE), f"{seconds} ms"]]
    for kind in result["kinds"]:
        of = {(row["metric"], row["horizon"]): row for row in kind["rows"]}
        ratio = result["time_over_base"].get(kind["kind"])
        time = "as the base" if ratio is None else f"{ratio['median']:.2f}"
        name = f"{kind['kind'].replace('_', ' ')} ({len(kind['seeds'])} seeds)"
        differences = [difference(of[place]) for place in places]
        lines.append([name, *differences, _by_seed(of[places[0]], kind["kind"]), time])
    metric, horizon = places[0]
    each = f"{metric.upper()}, frame +{horizon}, of each seed"
    return markdown([*head, each, "time per frame"], lines)


def _by_seed(row: Mapping[str, Any], kind: str) -> str:
    return ", ".join(f"{value:.{digits(row['metric'])}f}" for value in row["values"][kind])


def main(arguments: Sequence[str]) -> int:
    """Gather; return the exit status."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    name, folder = arguments[0], Path(arguments[1])
    try:
        evaluations = {
            (found[1], found[2]): json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob("*.json"))
            if (found := re.fullmatch(r"(.+)-(\d+)\.json", path.name))
        }
        turns = json.loads((folder / "turns.json").read_text(encoding="utf-8"))
        write_json(gather(evaluations, turns), DOCS / f"results/{name}.json")
    except (ValueError, OSError) as error:
        print(f"ablations.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
