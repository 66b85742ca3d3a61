"""Decides the paper's claims: pairs of trainings from the same seeds, until the interval is narrow.

    python tools/decide.py CLAIM [--world WORLD] [--budget-s 3600]

trains both kinds of a claim of tools/claims.py from seed 0, then 1, and so on, measures them on the
same clips, and after each pair takes the mean difference with its 95 % interval over seeds. It ends
when half of the interval of PSNR at +8 is at most 0.3 dB and, where it is measured, half of that of
FVD at most 5 % of FVD; or when the time is over. Whether it goes on depends on the widths alone,
never on what the difference is. What is done stays: the same command goes on, and one with more
time adds seeds. It writes docs/results/claims_WORLD_CLAIM.json after each pair from the second on,
with FVD claims_WORLD_CLAIM-fvd.json.
`python tools/decide.py list` prints the claims and the worlds.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from claims import CLAIMS, LOWER_IS_BETTER, Claim
from pairs import compare

from scd.cli import main as scd
from scd.common.config import at_least
from scd.common.names import known
from scd.common.provenance import command, write_json

DOCS = Path(__file__).resolve().parent.parent / "docs"

WIDEST_PSNR_DB, WIDEST_FVD = 0.3, 0.05
"""Half an interval at which a claim is decided: of PSNR at +8, and of FVD as a share of it."""

DECIDED_AT = 8
"""Horizon at which PSNR decides."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Clips, and trainings on them that take a few minutes of one thread."""

    data: str
    """Where the clips are; {out} is the folder of the command."""
    record: str
    """What records them; empty: nothing has to be."""
    steps: int
    """Training steps, after which every seed has learned what actions do."""
    model: str
    """Flags of both kinds of model."""
    protocol: str
    """Flags of the evaluation."""


SMALL = (
    "--model.block.width 96 --model.block.head-dim 48 --model.block.rotary-axes 12 18 18 "
    "--num-frames 12 --batch-size 4 --objective.history-noise 0 --validate-every 200 "
    "--sample-every 0 --threads 1 --num-loader-workers 1 --precision fp32 --optim.lr 0.003 "
    "--optim.muon-lr 0.03"
)
"""Of all models. Rates of three times the preset's: with its own the action gap after 500 steps of
the toy world is 0.018, with these 0.026."""

WORLDS = {
    "toy": World(
        data="toy:32",
        record="",
        steps=600,
        model=SMALL,
        protocol="--context 4 --horizon 8 --num-clips 128 --batch-size 32 --no-memory",
    ),
    "cars": World(
        data="{out}/data",
        record="scd record gym CarRacing-v3 --make continuous=False --frames-from observation "
        "--crop 0 6 84 84 --size 32 --frame-skip 3 --warmup 17 60 "
        "--policy runs/worlds/drive.py:drive --names nothing right left gas brake "
        "--episodes 100 --frames 100 --val-fraction 0.2 --workers 1 --out {out}/data",
        steps=800,
        model=f"{SMALL} --model.conditions.num-actions 5",
        protocol="--context 4 --horizon 8 --num-clips 128 --batch-size 32",
    ),
}
"""Where claims are decided. Trainings of both take a minute or so of one core, and their
evaluation some seconds."""

LAYERS = {"encoder": 3, "decoder": 1}
"""Of the separable model; the dense one has as many in all."""

KINDS = {
    "base": "",
    "token_concat": "--model.decoder.join token_concat",
    "channel_concat": "--model.decoder.join channel_concat",
    "add": "--model.decoder.join add",
    "noise_0": "--objective.context-noise 0",
    "noise_0.2": "--objective.context-noise 0.2",
    "noise_0.5": "--objective.context-noise 0.5",
    "draws_2": "--objective.num-draws 2",
    "draws_4": "--objective.num-draws 4",
    "noisy_input": "--objective.history noisy --objective.clean-fraction 0.1",
    "deep_encoder": "--model.encoder.num-layers 7",
    "deep_decoder": "--model.decoder.num-layers 5",
    "dense": f"--model.num-layers {sum(LAYERS.values())}",
    "separable_4_2": "--model.encoder.num-layers 4 --model.decoder.num-layers 2",
    "dense_6": "--model.num-layers 6",
    "guided": "",
}
"""What each kind changes of the base."""

