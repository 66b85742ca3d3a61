"""Every command and every Python block of README.md and docs/, typed from top to bottom, in small.

A page is read in an empty folder that holds what its reader has by then (READY). Its commands run
in this process with the flags of SMALL added; what cannot run in a test stands in ELSEWHERE with
the reason. A command without a rule fails, and so does a rule without a command.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from gymnasium.spaces import Box, Dict, MultiBinary
from PIL import Image
from torch.nn.functional import interpolate

import scd
from scd.cli import main
from scd.data.manifest import write_card, write_episode, write_manifest
from scd.data.source import DataCard, flags_to_name
from scd.data.video import write_video
from scd.training import fit
from tests.autoencoders.test_autoencoder import far_values
from tests.documents import (
    CODE,
    COMMANDS,
    LAUNCHER,
    ROOT,
    SHOWN,
    Reader,
    blocks,
    code,
    pages,
    rule_of,
)
from tests.layouts import moving_pictures, write_dmlab, write_ucf101
from tests.test_structure import help_of
from tests.tiny_wan import write_tiny_transformer
from tests.tiny_wan_run import PROMPTS, write_clips
from tests.tiny_wan_vae import write_tiny_parts

pytestmark = pytest.mark.docs

MODEL = (
    "--model.shape.patch-size 8 --model.block.width 16 --model.block.head-dim 16 "
    "--model.block.rotary-axes 4 6 6"
)
SEPARABLE = f"{MODEL} --model.encoder.num-layers 1 --model.decoder.num-layers 1"
BRIEF = (
    "--max-steps 2 --batch-size 2 --num-frames 4 --num-validation-clips 2 --validate-every 0 "
    "--sample-every 0 --threads 1 --device cpu"
)
MEASURED = "--context 2 --horizon 2 --num-clips 2 --device cpu"
DISTILLED = (
    "--max-steps 1 --batch-size 1 --num-frames 4 --validate-every 0 --sample-every 0 "
    "--objective.min-spread 0 --threads 1 --device cpu"
)
WAN = (
    "--num-frames 5 --batch-size 1 --max-steps 1 --save-every 0 --sample-every 0 --log-every 1 "
    "--precision fp32 --device cpu"
)

SMALL = {
    "chmod": "",
    "python -c": "",
    "python examples/clips_from_videos.py": "",
    "python examples/ship_world.py": "--clips 1 --frames 16 --shown 8",
    "scd bench": "--context 2 --frames 2 --device cpu",
    "scd bench compare": "--context 2 --steps 1 --rounds 1 --frames 1 --device cpu",
    "scd convert autoencoder": "",
    "scd convert wan": (
        "--height 32 --width 32 --text-length 16 --window 5 --num-steps 2 --copy-parts"
    ),
    "scd data check": "",
    "scd distill": DISTILLED,
    "scd distill runs/out/doom-32 --data data/doom-32 --method dmd": (
        f"{DISTILLED} --objective.num-given-frames 2"
    ),
    "scd encode": "--device cpu --threads 1",
    "scd encode data/clips": "--device cpu --threads 1 --text-length 16",
    "scd export onnx": "",
    "scd evaluate": f"{MEASURED} --num-steps 1 --threads 1",
    "scd play": "--no-browser",
    "scd probe": "--num-clips 2 --context 2 --num-steps 2 --reuse-depths 1 --device cpu",
    "scd protocols": "",
    "scd record doom": "--episodes 3 --frames 48 --workers 1",
    "scd sample": "--context 2 --frames 2 --device cpu",
    "scd sample RUN --prompt": "--seconds 0.5 --precision fp32 --device cpu",
    "scd serve": "--host 127.0.0.1 --device cpu",
    "scd train": f"{SEPARABLE} {BRIEF}",
    "scd train wan-tf": f"{WAN} --validate-every 0 --optim.warmup-steps 0",
    "scd train-autoencoder": (
        "--network small-8 --reconstruction-steps 1 --adversarial-steps 0 --batch-size 2 "
        "--num-frames 1 --num-validation-clips 2 --device cpu"
    ),
    "scd train-judge": "--steps 2 --batch-size 2 --num-frames 2 --width 16 --device cpu",
    "scd weights list": "",
    "scd vbench": "--seeds 1 --seconds 0.3 --precision fp32 --device cpu",
}
"""Beginning of a command, the longest that fits -> flags that make it small."""

ELSEWHERE = {
    "cd scd": "goes into what was cloned",
    "git clone": "needs a repository to clone: benchmarks/first_hour.sh does it",
    "python3 -m venv .venv": ".ci/run does it",
    ". .venv/bin/activate": ".ci/run does it",
    "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu": "installs: .ci/run",
    "pip install": "installs: .ci/run does it with the README's lines",
    "pytest": "these tests",
    "python examples/planning.py": "tests/streaming/test_planning.py runs it",
    "python benchmarks/planning.py": "tests/streaming/test_planning.py runs it",
    "python examples/ppo.py": "tests/streaming/test_planning.py runs it where the package is",
    "accelerate launch --num_processes 8 -m scd train wan-tf": (
        "needs several processes: tests/training/test_sharding.py"
    ),
    "docker compose": "needs a container engine: tests/serving/test_container.py runs its parts",
    "ray start": "needs a cluster",
    "scd data check data/minecraft": "wants 300 frames of each: tests/data/test_published.py",
    "scd data check lerobot:PATH": "needs such a data set: tests/data/lerobot",
    "scd data check hdf5:PATH": "needs such files: tests/data/test_shards.py",
    'scd train doom-play --data "hdf5:PATH?size=64"': "the same",
    'scd train doom-play --data "hdf5:PATH?layout=csgo&size=48x88"': "the same",
    "scd data export lerobot": "tests/data/test_lerobot.py",
    "scd export web": "fetches a package of npm: tests/export/test_site.py",
    'scd train doom-play --data "lerobot:PATH?size=64"': "the same",
    "scd record gym": "needs Box2D: tests/data/test_gym.py records other environments",
    "scd weights i3d": "asks a registry: tests/evaluation/test_i3d.py",
    "scd evaluate runs/out/doom-32 --data data/doom-32 --fvd": (
        "needs published weights: tests/evaluation/test_i3d.py"
    ),
    "scd demo": ".ci/run does it with the README's line",
    "scd intervene": "takes a minute each: tests/probing/test_intervene.py runs them smaller",
    "scd serve runs/out/doom-64 --replicas": "starts Ray: tests/serving/test_serve_ray.py",
    "scd convert wan --lora": "needs a file of others: tests/training/test_lora.py merges some",
    "scd distill wan-consistency": (
        "takes a minute: tests/training/test_wan_consistency.py runs it smaller"
    ),
    "scd distill runs/out/wan-tf": "begins from a causal start: test_wan_consistency.py does too",
    "scd distill wan-dmd": "takes a minute: tests/training/test_wan_end_to_end.py runs it smaller",
    "scd evaluate runs/out/scd-m --data minecraft:data/minecraft": (
        "needs published weights of LPIPS and FVD: tests/evaluation"
    ),
    "MINECRAFT=data/minecraft": "8 GPUs and weeks: tests/test_runs.py",
    "UCF=data/UCF101": "8 GPUs and weeks: tests/test_runs.py",
    "DATA=runs/out/minecraft/paper/data": "8 GPUs and weeks: tests/test_runs.py",
}
"""Beginning of a command, the longest that fits -> why it is not run here."""

CODE_ELSEWHERE = {
    "docs/probing.md": "tests/probing/test_probe_docs.py runs it with a network of others",
    "docs/wan.md": "needs a GPU: tests/sampling/test_text_to_video.py runs the pipeline in small",
}
"""Page whose Python is not run here -> why."""

REPLACED = {
    "docs/protocols.md": {"--protocol NAME": "--protocol toy-8-8"},
    "docs/publish.md": {
        'world.push_to_hub("me/doom-64")\n': "",
        'scd.load("me/doom-64", revision="main")': 'scd.load("doom-64")',
    },
    "docs/your-clips.md": {
        "lerobot:my-robot?size=64": "lerobot:my-robot?size=32",
        "range(300)": "range(20)",
        "< 200": "< 3",
    },
    "docs/train.md": {"model=scd-m": "model=doom-32"},
    "docs/wan.md": {"2.0: the": "0.2: the"},
}
"""Page -> words of its blocks and those that stand in for them: no network, no large model."""

READY = {
    "README.md": ["my-videos"],
    "docs/autoencoders.md": ["my-clips", "DCAE_Minecraft.pth"],
    "docs/datasets.md": ["AUTOENCODER", "data/cars"],
    "docs/engine.md": ["demo/separable"],
    "docs/few-steps.md": ["data/doom-32", "runs/out/doom-32"],
    "docs/metrics.md": ["data/doom-32", "runs/out/doom-32"],
    "docs/play.md": ["data/doom-64", "runs/out/doom-64"],
    "docs/probing.md": ["runs/out/demo/dense"],
    "docs/protocols.md": ["runs/out/demo/separable", "RUN", "DATA"],
    "docs/publish.md": ["data/doom-64", "runs/out/doom-64"],
    "docs/reproduce.md": ["data/UCF101", "data/dmlab"],
    "docs/serving.md": ["runs/out/doom-64"],
    "docs/train.md": ["data/doom-128", "latents"],
    "docs/wan.md": [
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "data/clips",
        "data/game",
        "prompts.txt",
        "cat.png",
    ],
    "docs/your-clips.md": ["my-cars", "my-demos", "my-robot", "my-videos"],
}
"""Page -> what its reader has before the first command; `Made` knows how to make it."""


class Made:
    """What readers have by the time they come to a page, each made once, small."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, where: Path) -> None:
        """Copy one of them into the folder of a reader."""
        kept = self.folder / name
        if not kept.exists():
            self.make(name, kept)
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if kept.is_dir() else shutil.copy)(kept, where / name)

    def make(self, name: str, out: Path) -> None:
        """Make one of them."""
        out.parent.mkdir(parents=True, exist_ok=True)
        layouts = {
            "dmlab": partial(write_dmlab, num_frames=300, size=64),
            "UCF101": write_ucf101,
        }
        kind = Path(name).name
        if kind in layouts:
            layouts[kind](out)
        elif kind == "DCAE_Minecraft.pth":
            torch.save(far_values(), out)
        elif kind == "Wan2.1-T2V-1.3B-Diffusers":
            write_tiny_transformer(write_tiny_parts(out), num_layers=30)
        elif kind in ("clips", "game"):
            write_clips(out, num_actions=3 if kind == "game" else 0)
        elif kind == "prompts.txt":
            out.write_text("\n".join(PROMPTS))
        elif kind == "cat.png":
            Image.fromarray(moving_pictures(1, 40, 40)[0]).save(out)
        elif kind == "my-robot":
            shutil.copytree(ROOT / "tests/data/lerobot/v30_h264", out)
        elif kind == "my-demos":
            out.mkdir()
            for number in range(3):
                with h5py.File(out / f"demo{number}.hdf5", "w") as file:
                    file["observations/rgb"] = moving_pictures(48, 64, 64, seed=number)
                    file["action"] = np.zeros((48, 2), np.float32)
        elif kind == "my-videos":
            out.mkdir()
            for number in range(4):
                pixels = moving_pictures(48, 64, 80, seed=number)
                write_video(out / f"drive{number}.mp4", pixels, fps=10.0, lossless=True)
        elif (
            kind in ("my-clips", "my-cars", "DATA", "cars", "doom-32", "doom-64", "doom-128")
            and "run" not in name
        ):
            self.clips(out, int(kind.rpartition("-")[2]) if kind.startswith("doom") else 64)
        elif kind in ("AUTOENCODER", "latents"):
            self.run(f"train-autoencoder --data {{data/doom-64}} --out {out}.ae")
            if kind == "latents":
                self.run(f"encode {{data/doom-64}} --autoencoder {out}.ae --out {out}")
            else:
                shutil.move(f"{out}.ae", out)
        else:
            preset, data, flags = {
                "RUN": ("doom-64", "{data/doom-64}", SEPARABLE),
                "dense": ("toy-dense", "toy:32", f"{MODEL} --model.num-layers 2"),
                "separable": ("toy", "toy:32", SEPARABLE),
                "doom-32": ("doom-32", "{data/doom-32}", SEPARABLE),
                "doom-64": ("doom-64", "{data/doom-64}", SEPARABLE),
            }[kind]
            self.run(f"train {preset} --data {data} --out {out} {flags} {BRIEF}", added=False)

    def run(self, command: str, added: bool = True) -> None:
        """Run a command; things in braces are made first."""
        for name in re.findall(r"{(.*?)}", command):
            if not (self.folder / name).exists():
                self.make(name, self.folder / name)
        words = re.sub(r"{(.*?)}", lambda one: str(self.folder / one[1]), command)
        flags = SMALL[str(rule_of(f"scd {command}", SMALL))] if added else ""
        assert main([*words.split(), *flags.split()]) == 0, command

    def clips(self, folder: Path, size: int) -> None:
        """Write the clips of the shipped world as recorded ones, six episodes of 48 frames."""
        world, entries = scd.load("doom"), []
        for number, split in enumerate(("train", "val", "test", "train", "val", "train")):
            clip = world.clips[number % 4]
            frames = interpolate((clip.frames + 1) * 127.5, (size, size), mode="area")
            pixels = frames.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            actions = np.asarray(clip.actions)
            entries.append(write_episode(folder, f"e{number}", pixels, actions, 17.5, split))
        card = world.card
        write_card(
            folder,
            DataCard(
                height=size,
                width=size,
                fps=card.fps,
                conditions=card.conditions,
                action_names=card.action_names,
            ),
        )
        write_manifest(folder, entries)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What readers have."""
    return Made(tmp_path_factory.mktemp("made"))


def tables(rows: list[str]) -> Callable[[Path], None]:
    """Return what writes actions beside my-videos, for clips that are made anew."""

    def write(folder: Path) -> None:
        lines = list(itertools.islice(itertools.cycle(rows), 48))
        for video in (folder / "my-videos").glob("*.mp4"):
            video.with_suffix(".csv").write_text("\n".join(lines))
        shutil.rmtree(folder / "my-clips", ignore_errors=True)

    return write


def named_run(folder: Path) -> None:
    """Let RUN be the run of teacher forcing."""
    if not (folder / "RUN").exists():
        (folder / "RUN").symlink_to(folder / "runs/out/wan-tf")


def before_commands(page: str) -> dict[str, Callable[[Path], None]]:
    """Return what a reader of your-clips.md does: tables as the page shows, one kind or another."""
    if page == "docs/wan.md":
        return {" RUN ": named_run}
    if page != "docs/your-clips.md":
        return {}
    shown = [block.text.split() for block in blocks(page) if block.language == "text"]
    return {
        "clips_from_videos.py": tables(["none"]),
        "--actions discrete": tables(shown[0]),
        "--actions continuous": tables(shown[1]),
    }


def names_before(page: str, folder: Path) -> dict[str, Any]:
    """Return the variables that a page's Python takes for given."""
    if page != "docs/your-clips.md":
        return {"scd": scd}
    return {"scd": scd, "simulator": Simulator()}


