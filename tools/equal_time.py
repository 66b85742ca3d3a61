"""Games and ways of making a frame, each trained for the same processor time of one core.

    python tools/equal_time.py FOLDER [--minutes 8] [--rows cars/latents-16 ...] [--out FILE.json]

FOLDER/GAME/data is the recording of a game (runs/worlds/compare.sh makes all of them). For each
row, GAME/WAY, it trains in FOLDER/GAME/WAY: an autoencoder first where the way has one, whose time
counts as does that of encoding all episodes, and the world in what is left of the minutes. A few
steps are timed before, by processor time, which says what a step costs beside other work too, and
as many are trained as fit: so every schedule ends with its row. Then the world is measured on
held-out clips. What is done stays, and the same command goes on. The result is written after each
row, for a table of docs/results.md.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from cells import interval, markdown

from scd.cli import main as scd
from scd.common.config import at_least
from scd.common.files import read_json
from scd.common.names import known
from scd.common.provenance import provenance, write_json
from scd.common.runtime import cpu_threads
from scd.data.source import open_source
from scd.evaluation.grids import PictureRow, write_grid
from scd.evaluation.metrics import find_row
from scd.evaluation.predict import choose_windows, predict, read_windows
from scd.models.checkpoint import load_world
from scd.models.flow import with_num_steps
from scd.streaming.rollout import Rollout

HORIZONS = (1, 8, 32)
"""Frames ahead at which the table has numbers."""

CONTEXT, NUM_STEPS = 16, 4
"""Given frames, and denoising steps per frame, of whatever is measured."""

AUTOENCODER_SHARE = 0.3
"""Of a row's time, where it has an autoencoder: of the training of that, without the encoding."""

TIMED_STEPS, EVERY = 30, 10
"""Steps that are timed, and those of them after which they are as fast as they will be."""

TIMED_FRAMES, NUM_SHOWN = 64, 3
"""Frames of a stream that are timed; clips that are shown."""

WORLD = (
    f"--objective.condition-dropout 0 --validate-every 0 --sample-every 0 --log-every {EVERY} "
    "--save-every 100 --threads 1 --num-loader-workers 1"
)
"""Flags of all worlds: `scd train doom-play` but for them."""

AUTOENCODER = (
    "--adversarial-steps 0 --batch-size 8 --num-frames 1 --perceptual-weight 0.1 --precision bf16 "
    "--ema-decay 0.99 --optim.optimizer muon --optim.muon-lr 5e-3 --optim.lr 2e-3 "
    f"--optim.warmup-steps 50 --optim.decay-fraction 0.5 --validate-every 0 --log-every {EVERY} "
    "--num-validation-clips 16 --save-every 100 --threads 1 --num-loader-workers 1"
)
"""Flags of all autoencoders."""


@dataclass(frozen=True, kw_only=True)
class Game:
    """One of the games."""

    test: str = "data"
    """Recording whose test split the clips are of; that of the training, or another."""
    world: str = ""
    """Flags of its worlds, as the script that makes the shipped one has them."""