GUIDED = "--guidance.kind context_noise --guidance.scale 1.5"
"""Flags of the evaluation of `guided`, whose training is the base's."""


FVD = "--fvd --fvd-frames all --num-clips 64"
"""Flags of an evaluation with FVD, which wants 10 frames or more: the given ones count too. Half
the clips, since features cost more than predictions; results have names of their own."""


WITH_FVD = "-fvd"
"""Ends such names."""


@dataclass(frozen=True, kw_only=True)
class DecideConfig:
    """One claim on one world."""

    claim: Annotated[str, tyro.conf.Positional]
    """Name, as `list` prints it."""
    world: str = "toy"
    """toy or cars."""
    out: str = ""
    """Folder of trainings and evaluations; empty: runs/out/claims/WORLD."""
    budget_s: float = 3600.0
    """Seconds after which no new pair is begun."""
    seeds: int = 5
    """Pairs before the interval may end it."""
    most_seeds: int = 20
    """Pairs at most."""
    fvd: bool = False
    """Measure FVD too (scd weights i3d)."""

    def __post_init__(self) -> None:
        at_least(2, seeds=self.seeds, most_seeds=self.most_seeds)


def slug(claim: Claim) -> str:
    """Return the name of a claim as the command line and files have it."""
    return f"{claim.of}_against_{claim.against}"


def training(world: World, kind: str, seed: int, data: str, folder: Path) -> list[str]:
    """Return the command that trains one kind from one seed, in its folder."""
    flags = f"{world.model} --max-steps {world.steps} {KINDS[kind]}"
    is_dense = kind.startswith("dense")
    if not is_dense:
        for part, layers in LAYERS.items():
            if f"--model.{part}.num-layers" not in flags:
                flags += f" --model.{part}.num-layers {layers}"
    preset = "toy-dense" if is_dense else "toy"
    return ["train", preset, "--data", data, "--seed", str(seed), *flags.split()] + [
        *("--out", str(folder))
    ]


def run(words: Sequence[str]) -> None:
    """Run one command of scd to its end, in this process, since imports cost seconds each time.

    Raises:
        ValueError: it failed.
    """
    print("scd", *words, flush=True)
    if status := scd(words):
        raise ValueError(f"scd {words[0]} ended with status {status}")


def measured(out: Path, kind: str, seed: int, fvd: bool) -> Path:
    """Return where the evaluation of one kind from one seed is, or is to be."""
    return out / f"{kind}-{seed}{WITH_FVD * fvd}.json"


def measure(world: World, kind: str, seed: int, config: DecideConfig, out: Path) -> dict[str, Any]:
    """Train and evaluate one kind from one seed, or read what was measured before."""
    data = world.data.format(out=out)
    trained = "base" if kind == "guided" else kind
    folder, result = out / "runs" / f"{trained}-{seed}", measured(out, kind, seed, config.fvd)
    if not result.exists():
        run(training(world, trained, seed, data, folder))
        words = ["evaluate", str(folder), "--data", data, *world.protocol.split()]
        words += [
            *(FVD.split() if config.fvd else ()),
            *(GUIDED.split() if kind == "guided" else ()),
        ]
        run([*words, "--threads", "1", "--out", str(result)])
    return json.loads(result.read_text(encoding="utf-8"))


def half_width(rows: Sequence[Mapping[str, Any]], metric: str, horizon: int) -> float | None:
    """Return half an interval, of FVD as a share of its mean; None: it was not measured."""
    for row in rows:
        if row["metric"] == metric and row["horizon"] == horizon:
            half = (row["ci_high"] - row["ci_low"]) / 2
            means = list(row["means"].values())
            return half / (sum(means) / len(means)) if metric in LOWER_IS_BETTER else half
    return None