class Simulator:
    """A loop of one's own: pictures that go by, keys and a mouse."""

    action_space = Dict({"keys": MultiBinary(4), "mouse": Box(-1.0, 1.0, (2,))})

    def reset(self, seed: int) -> None:
        self.action_space.seed(seed)
        self.pictures = iter(moving_pictures(20, 64, 64, seed=seed))

    def step(self, action: dict[str, np.ndarray]) -> np.ndarray:
        assert self.action_space.contains(action)
        return next(self.pictures)


def after_readme(names: dict[str, Any], folder: Path) -> None:
    assert names["frames"][-1].shape == (3, 64, 64)
    assert names["rollout"].num_frames == names["rollout"].num_given + 4 == len(names["frames"])
    assert (folder / "doom.mp4").stat().st_size > 1000
    assert names["seen"].shape == (8, 6, 3, 64, 64) and names["best"].shape == (6,)
    assert names["env"].observation_space.shape == (64, 64, 3)
    (block,) = code("README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    assert (folder / "run/evaluation.json").is_file()


def after_environments(names: dict[str, Any], folder: Path) -> None:
    assert names["frames"].shape == (4, 6, 3, 64, 64)


def after_clips(names: dict[str, Any], folder: Path) -> None:
    assert main(["data", "check", str(folder / "my-own")]) == 0
    assert scd.WorldEnv(scd.load(folder / "run-own")).action_space == Simulator.action_space
    for first in ("From videos", "From a LeRobot", "From an env", "From HDF5", "From a loop"):
        text = (ROOT / "docs/your-clips.md").read_text("utf-8")
        part = text[text.index(f"\n## {first}") :].split("\n## ")[1].split("From there:")[-1]
        shown = re.findall(r"^```(?:console|python)\n(.*?)^```", part, re.M | re.S)
        assert 1 <= len("".join(shown).splitlines()) <= 6, f"{first}: six lines at most"
    card = json.loads((folder / "my-clips/dataset.json").read_text())
    shown = [json.loads(one.text) for one in blocks("docs/your-clips.md") if one.language == "json"]
    assert set(shown[0]) <= set(card)
    line = (folder / "my-clips/manifest.jsonl").read_text().splitlines()[0]
    assert set(json.loads(line)) == set(shown[1])


def after_serving(names: dict[str, Any], folder: Path) -> None:
    assert names["frame"].pixels.shape == (64, 64, 3) and names["frame"].header.frame == 20
    (block,) = code("docs/serving.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


AFTER = {
    "README.md": after_readme,
    "docs/environments.md": after_environments,
    "docs/serving.md": after_serving,
    "docs/your-clips.md": after_clips,
}
"""Page -> what must hold when it was read."""

READ = [page for page in pages() if any(one.language in {CODE} | COMMANDS for one in blocks(page))]
SLOW = {"docs/wan.md"}
"""Pages that take a minute: thirty layers, though tiny ones."""


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, brief_bench: None, no_pictures: None) -> None:
    """Little measuring, and the number of threads as it was."""
    monkeypatch.setattr(fit, "NUM_MEASURED_BATCHES", 1)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "page", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in READ]
)
def test_a_page_runs_from_top_to_bottom(page, made, tmp_path, monkeypatch, brief):
    for name in ("examples", "benchmarks", "scd"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in READY.get(page, ()):
        made.put(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    reader = Reader(
        tmp_path,
        SMALL,
        ELSEWHERE,
        REPLACED.get(page, {}),
        before_commands(page),
        names_before(page, tmp_path),
    )
    for block in blocks(page):
        if block.language != CODE or page not in CODE_ELSEWHERE:
            reader.run_block(block)
    if page in AFTER:
        AFTER[page](reader.names, tmp_path)


def test_every_block_is_of_a_known_kind():
    for block in itertools.chain.from_iterable(map(blocks, pages())):
        known = {CODE} | COMMANDS | SHOWN
        assert block.language in known, f"{block.where}: say which of {sorted(known)} it is"
        if block.language == CODE:
            compile(block.text, block.where, "exec")
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "text":
            typed = re.findall(r"^\$? ?(?:scd|python|pip) .*", block.text, re.M)
            assert not typed, f"{block.where}: commands stand in bash blocks, got {typed}"


def commands() -> list[str]:
    """Commands of all pages."""
    shown = (one for page in pages() for one in blocks(page) if one.language in COMMANDS)
    return [command for block in shown for command in block.commands()]


def test_every_rule_has_its_command():
    rules = {**SMALL, **ELSEWHERE}
    used = {rule_of(one, rules) or rule_of(LAUNCHER.sub("scd ", one), rules) for one in commands()}
    assert not set(rules) - used, "no page shows these any more"
    assert set(REPLACED) | set(READY) | set(AFTER) | set(CODE_ELSEWHERE) <= set(READ)
    for page, changes in REPLACED.items():
        text = (ROOT / page).read_text("utf-8")
        assert all(words in text for words in changes), page
    for reason in [*ELSEWHERE.values(), *CODE_ELSEWHERE.values()]:
        for name in re.findall(r"(?:tests|benchmarks)/[\w/.]+", reason):
            assert (ROOT / name).exists(), reason


def test_a_command_without_a_rule_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="page.md:3: no rule for 'scd dance'.*ELSEWHERE"):
        Reader(tmp_path, SMALL, ELSEWHERE).run_command("scd dance", "page.md:3")


NOT_RUN = sorted(
    {
        LAUNCHER.sub("scd ", one)
        for one in commands()
        if LAUNCHER.sub("scd ", one).startswith("scd ")
        and rule_of(LAUNCHER.sub("scd ", one), {**SMALL, **ELSEWHERE}) in ELSEWHERE
    }
)


@pytest.mark.parametrize("command", NOT_RUN)
def test_flags_of_commands_that_are_not_run_exist(command: str):
    # Flags of a kind of clips belong into the name of the clips.
    words = flags_to_name(shlex.split(command)[1:])
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    takes_name = names[0] in ("train", "convert", "intervene", "record", "export")
    takes_name = takes_name or names[:2] in (["distill", "wan-dmd"], ["distill", "wan-consistency"])
    page = help_of(names[: 2 if takes_name else 1])
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", page), f"{flag} is no flag of scd {' '.join(names)}"


def test_what_the_page_of_reliability_runs_is_there():
    """Its commands are tests of their own: each file is there, and each word of -k chooses some."""
    text = (ROOT / "docs/reliability.md").read_text("utf-8")
    shown = re.findall(r"`(pytest [^`]*)`", text)
    assert len(shown) >= 15
    for command in shown:
        words = shlex.split(command)
        sources = [(ROOT / name).read_text("utf-8") for name in words if name.startswith("tests/")]
        for part in words[words.index("-k") + 1].split(" or ") if "-k" in words else ["test_"]:
            assert any(re.search(rf"^def test_\w*{part}", one, re.M) for one in sources) or (
                part == "test_" and sources
            ), command
    assert all((ROOT / name).is_file() for name in re.findall(r"(?<!/)\btools/\w+\.py", text))
