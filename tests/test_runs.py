"""The scripts in runs/: a failure or a signal ends them, and the training that they started."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tyro

from examples.ship_world import ShipConfig
from scd.completion import settings_of_commands
from scd.data.record import recordings
from scd.evaluation.protocols import PROTOCOLS, EvaluateConfig
from scd.models.checkpoint import load_world
from tools.equal_time import EqualTimeConfig

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = """#!/usr/bin/env bash
echo "$1 $2" >> calls
echo "$*" >> lines
{body}
"""
WAITING = """[ "$1" = record ] && exit 0
trap 'echo "saved $2" >> calls; exit 143' TERM
touch "began-$2"
for _ in {1..600}; do sleep 0.1; done"""


def start(
    tmp_path: Path, name: str, body: str, *arguments: str, **given: str
) -> subprocess.Popen[bytes]:
    """Start a copy of a script where the programs that it calls are stand-ins."""
    for folder in ("runs/worlds", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    for script_file in (
        name,
        "start.sh",
        "against_dense.sh",
        "worlds/cars.sh",
        "worlds/crafter.sh",
    ):
        shutil.copy(ROOT / "runs" / script_file, tmp_path / "runs" / script_file)
    for program in ("scd", "python", "torchrun"):
        (tmp_path / "bin" / program).write_text(STAND_IN.replace("{body}", body))
        (tmp_path / "bin" / program).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | given
    script = str(tmp_path / "runs" / name)

    def heed() -> None:
        # Where the tests run in the background, SIGINT is ignored, which bash would take over.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        ["bash", script, *arguments], env=environment, start_new_session=True, preexec_fn=heed
    )


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("demo.sh", ["--train"]),
        ("doom_cpu.sh", ["doom-32", "doom-64"]),
        ("doom_gpu.sh", ["doom-64"]),
    ],
)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_script_ends_what_it_started(tmp_path, name, trained, number, status):
    script = start(tmp_path, name, WAITING)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"began-{one}").exists() for one in trained):
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    script.send_signal(number)
    assert script.wait(timeout=60) == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(calls[-len(trained) :]) == [f"saved {one}" for one in trained]


SHIPS = """case "$*" in *ship_world*) mkdir -p "${!#}" && touch "${!#}/config.json" ;; esac"""


FIRST = {"record": "--env", "encode": "--data", "evaluate": "--run"}
"""Flags whose value stands first, without them."""


@pytest.mark.parametrize("name", ["cars", "crafter"])
def test_a_script_that_makes_a_world_is_understood_to_its_last_flag(tmp_path, name):
    script = start(tmp_path, f"worlds/{name}.sh", SHIPS, "out")
    assert script.wait(timeout=60) == 0
    assert (tmp_path / "scd/worlds" / name / "config.json").is_file()
    commands = understood((tmp_path / "lines").read_text().splitlines())
    assert commands >= {"record", "train", "train-judge", "evaluate"}


@pytest.mark.parametrize("given", [{}, {"QUICK": "1"}, {"MINUTES": "60", "ROWS": "cars/pixels-8"}])
def test_the_script_that_compares_worlds_is_understood_and_records_alone(tmp_path, given):
    script = start(tmp_path, "worlds/compare.sh", "exit 0", "out", **given)
    assert script.wait(timeout=60) == 0
    lines = (tmp_path / "lines").read_text().splitlines()
    assert understood(lines) == {"record", "tools/equal_time.py"}
    places = [line.split("--out ")[1].split()[0] for line in lines if line.startswith("record")]
    games = ("cars/data", "cars/test", "crafter/data", "freeway/data")
    games += ("doom-my_way_home/data", "doom-map01/data")
    assert places == [f"out/{one}" for one in games]
    minutes = given.get("MINUTES", "0.02" if "QUICK" in given else "8")
    assert f"equal_time.py out --minutes {minutes} " in lines[-1]


def understood(lines: Sequence[str]) -> set[str]:
    """Read each line as its command does, which ends with status 2 at what it does not know."""
    kinds = {"doom": recordings()["doom"], "gym": recordings()["gym"]}
    settings = settings_of_commands() | {
        "record": kinds,
        "examples/ship_world.py": ShipConfig,
        "tools/equal_time.py": EqualTimeConfig,
    }
    for line in lines:
        command, *words = line.split()
        kind, default = settings[command], None
        if isinstance(kind, dict):
            kind = kind[words.pop(0)]
        if not isinstance(kind, type):
            kind, default = type(kind), kind
        if command in FIRST and kind is not kinds["doom"]:
            words.insert(0, FIRST[command])
        tyro.cli(kind, args=words, default=default, config=(tyro.conf.AvoidSubcommands,))
    return {line.split()[0] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("cars", "Box2D"), ("crafter", "crafter")])
def test_a_script_that_makes_a_world_runs_to_its_end(name, package, tmp_path):
    pytest.importorskip(package)
    shipped = ROOT / "scd/worlds" / name
    before = {path: path.stat().st_mtime_ns for path in shipped.iterdir()}
    command = ["bash", str(ROOT / f"runs/worlds/{name}.sh"), str(tmp_path)]
    subprocess.run(command, env=os.environ | {"QUICK": "1"}, check=True, timeout=1800)
    assert (tmp_path / "evaluation.json").is_file()
    made = load_world(tmp_path / "scd/worlds" / name)
    assert made.sampling.num_steps == 4 and len(made.clips) > 0
    assert made.card.action_names == load_world(shipped).card.action_names
    assert {path: path.stat().st_mtime_ns for path in shipped.iterdir()} == before


@pytest.mark.parametrize("failing", ["doom-32", "doom-64"])
def test_a_failed_training_ends_the_script(tmp_path, failing):
    body = f'[ "$2" = {failing} ] && exit 3; exit 0'
    assert start(tmp_path, "doom_cpu.sh", body).wait(timeout=60) == 3
    calls = (tmp_path / "calls").read_text()
    assert f"train {failing}" in calls and "evaluate" not in calls


def test_a_script_runs_to_its_end(tmp_path):
    assert start(tmp_path, "doom_gpu.sh", "exit 0").wait(timeout=60) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls if call.split()[0] != "record"][:2] == ["train"] * 2
    assert calls[-1].startswith("tools/tables.py")


WEIGHTS = {"ALEXNET": "alexnet.pth", "I3D": "i3d.pt", "I3D_SHA256": "0" * 64}
PAPER = {
    "minecraft.sh": {"MINECRAFT": "videos", "AUTOENCODER": "ae"},
    "ucf.sh": {"UCF": "videos", "AUTOENCODER": "ae"},
    "ablations.sh": {"DATA": "latents"},
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_forms_give_each_protocol_the_weights_that_it_measures_with(tmp_path, name):
    script = start(tmp_path, name, "exit 0", "paper", "out", **PAPER[name], **WEIGHTS)
    assert script.wait(timeout=60) == 0
    lines = [line.split() for line in (tmp_path / "lines").read_text().splitlines()]
    evaluations = [words[words.index("evaluate") :] for words in lines if "evaluate" in words]
    assert len(evaluations) >= 6
    for _, run, *words in evaluations:
        at = words.index("--protocol")
        protocol = PROTOCOLS[words[at + 1]]
        rest = ["--run", run, *words[:at], *words[at + 2 :]]
        config = tyro.cli(EvaluateConfig, args=rest, default=EvaluateConfig(protocol=protocol))
        assert (bool(config.alexnet), bool(config.i3d)) == (protocol.lpips, protocol.fvd)
        assert bool(config.i3d_sha256) == protocol.fvd


@pytest.mark.parametrize(
    ("name", "missing"), [("minecraft.sh", "I3D_SHA256"), ("ablations.sh", "ALEXNET")]
)
def test_missing_weights_are_noticed_before_anything_is_trained(tmp_path, name, missing):
    given = PAPER[name] | WEIGHTS | {missing: ""}
    assert start(tmp_path, name, "exit 0", "paper", "out", **given).wait(timeout=60) != 0
    assert not (tmp_path / "calls").exists()


def test_two_checkouts_take_turns_whatever_version_is_installed(tmp_path):
    for name in ("new", "old"):
        package = tmp_path / name / "scd"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(
            f"import sys\nwith open({str(tmp_path / 'calls')!r}, 'a') as file:\n"
            f"    print({name!r}, *sys.argv[1:], file=file)\n"
        )
    (tmp_path / "new" / "runs").mkdir()
    script = shutil.copy(ROOT / "runs" / "side_by_side.sh", tmp_path / "new" / "runs")
    environment = os.environ | {"ROUNDS": "2", "MEASURES": "help_s train_help_s"}
    command = ["bash", script, tmp_path / "old", tmp_path / "out"]
    said = subprocess.run(
        command, env=environment, check=True, timeout=60, capture_output=True, text=True
    ).stdout
    turn = [f"{name} {words}" for name in ("new", "old") for words in ("--help", "train --help")]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["new train --help", "old train --help", *turn, *turn]
    assert len((tmp_path / "out" / "side_by_side.txt").read_text().splitlines()) == 8
    assert "A/B" in said and "train_help_s" in said