def is_narrow(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the intervals decide: by their widths, whatever they hold."""
    horizon = max(row["horizon"] for row in rows)
    psnr = half_width(rows, "psnr", DECIDED_AT)
    fvd = half_width(rows, "fvd", horizon)
    assert psnr is not None
    return psnr <= WIDEST_PSNR_DB and (fvd is None or fvd <= WIDEST_FVD)


def verdict(claim: Claim, row: Mapping[str, Any], narrow: bool) -> str:
    """Say in a few words what an interval of PSNR says of a claim.

    agrees or disagrees: as was expected, or not, whatever the width. Where the interval holds 0:
    no difference larger than its far end if it is narrow; else not decided.
    """
    low, high = row["ci_low"], row["ci_high"]
    if low <= 0 <= high:
        largest = max(-low, high)
        if not narrow:
            return f"not decided: the interval reaches {largest:.2f} dB"
        return f"no difference larger than {largest:.2f} dB"
    better = low > 0
    if claim.expected == "nothing":
        return f"no claim; {claim.of} is {'better' if better else 'worse'}"
    return "agrees" if better else "disagrees"


def decide(claim: Claim, config: DecideConfig) -> dict[str, Any]:
    """Add pairs until the interval is narrow or the time over; return what is known then."""
    world = WORLDS[known(config.world, "world", WORLDS)]
    out = Path(config.out or f"runs/out/claims/{config.world}")
    out.mkdir(parents=True, exist_ok=True)
    if world.record and not Path(world.data.format(out=out)).exists():
        run(world.record.format(out=out).split()[1:])
    began, evaluations, result = time.monotonic(), {}, {}
    for seed in range(config.most_seeds):
        kinds = (claim.of, claim.against)
        there = all(measured(out, kind, seed, config.fvd).exists() for kind in kinds)
        if not there and time.monotonic() - began > config.budget_s:
            break
        for kind in kinds:
            evaluations[kind, str(seed)] = measure(world, kind, seed, config, out)
        if seed:
            result = summary(claim, config, evaluations)
            name = f"claims_{config.world}_{slug(claim)}{WITH_FVD * config.fvd}.json"
            write_json(result, DOCS / "results" / name)
        if seed + 1 >= config.seeds and result and result["narrow"]:
            break
    if not result:
        raise ValueError(f"the budget of {config.budget_s} s ended before the second pair")
    return result


def summary(
    claim: Claim, config: DecideConfig, evaluations: Mapping[tuple[str, str], Any]
) -> dict[str, Any]:
    """Return the difference at +8 with its interval, the verdict, and all other rows."""
    compared = compare((claim.of, claim.against), evaluations, free=("guidance", "i3d"))
    rows = compared["rows"]
    (row,) = (one for one in rows if (one["metric"], one["horizon"]) == ("psnr", DECIDED_AT))
    narrow = is_narrow(rows)
    return {
        "claim": claim.name,
        "world": config.world,
        "metric": f"PSNR at +{DECIDED_AT}, dB",
        **{key: row[key] for key in ("difference", "ci_low", "ci_high")},
        "seeds": len(compared["seeds"]),
        "narrow": narrow,
        "verdict": verdict(claim, row, narrow),
        "listens": listens(evaluations),
        "compared": compared,
        "command": command(),
        "hardware": compared["hardware"],
        "commit": compared["commit"],
    }


def listens(evaluations: Mapping[tuple[str, str], Any]) -> dict[str, float]:
    """Return by kind and seed how many dB at +8 another clip's actions cost: 0 for the deaf."""
    found = {}
    for (kind, seed), one in evaluations.items():
        means = {
            row["baseline"]: row["mean"]
            for row in one["rows"]
            if (row["metric"], row["horizon"]) == ("psnr", DECIDED_AT)
        }
        if "shuffled_actions" in means:
            found[f"{kind}-{seed}"] = means["model"] - means["shuffled_actions"]
    return found


def listing() -> str:
    """Return the claims and the worlds, for people."""
    lines = [f"{slug(claim)}: {claim.name}; the paper: {claim.said}" for claim in CLAIMS]
    return "\n".join([*lines, "", *(f"{name}: {one.data}" for name, one in WORLDS.items())])


def main() -> int:
    """Decide one claim; return the exit status."""
    config = tyro.cli(DecideConfig, description=re.sub(r"\n\n.*", "", __doc__ or "", flags=re.S))
    if config.claim == "list":
        print(listing())
        return 0
    try:
        names = {slug(claim): claim for claim in CLAIMS}
        result = decide(names[known(config.claim, "claim", names)], config)
    except (ValueError, OSError) as error:
        print(f"decide.py: {error}", file=sys.stderr)
        return 2
    low, high = result["ci_low"], result["ci_high"]
    print(f"{result['claim']}, {result['seeds']} seeds: {result['difference']:+.2f} dB", end=" ")
    print(f"[{low:+.2f}, {high:+.2f}] at +{DECIDED_AT}: {result['verdict']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
