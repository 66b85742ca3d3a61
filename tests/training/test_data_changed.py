"""A run that is continued on other data than it began with says so; a damaged checkpoint is passed
over by naming an older one."""

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scd.cli import main
from scd.common.config import ADDED
from scd.common.runlog import read_log
from scd.data.clip import frames_to_pixels
from scd.data.fingerprint import fingerprint
from scd.data.folder import FolderSource
from scd.data.manifest import read_manifest, write_card, write_episode, write_manifest
from scd.data.source import DataCard, open_source
from scd.data.spaces import ConditionSpec
from scd.data.toy import ToyWorld
from scd.models.checkpoint import load_optimizers
from scd.training.folder import DATA_FILE

NUM_EPISODES = 6

TRAIN = (
    "train toy --data {} --out run --batch-size 1 --num-frames 4 --log-every 1 --save-every 2 "
    "--validate-every 0 --sample-every 0 --keep-checkpoints 3 --threads 1 --device cpu "
    "--model.block.width 16 --model.block.head-dim 16 --model.block.rotary-axes 4 6 6 "
    "--model.encoder.num-layers 1 --model.decoder.num-layers 1 --sampling.num-steps 1 "
    "--optim.decay-fraction 0"
)


def train(steps, *more, data="clips"):
    return main([*TRAIN.format(data).split(), "--max-steps", str(steps), *more])


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    """Some short episodes of the toy world, as files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    source, entries = ToyWorld(32, "train"), []
    for number in range(NUM_EPISODES):
        clip = source.read(number, 0, 8)
        assert clip.actions is not None
        pixels, actions = frames_to_pixels(clip.frames).numpy(), clip.actions.numpy()
        entries.append(write_episode(Path("clips"), f"e{number}", pixels, actions, 10.0, "train"))
    write_card(Path("clips"), source.card)
    write_manifest(Path("clips"), entries)
    return Path("clips")


def fewer(clips):
    write_manifest(clips, read_manifest(clips)[1:])


def more(clips):
    (first, *_) = entries = read_manifest(clips)
    shutil.copy(clips / first.video, clips / "videos/new.mp4")
    write_manifest(clips, [*entries, replace(first, video="videos/new.mp4")])


def shift(clips):
    for path in (clips / "actions").iterdir():
        np.savez(path, actions=np.roll(np.load(path)["actions"], 1))


def cut(clips):
    path = clips / "videos/e3.mp4"
    path.write_bytes(path.read_bytes()[:1000])


def other_video(clips):
    shutil.copy(clips / "videos/e2.mp4", clips / "videos/e3.mp4")


def order(clips):
    write_manifest(clips, read_manifest(clips)[::-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fewer, ["it has 5 episodes and had 6", "gone or unreadable: videos/e0.mp4"]),
        (more, ["it has 7 episodes and had 6", "new: videos/new.mp4"]),
        (shift, ["changed: videos/e0.mp4 (actions), videos/e1.mp4 (actions)", "and 3 more"]),
        (cut, ["it has 5 episodes and had 6", "gone or unreadable: videos/e3.mp4"]),
        (other_video, ["changed: videos/e3.mp4 (video)"]),
        (order, ["its episodes are in another order"]),
    ],
)
def test_a_run_on_other_data_is_refused_with_what_changed(clips, change, words, capsys):
    assert train(2) == 0
    change(clips)
    capsys.readouterr()
    assert train(4) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("scd: clips is not the data that run was trained on")
    assert all(word in said for word in [*words, "--data-changed goes on with it"]), said
    assert train(4, "--data-changed") == 0
    (event,) = read_log(Path("run"), "data changed")
    assert event["step"] == 2 and words[0].split(" (")[0] in event["how"]
    # From now on this is the run's data.
    assert train(6) == 0


def test_the_same_data_elsewhere_goes_on_and_other_data_there_does_not(clips, capsys):
    assert train(2) == 0
    clips.rename("moved")
    shutil.copytree("moved", "copy")
    for steps, data in ((3, "moved"), (4, "copy")):
        assert train(steps, data=data) == 0
    shift(Path("moved"))
    assert train(5, data="moved") == 2
    assert "moved is not the data that run was trained on: changed" in capsys.readouterr().err
    # Another kind of data, or another rate, is another setting.
    assert train(5, data="toy:32") == train(5, data="copy?fps=5") == 2
    assert capsys.readouterr().err.count("holds a run with other settings") == 2


def test_a_run_of_a_time_when_cards_said_less_goes_on(clips):
    assert train(2) == 0
    path = Path("run") / DATA_FILE
    kept = json.loads(path.read_text())
    for settings, kind in ((kept["card"], DataCard), (kept["card"]["conditions"], ConditionSpec)):
        added = [one.name for one in fields(kind) if one.metadata.get(ADDED)]
        assert added and set(added) <= set(settings)
        for name in added:
            del settings[name]
    path.write_text(json.dumps(kept))
    assert train(4) == 0 and (Path("run") / "step_000004").is_dir()


def test_stored_latents_that_changed_are_refused(clips, capsys):
    encode = "encode clips --autoencoder pixels --device cpu --num-frames 8 --out"
    assert main([*encode.split()[:-3], "--out", "latents"]) == 0
    assert train(2, data="latents") == 0
    shift(clips)
    shutil.rmtree("latents")
    assert main([*encode.split()[:-3], "--out", "latents"]) == 0
    capsys.readouterr()
    assert train(3, data="latents") == 2
    assert "changed: episode 0 (actions), episode 1 (actions)" in capsys.readouterr().err


def test_a_fingerprint_tells_what_lies_in_the_middle_of_actions(clips):
    before = fingerprint(open_source("clips", "train"))
    assert before == fingerprint(open_source(str(clips.absolute()), "train"))
    actions = np.load(clips / "actions/e4.npz")["actions"]
    actions[4] = (actions[4] + 1) % 5
    np.savez(clips / "actions/e4.npz", actions=actions)
    after = fingerprint(open_source("clips", "train"))
    differing = [
        one[0]
        for one, other in zip(before["episodes"], after["episodes"], strict=True)
        if one != other
    ]
    assert differing == ["videos/e4.mp4"]


@pytest.mark.parametrize(
    "name", ["manifest.jsonl", "dataset.json", "actions/e1.npz", "videos/e1.mp4"]
)
def test_a_pipe_in_the_place_of_a_file_is_refused_by_name(clips, name):
    """Nobody writes into it, so reading it would never end."""
    (clips / name).unlink()
    os.mkfifo(clips / name)
    with pytest.raises(ValueError, match=f"{name} is no file but a pipe"):
        FolderSource(clips, "train", strict=True)


@pytest.mark.parametrize("damaged", ["raw.safetensors", "optimizer.pt", "gone"])
def test_a_damaged_checkpoint_names_the_older_one_from_which_the_run_goes_on(
    clips, damaged, tmp_path, capsys
):
    assert train(4) == 0
    shutil.copytree("run", "sound")
    newest = Path("run/step_000004")
    if damaged == "gone":
        shutil.rmtree(newest)
    else:
        (newest / damaged).write_bytes(b"x")
    capsys.readouterr()
    assert train(6) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    advice = "--from step_000002 goes on from that checkpoint, and steps 3 to 4 are trained again"
    assert said.endswith(advice), said
    assert damaged == "gone" or damaged in said
    assert train(6, "--from", "step_000002") == 0
    # The same as if nothing had been damaged.
    Path("run").rename("again")
    Path("sound").rename("run")
    assert train(6) == 0
    for name in ("raw.safetensors", "model.safetensors"):
        one, other = (Path(run) / "step_000006" / name for run in ("run", "again"))
        assert one.read_bytes() == other.read_bytes()
    one, other = (load_optimizers(Path(run) / "step_000006") for run in ("run", "again"))
    for key, state in one[0]["state"].items():
        assert all(
            torch.equal(value, other[0]["state"][key][name]) for name, value in state.items()
        )


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(clips, capsys):
    assert train(2, "--from", "step_000002") == 2
    assert "run holds no run yet" in capsys.readouterr().err
    assert train(4) == 0
    assert train(6, "--from", "step_000003") == 2
    assert "there are step_000002, step_000004" in capsys.readouterr().err
    shutil.rmtree("run/step_000002")
    Path("run/step_000004/raw.safetensors").write_bytes(b"x")
    assert train(6) == 2
    assert "run has no older checkpoint, so begin again" in capsys.readouterr().err
