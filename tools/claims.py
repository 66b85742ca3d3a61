"""The paper's claims about its design choices, beside what the small runs show.

A claim compares two kinds of model trained from the same seeds; `tools/ablations.py` finds the
difference of each metric with its 95 % interval over seeds, and here it becomes a verdict.
Source of what is said: paper (sampling, evaluation).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cells import difference, markdown

SHOWN = ("psnr", "ssim", "lpips", "fvd")
"""Metrics that count, as far as they were measured."""

LOWER_IS_BETTER = ("lpips", "fvd")
"""Among them."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One thing that the paper says of two kinds."""

    name: str
    """In the table."""
    of: str
    """The kind that it speaks of."""
    against: str
    """What that is compared with."""
    said: str
    """What it says, with its numbers where they are known."""
    expected: Literal["better", "no worse", "nothing"]
    """What `of` should be. nothing: the paper says nothing of quality, so there is no verdict."""


CLAIMS = (
    Claim(
        name="separable, against dense",
        of="base",
        against="dense",
        said="as good or better (Minecraft: PSNR 19.3 to 18.9, SSIM 0.524 to 0.512; UCF-101: 25.78 "
        "to 25.85, 0.824 to 0.827), 0.22 to 0.28 of the time",
        expected="no worse",
    ),
    Claim(
        name="separable of 4 + 2 layers, against dense of 6",
        of="separable_4_2",
        against="dense_6",
        said="the same, of 8 + 4 layers and of 12",
        expected="no worse",
    ),
    Claim(
        name="separable with channel concat, against dense",
        of="channel_concat",
        against="dense",
        said="not in the paper",
        expected="nothing",
    ),
    Claim(
        name="token concat, against channel concat",
        of="token_concat",
        against="channel_concat",
        said="consistently better",
        expected="better",
    ),
    Claim(
        name="token concat, against adding",
        of="token_concat",
        against="add",
        said="no numbers",
        expected="nothing",
    ),
    Claim(
        name="prefix (ours), against token concat",
        of="base",
        against="token_concat",
        said="not in the paper",
        expected="nothing",
    ),
    Claim(
        name="noise of 0.05 on the context, against none",
        of="base",
        against="noise_0",
        said="a moderate level makes it more robust",
        expected="better",
    ),
    Claim(
        name="noise of 0.05 on the context, against 0.2",
        of="base",
        against="noise_0.2",
        said="no numbers",
        expected="nothing",
    ),
    Claim(
        name="noise of 0.05 on the context, against 0.5",
        of="base",
        against="noise_0.5",
        said="a moderate level, so not this",
        expected="better",
    ),
    Claim(
        name="two draws per encoder pass, against one",
        of="draws_2",
        against="base",
        said="used, at the same number of steps; no numbers",
        expected="no worse",
    ),
    Claim(
        name="four draws per encoder pass, against one",
        of="draws_4",
        against="base",
        said="no numbers",
        expected="no worse",
    ),
    Claim(
        name="clean frames for the encoder, against noisy",
        of="base",
        against="noisy_input",
        said="clean in the text, noisy in the release; no numbers",
        expected="nothing",
    ),
    Claim(
        name="deeper encoder, against the base",
        of="deep_encoder",
        against="base",
        said="better, at the same time (0.52 s)",
        expected="better",
    ),
    Claim(
        name="deeper decoder, against the base",
        of="deep_decoder",
        against="base",
        said="better, at 3.1 times the time (1.6 s)",
        expected="better",
    ),
    Claim(
        name="deeper decoder, against deeper encoder",
        of="deep_decoder",
        against="deep_encoder",
        said="the best",
        expected="better",
    ),
    Claim(
        name="guided away from noisy context, against not",
        of="guided",
        against="base",
        said="follows the context more closely",
        expected="better",
    ),
)


def horizons_of(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the horizons that are shown: 1, 8 and the last."""
    found = {row["horizon"] for row in rows}
    return sorted({1, 8, max(found)} & found)


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that a verdict rests on."""
    horizons = horizons_of(rows)
    return [row for row in rows if row["metric"] in SHOWN and row["horizon"] in horizons]


def verdict(claim: Claim, rows: Iterable[Mapping[str, Any]]) -> str:
    """Say whether differences with intervals bear a claim out.

    Args:
        claim: what was expected.
        rows: metric, ci_low and ci_high of the differences that are shown.
    """
    if claim.expected == "nothing":
        return "no claim"
    better = worse = False
    for row in rows:
        low, high = row["ci_low"], row["ci_high"]
        if row["metric"] in LOWER_IS_BETTER:
            low, high = -high, -low
        better, worse = better or low > 0, worse or high < 0
    if better and worse:
        return "mixed"
    if worse:
        return "disagrees"
    if better:
        return "agrees"
    return "no difference found" if claim.expected == "no worse" else "not resolved"


def claims(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per claim that some results bear on."""
    lines = []
    for result in results.values():
        found = {row["name"]: row for row in result["claims"]}
        for claim in CLAIMS:
            if claim.name in found:
                lines.append(_line(claim, found[claim.name], result["time_over_base"]))
    head = ["", "the paper", "PSNR", "SSIM", "time per frame", "verdict"]
    return markdown(head, lines)


def _line(claim: Claim, found: Mapping[str, Any], times: Mapping[str, Any]) -> list[str]:
    rows = found["rows"]
    cells = [
        "<br>".join(
            f"+{row['horizon']}: {difference(row)}" for row in rows if row["metric"] == metric
        )
        for metric in ("psnr", "ssim")
    ]
    over = {"base": 1.0} | {kind: ratio["median"] for kind, ratio in times.items()}
    timed = claim.of in over and claim.against in over
    time = f"{over[claim.of] / over[claim.against]:.2f}" if timed else ""
    return [claim.name, claim.said, *cells, time, verdict(claim, rows)]


def decided(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per claim and world that tools/decide.py went into."""
    lines, names = [], [claim.name for claim in CLAIMS]
    for result in sorted(results.values(), key=lambda one: names.index(one["claim"])):
        claim = CLAIMS[names.index(result["claim"])]
        rows = {(row["metric"], row["horizon"]): row for row in result["compared"]["rows"]}
        measured = [rows[key] for key in (("psnr", 1), ("psnr", 8), ("ssim", 8))]
        fvd = next((row for (metric, _), row in rows.items() if metric == "fvd"), None)
        heard = min(result["listens"].values())
        lines.append(
            [
                claim.name,
                claim.said,
                result["world"],
                str(result["seeds"]),
                *(difference(row) for row in measured),
                difference(fvd) if fvd else "",
                f"{heard:.2f} dB",
                result["verdict"],
            ]
        )
    head = ["", "the paper", "world", "seeds", "PSNR +1", "PSNR +8", "SSIM +8", "FVD"]
    return markdown([*head, "least hearing", "verdict"], lines)
