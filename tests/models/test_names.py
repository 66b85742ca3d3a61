"""Worlds by name, their clips, and what is written to pass them on."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import scd
from scd.models import names, shipped
from scd.models.about import read_about
from scd.models.checkpoint import World, load_world, resolve, save_world
from scd.models.clips import CLIPS_FILE, Clips
from scd.models.names import WORLDS, find_world
from tests.tiny_hub import TOKEN, on_hub, running_hub


def clips_of(world: World, num_frames: int = 5) -> Clips:
    size = (2, num_frames, 3, world.card.height, world.card.width)
    generator = torch.Generator().manual_seed(0)
    return Clips(
        frames=torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        actions=torch.randint(0, 5, size[:2], generator=generator),
        fps=world.card.fps,
    )


def same_weights(one: World, other: World) -> bool:
    theirs = other.model.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in one.model.state_dict().items())


def test_a_shipped_world_goes_by_its_name():
    world = scd.load("doom")
    assert same_weights(world, load_world(WORLDS / "doom"))
    assert world.folder == find_world("doom") == WORLDS / "doom"
    best = names.shipped_names()[0]
    assert shipped.shipped_world() == WORLDS / best and best in names.BEST
    assert world.card.action_names == ("none", "forward", "left", "right")
    assert len(world.clips) == 4 and not world.begins_from_nothing
    clip = world.clips[-1]
    assert clip.fps == world.card.fps and len(clip) == 48
    clips = shipped.read_clips("scd/worlds/doom") or pytest.fail("no clips")
    assert torch.equal(clip.frames, clips.pixels(3)) and torch.equal(clip.actions, clips.actions[3])


def test_a_folder_that_is_a_world_comes_before_a_shipped_name(tiny_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doom").mkdir()
    assert find_world("doom") == WORLDS / "doom"
    (tmp_path / "doom").rmdir()
    save_world(tiny_world, tmp_path / "doom")
    assert same_weights(scd.load("doom"), tiny_world)
    assert same_weights(World.from_pretrained(tmp_path / "doom"), tiny_world)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dom", r"no world 'dom'; did you mean 'doom'\? There are doom, .*folders"),
        ("doom-techer", r"did you mean 'doom-teacher'\? There are doom-teacher, doom"),
        ("mnist", r"no world 'mnist'\. There are .*doom, doom-teacher"),
        ("/no/such/place", "no world '/no/such/place'"),
        ("nobody/nothing", r"no folder nobody/nothing, and the hub did not give it .*hf download"),
        ("two words/x", "no folder two words/x"),
    ],
)
def test_an_unknown_name_says_which_there_are(name, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=words):
        scd.load(name)


def test_what_is_no_name_is_refused(tmp_path, tiny_world):
    with pytest.raises(ValueError, match="named by a text or a path.*got ''"):
        find_world("")
    with pytest.raises(ValueError, match="'main' has a meaning on the hub only, not for doom"):
        scd.load("doom", revision="main")
    folder = save_world(tiny_world, tmp_path / "world")
    with pytest.raises(ValueError, match="on the hub only"):
        scd.load(folder, revision="main")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a world"):
        scd.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="device must be auto, cpu, .* got 'gpu'"):
        scd.load("doom", device="gpu")


def test_wrong_types_of_a_name_are_refused_where_types_are_not_checked():
    code = """
import scd
for given in ({"name": None}, {"name": 3}, {"name": ["doom"]}, {"name": "doom", "weights": "last"}):
    try:
        scd.load(**given)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert [line.rpartition("got ")[2] for line in lines] == ["None", "3", "['doom']"]
    assert all("such as 'doom'" in line for line in lines)
    assert last == "weights must be 'ema' or 'raw', got 'last'"


def test_an_installation_without_worlds_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "WORLDS", tmp_path / "worlds")
    with pytest.raises(FileNotFoundError, match="no worlds of its own .*install a whole one"):
        scd.load("doom")