GAMES = {
    "cars": Game(test="test"),
    "crafter": Game(world="--batch-size 2 --objective.time-mean 1.4"),
    "freeway": Game(),
    "doom-my_way_home": Game(),
    "doom-map01": Game(),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of making a frame."""

    name: str
    """In the table."""
    patch_size: int
    """Rows and columns of a token, in pixels or cells of latents."""
    network: str = ""
    """The autoencoder; empty: pixels."""
    world: str = ""
    """Further flags of its worlds."""


WAYS = {
    "pixels-16": Way(name="pixels, patches of 16", patch_size=16),
    "pixels-8": Way(name="pixels, patches of 8", patch_size=8),
    "lapped-16": Way(
        name="pixels, overlapping patches of 16", patch_size=16, world="--autoencoder.lapped 16"
    ),
    "latents-16": Way(name="latents, cells of 16", patch_size=1, network="small-16"),
    "latents-8": Way(name="latents, cells of 8", patch_size=1, network="small-8"),
}

ROWS = (
    *("cars/latents-16", "cars/pixels-16", "cars/lapped-16", "cars/pixels-8", "cars/latents-8"),
    *("crafter/pixels-16", "crafter/latents-16", "freeway/latents-16"),
    *("doom-my_way_home/latents-16", "doom-map01/latents-16"),
)
"""Those that tell most come first."""


@dataclass(frozen=True, kw_only=True)
class EqualTimeConfig:
    """Rows of one table."""

    folder: Annotated[str, tyro.conf.Positional]
    """Recordings, and all that is trained."""
    minutes: float = 8.0
    """Processor time of one core for the trainings of each row."""
    rows: tuple[str, ...] = ROWS
    """GAME/WAY each, in the order in which they are made."""
    clips: int = 64
    """Held-out clips."""
    horizon: int = 32
    """Frames that are predicted of each."""
    judge_steps: int = 300
    """Steps of the model that reads actions off frames, once for each game."""
    out: str = "docs/results/equal_time.json"
    """The result."""

    def __post_init__(self) -> None:
        at_least(1, clips=self.clips, horizon=self.horizon, judge_steps=self.judge_steps)
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0, got {self.minutes}")
        for row in self.rows:
            game, _, way = row.partition("/")
            known(game, "game", GAMES)
            known(way, "way of making a frame", WAYS)


def run(*words: object) -> None:
    """Run one command of scd to its end, in this process (ValueError: it failed)."""
    print("scd", *words, flush=True)
    if status := scd([str(word) for word in words]):
        raise ValueError(f"scd {words[0]} ended with status {status}")


class Plan:
    """What a row's time is spent on, kept in its folder: the same command goes on by it."""

    def __init__(self, folder: Path, minutes: float) -> None:
        """Read it, or begin one (ValueError: another time was planned here)."""
        self.path, self.seconds = folder / "plan.json", 60 * minutes
        self.kept: dict[str, float] = read_json(self.path) if self.path.is_file() else {}
        if self.kept.setdefault("minutes", minutes) != minutes:
            raise ValueError(
                f"{self.path} plans {self.kept['minutes']:g} minutes, not {minutes:g}: name "
                "another folder with the same recordings"
            )
        folder.mkdir(parents=True, exist_ok=True)

    def once(self, key: str, find: Callable[[], float]) -> float:
        """Return a number that is found once."""
        if key not in self.kept:
            self.kept[key] = find()
            write_json(self.kept, self.path)
        return self.kept[key]


def processor_s(run_folder: Path, after: int = 0) -> tuple[float, int]:
    """Return the processor seconds of a training by its log, and the steps that took them; those
    after a step alone."""
    seconds = {0: 0.0}
    for line in (run_folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            # A step that was trained again after an interruption counts once.
            seconds[event["step"]] = event["processor_s"]
    steps = sorted(seconds)
    spent = [
        (b - a, (b - a) * seconds[b]) for a, b in zip(steps, steps[1:], strict=False) if b > after
    ]
    return sum(one[1] for one in spent), sum(one[0] for one in spent)


def steps_for(seconds: float, timed: Path, words: Sequence[object], flag: str) -> int:
    """Return how many steps of a training take so many processor seconds; a few are done."""
    run(*words, flag, TIMED_STEPS, "--out", timed)
    spent, steps = processor_s(timed, after=EVERY)
    return max(1, round(seconds * steps / spent))


def train_row(name: str, config: EqualTimeConfig) -> dict[str, Any]:
    """Train one row; return what it took."""
    game, _, key = name.partition("/")
    way, home = WAYS[key], Path(config.folder) / game
    folder, data = home / key, home / "data"
    plan, spent = Plan(folder, config.minutes), {}
    if way.network:
        words = [
            "train-autoencoder",
            "--data",
            data,
            "--network",
            way.network,
            *AUTOENCODER.split(),
        ]
        flag, made = "--reconstruction-steps", folder / "autoencoder"
        share = AUTOENCODER_SHARE * plan.seconds
        steps = plan.once(
            "autoencoder_steps", lambda: steps_for(share, folder / "timed_ae", words, flag)
        )
        run(*words, flag, steps, "--out", made)
        spent["autoencoder"] = processor_s(made)[0]
        encode = ["encode", data, "--autoencoder", made, "--out", folder / "latents"]
        spent["encoding"] = plan.once("encoding_s", lambda: timed(*encode, *ENCODE.split()))
        data = folder / "latents"
    words = ["train", "doom-play", "--data", data, *WORLD.split(), *GAMES[game].world.split()]
    words += way.world.split()
    words += ["--model.shape.patch-size", way.patch_size]
    left = plan.seconds - sum(spent.values())
    steps = plan.once("steps", lambda: steps_for(left, folder / "timed", words, "--max-steps"))
    run(*words, "--max-steps", steps, "--out", folder / "world")
    spent["world"], steps = processor_s(folder / "world")
    return {"seconds": spent, "steps": steps}


ENCODE = "--precision bf16 --threads 1"
"""Flags of the encoding."""


def timed(*words: object) -> float:
    """Run one command; return its processor seconds."""
    began = time.process_time()
    run(*words)
    return time.process_time() - began


def frame_s(world_folder: Path, test: Path) -> float:
    """Return the processor seconds of a frame of one stream by one thread."""
    world, source = load_world(world_folder), open_source(str(test), "test")
    given = read_windows(source, choose_windows(source, 1, CONTEXT, seed=0), CONTEXT)
    with cpu_threads(1):
        rollout = Rollout(world, with_num_steps(world.sampling, NUM_STEPS), engine="fast")
        rollout.begin(given.frames, given.conditions)
        actions = torch.zeros(TIMED_FRAMES, 1, dtype=torch.long)
        for action in actions[: TIMED_FRAMES // 4]:
            rollout.step(action)
        began = time.process_time()
        for action in actions:
            rollout.step(action)
        return (time.process_time() - began) / TIMED_FRAMES


def show(world_folder: Path, test: Path, config: EqualTimeConfig, path: Path) -> None:
    """Draw a few held-out clips, the truth above what the world makes of them."""
    world, source = load_world(world_folder), open_source(str(test), "test")
    length, shown = CONTEXT + config.horizon, min(NUM_SHOWN, config.clips)
    clips = read_windows(source, choose_windows(source, shown, length, seed=1), length)
    with cpu_threads(1):
        sampling = with_num_steps(world.sampling, NUM_STEPS)
        made = predict(world, clips, CONTEXT, sampling=sampling).frames
    at = [place for place in (0, 1, 3, 7, 11, 15, 23, 31) if place < config.horizon]
    rows = []
    for true, other in zip(clips.frames[:, CONTEXT:], made, strict=True):
        rows += [
            PictureRow(name="truth", frames=true[at]),
            PictureRow(name="world", frames=other[at]),
        ]
    write_grid(rows, [f"+{place + 1}" for place in at], path)


def measure_row(name: str, config: EqualTimeConfig) -> dict[str, Any]:
    """Measure one row, or read what was measured before; return its numbers."""
    game, _, key = name.partition("/")
    home = Path(config.folder) / game
    world, test, judge = home / key / "world", home / GAMES[game].test, home / "judge"
    if not judge.is_dir():
        words = ["train-judge", "--data", home / "data", "--out", judge, "--threads", 1]
        run(*words, "--steps", config.judge_steps, "--batch-size", 16)
    found = home / key / "evaluation.json"
    words = ["evaluate", world, "--data", test, "--split", "test", "--context", CONTEXT]
    words += ["--horizon", config.horizon, "--num-clips", config.clips, "--judge", judge]
    words += ["--no-shuffled-actions"]
    words += ["--batch-size", min(32, config.clips), "--num-steps", NUM_STEPS, "--threads", 1]
    run(*words, "--out", found)
    evaluation = read_json(found)
    picture = home / key / "shown.png"
    if not picture.is_file():
        show(world, test, config, picture)
    rows, overall = evaluation["rows"], evaluation["overall"]
    horizons = [one for one in HORIZONS if one <= config.horizon]
    control = {row["baseline"]: row["mean"] for row in overall if row["metric"] == "control"}
    distances = [
        row for row in overall if (row["metric"], row["baseline"]) == ("frechet_own", "model")
    ]
    return {
        "psnr_gain": [find_row(rows, "psnr_gain", at) for at in horizons],
        "sharpness": [find_row(rows, "sharpness", at) for at in horizons],
        "control": control,
        # Of few clips there is none.
        "frechet_own": distances[0] if distances else None,
        "parameters": evaluation["model"]["parameters"],
        "frame_s": Plan(home / key, config.minutes).once("frame_s", lambda: frame_s(world, test)),
    }


def equal_time(config: EqualTimeConfig) -> dict[str, Any]:
    """Make all rows, those first that tell most; write the result after each and return it."""
    made: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for name in config.rows:
        made[name] = train_row(name, config) | measure_row(name, config)
        result = {
            "minutes": config.minutes,
            "clips": config.clips,
            "rows": made,
        } | provenance("cpu")
        write_json(result, Path(config.out))
        print(table({"": result}), flush=True)
    return result


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of the docs: one row per game and way."""
    (result,) = results.values()
    rows = []
    for name, row in result["rows"].items():
        game, _, way = name.partition("/")
        spent = row["seconds"]
        before = spent.get("autoencoder", 0) + spent.get("encoding", 0)
        minutes = [f"{before / 60:.1f} + "] * bool(before) + [f"{spent['world'] / 60:.1f}"]
        real = row["control"]["truth"]
        rows.append(
            [
                f"{game}, {WAYS[way].name}",
                f"{''.join(minutes)} ({row['steps']:,})",
                *(interval(one) for one in row["psnr_gain"]),
                ", ".join(f"{one['mean']:.2f}" for one in row["sharpness"]),
                f"{row['control']['model'] / real:.2f} ({real:.2f})",
                interval(row["frechet_own"]) if row["frechet_own"] else "",
                f"{1 / row['frame_s']:.0f}",
            ]
        )
    horizons = [row["horizon"] for row in next(iter(result["rows"].values()))["psnr_gain"]]
    head = ["game, a frame's tokens", "core-minutes, autoencoder + world (steps)"]
    head += [f"+{at}, dB" for at in horizons]
    head += [f"sharpness at {', '.join(f'+{at}' for at in horizons)}"]
    head += ["actions over real frames' (theirs)", "own Frechet distance", "frames/s"]
    return markdown(head, rows)


def main(arguments: Sequence[str]) -> int:
    """Make the rows; return the exit status."""
    says = re.sub(r"\n\n.*", "", __doc__ or "", flags=re.S)
    try:
        equal_time(tyro.cli(EqualTimeConfig, args=arguments, description=says))
    except (ValueError, OSError) as error:
        print(f"equal_time.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