def test_a_world_of_a_newer_format_says_to_update(tiny_world, tmp_path):
    folder = save_world(tiny_world, tmp_path / "world")
    config = json.loads((folder / "config.json").read_text())
    for format, words in (("scd-2", "newer scd wrote it than this .*update"), ("x", "'x'$")):
        (folder / "config.json").write_text(json.dumps(config | {"format": format}))
        with pytest.raises(ValueError, match=f"needed format 'scd-1', got .*{words}"):
            scd.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"begins_from_nothing": 1}))
    with pytest.raises(ValueError, match="begins_from_nothing must be true or false, got 1"):
        scd.load(folder)


def test_a_world_is_passed_on_with_clips_and_a_card(tiny_world, tmp_path):
    tiny_world.clips, tiny_world.begins_from_nothing = clips_of(tiny_world), True
    folder = tiny_world.save_pretrained(tmp_path / "mine")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "clips.safetensors",
        "config.json",
        "model.safetensors",
    ]
    again = World.from_pretrained(folder)
    assert same_weights(again, tiny_world) and again.begins_from_nothing
    assert again.card == tiny_world.card and again.sampling == tiny_world.sampling
    assert torch.equal(again.clips.frames, tiny_world.clips.frames)
    # A second time over the first; a card that was edited stays.
    (folder / "README.md").write_text("My world.")
    tiny_world.clips = clips_of(tiny_world, 3)
    tiny_world.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "My world."
    assert World.from_pretrained(folder).clips[0].frames.shape[0] == 3
    (folder / "diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match="diary.txt"):
        tiny_world.save_pretrained(folder)
    assert (folder / "diary.txt").is_file()


def test_the_card_of_a_run_says_how_it_was_trained(tiny_world, tmp_path):
    step = save_world(tiny_world, tmp_path / "run" / "step_000040")
    (tmp_path / "run" / "last").write_text(step.name)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": f"{tmp_path}/dunes-64"}))
    progress = {"step": 12_000, "num_ema_updates": 1, "num_processes": 1, "elapsed_s": 3900.0}
    (step / "progress.json").write_text(json.dumps(progress))
    folder = scd.load(tmp_path / "run").save_pretrained(tmp_path / "mine")
    text = (folder / "README.md").read_text()
    assert "\n| trained | 12,000 steps on dunes-64 in 65 min |\n" in text
    assert str(tmp_path) not in text
    assert "in the row `trained` above" in text
    # What was passed on says the same when it is passed on once more.
    again = scd.load(folder).save_pretrained(tmp_path / "yours")
    assert read_about(again).trained == "12,000 steps on dunes-64 in 65 min"
    # One that was made here and now knows of no run.
    assert "as a row `trained` of the table" in tiny_world.model_card("mine")


def test_a_world_without_clips_says_so(tiny_world, tmp_path):
    folder = tiny_world.save_pretrained(tmp_path / "mine")
    assert not (folder / CLIPS_FILE).exists()
    world = scd.load(folder)
    assert len(world.clips) == 0 and list(world.clips) == []
    with pytest.raises(IndexError, match="carries no clip 0; clips are none: begin from frames"):
        world.clips[0]
    (folder / CLIPS_FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no clips"):
        _ = scd.load(folder).clips
    save_file({"frames": torch.zeros(1)}, folder / CLIPS_FILE)
    with pytest.raises(ValueError, match="holds no clips"):
        _ = scd.load(folder).clips


def test_clips_are_a_sequence(tiny_world):
    clips = clips_of(tiny_world)
    assert [len(clip) for clip in clips] == [5, 5]
    assert torch.equal(clips[1:][0].frames, clips[-1].frames)
    with pytest.raises(IndexError, match=r"no clip 2; clips are 0 \.\. 1"):
        clips[2]


def test_the_code_of_a_card_runs(tiny_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, clips in enumerate((None, clips_of(tiny_world))):
        tiny_world.own_clips = clips
        folder = tiny_world.save_pretrained(tmp_path / f"world{number}")
        text = (folder / "README.md").read_text()
        assert "one of 5 actions per frame: none, up, down, left, right" in text
        assert ("2 of 5 frames" in text) == (clips is not None)
        front = text.split("---\n")[1]
        assert front.startswith("library_name: scd\ntags:\n- world-model\n")
        (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        exec(compile(code, "card", "exec"), {})
        assert (tmp_path / "stream.mp4").stat().st_size > 0
        (tmp_path / "stream.mp4").unlink()


PUSH = """
import scd
world = scd.load({folder!r})
print(world.push_to_hub({name!r}, token={token!r}))
"""


LOAD = """
import scd
for revision in (None, "main", {sha!r}):
    world = scd.load("me/dunes", revision=revision)
    print(world.folder.name, len(world.clips))
for name, revision in (("me/dunes", "later"), ("me/moon", None)):
    try:
        scd.load(name, revision=revision)
    except FileNotFoundError as error:
        print(error)
for name, token in (("me/moon", "hf_other"), ("them/moon", {token!r})):
    try:
        world.push_to_hub(name, token=token)
    except OSError as error:
        print(error)
"""


@pytest.mark.parametrize("model_config", ["separable"], indirect=True)
def test_what_is_pushed_is_loaded_again_from_the_hub(tiny_world, tmp_path):
    tiny_world.clips = clips_of(tiny_world)
    folder = str(tiny_world.save_pretrained(tmp_path / "mine"))
    with running_hub() as hub:
        push = PUSH.format(folder=folder, name="me/dunes", token=TOKEN)
        pushed = on_hub(push, hub.address, tmp_path / "a")
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.split() == [f"{hub.address}/me/dunes"]
        files, sha = hub.files["me/dunes"], hub.sha("me/dunes")
        assert sorted(files) == sorted(path.name for path in Path(folder).iterdir())
        assert files["model.safetensors"] == (Path(folder) / "model.safetensors").read_bytes()
        assert 'scd.load("me/dunes")' in files["README.md"].decode()
        loaded = on_hub(LOAD.format(sha=sha, token=TOKEN), hub.address, tmp_path / "b")
        assert loaded.returncode == 0, loaded.stderr
        *found, later, moon, other, them = loaded.stdout.splitlines()
        assert found == [f"{sha} 2"] * 3
        assert "the hub has no such revision of me/dunes" in later
        assert "the hub shows no me/moon to this account" in moon
        assert "the hub did not take me/moon" in other and "the hub did not take them" in them
        assert list(hub.files) == ["me/dunes"]
        address = hub.address
    # The hub is gone; what was loaded once is there still.
    again = on_hub("import scd\nprint(scd.load('me/dunes').folder)", address, tmp_path / "b")
    assert again.returncode == 0 and again.stdout.strip().endswith(sha)


@pytest.mark.parametrize("model_config", ["separable"], indirect=True)
def test_a_hub_that_never_answers_is_given_up_soon(tiny_world, tmp_path):
    folder = str(save_world(tiny_world, tmp_path / "mine"))
    code = """
import time, scd
from scd.common import hub
hub.CONTACT_S = 0.5
began = time.monotonic()
try:
    scd.load("nobody/nothing")
except FileNotFoundError as error:
    print(error)
try:
    scd.load({folder!r}).push_to_hub("me/dunes", token="hf_none")
except OSError as error:
    print(error)
assert time.monotonic() - began < 20
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = on_hub(code.format(folder=folder), address, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    load, push = done.stdout.splitlines()
    assert "no folder nobody/nothing, and the hub did not give it" in load and "copy it" in load
    assert "the hub did not take me/dunes" in push and "it needs a network" in push


def test_without_a_network_a_push_says_what_it_needs(tiny_world, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="did not take me/world .*needs a network, and an account"):
        tiny_world.push_to_hub("me/world", token="hf_none")
    with pytest.raises(ValueError, match="'a/b/c' is no name on the hub"):
        tiny_world.push_to_hub("a/b/c")


def test_commands_take_the_name_of_a_shipped_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("doom") == WORLDS / "doom"
    (tmp_path / "doom").mkdir()
    # What lies under the name comes first, and is no world.
    with pytest.raises(FileNotFoundError, match="doom is neither a world"):
        resolve("doom")
    with pytest.raises(FileNotFoundError, match="did you mean 'doom'"):
        resolve("dooom")
