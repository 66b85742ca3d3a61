"""Clips of one's own simulator: what is written is read back, goes on, and is refused if wrong."""

from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary

import scd
from scd.common.files import take_lock
from scd.data.actions import flat, space_of, unflat
from scd.data.clip import frames_to_pixels
from scd.data.folder import FolderSource
from scd.data.manifest import MANIFEST_FILE, read_card, read_manifest
from scd.data.record import record
from scd.data.toy import ToyRecording

MIXED = Dict({"keys": MultiBinary(4), "mouse": Box(-1.0, 1.0, (2,)), "weapon": Discrete(3)})
KEYS = {"keys": ("w", "a", "s", "d")}


def episode(space, num=6, seed=0) -> Any:
    """Noise, and an action of the space for each frame."""
    pixels = np.random.default_rng(seed).integers(0, 256, (num, 8, 12, 3), np.uint8)
    if space is None:
        return pixels, None
    space.seed(seed)
    return pixels, [space.sample() for _ in range(num)]


@pytest.mark.parametrize(
    ("space", "names"),
    [(Discrete(3), ("none", "left", "right")), (Box(-1, 1, (2,)), ()), (MIXED, KEYS), (None, ())],
)
def test_what_is_written_is_read_back(tmp_path, space, names):
    with scd.ClipWriter(tmp_path / "new/own", space, fps=15, names=names) as clips:
        for seed in range(3):
            clips.write(*episode(space, 5 + seed, seed), prompt=f"walk {seed}", terminated=True)
    card = read_card(tmp_path / "new/own")
    assert (card.height, card.width, card.fps) == (8, 12, 15.0)
    assert [one.split for one in read_manifest(clips.folder)] == ["train", "val", "test"]
    assert [one.prompt for one in read_manifest(clips.folder)] == ["walk 0", "walk 1", "walk 2"]
    assert all(one.terminated and one.truncated is None for one in read_manifest(clips.folder))
    if space is not None:
        assert space_of(card.conditions) == space
    if names is KEYS:
        named = ("w", "a", "s", "d", "mouse_0", "mouse_1", "weapon")
        assert card.action_names == named
    for seed, split in enumerate(("train", "val", "test")):
        pixels, actions = episode(space, 5 + seed, seed)
        clip = FolderSource(clips.folder, split, strict=True).read(0, 0, len(pixels))
        assert np.array_equal(frames_to_pixels(clip.frames).numpy(), pixels)
        if actions is None:
            assert clip.actions is None
            continue
        rows = np.stack([flat(card.conditions, action) for action in actions])
        assert np.array_equal(clip.actions.numpy(), rows)
        assert space.contains(unflat(card.conditions, clip.actions[0].numpy()))


def test_the_same_program_again_goes_on(tmp_path):
    def play(num):
        with scd.ClipWriter(tmp_path, Discrete(2), fps=10) as clips:
            while clips.num_episodes < num:
                clips.write(*episode(Discrete(2), seed=clips.num_episodes), rewards=[0.5] * 6)
            return clips.num_episodes

    assert play(2) == 2
    lines = (tmp_path / MANIFEST_FILE).read_text()
    # Cut off while the third episode was noted, and while another one's video was written.
    (tmp_path / MANIFEST_FILE).write_text(lines + lines.splitlines()[0][:40])
    (tmp_path / "videos/.writing-000002.mp4-77").write_bytes(b"half")
    assert play(5) == 5
    assert (tmp_path / MANIFEST_FILE).read_text().startswith(lines)
    entries = read_manifest(tmp_path)
    assert [one.video for one in entries] == [f"videos/{n:06d}.mp4" for n in range(5)]
    assert entries[4].rewards == (0.5,) * 6
    assert not list(tmp_path.rglob(".writing-*"))
    assert sum(FolderSource(tmp_path, split).num_episodes for split in ("train", "val")) == 4


def test_a_writer_killed_at_its_beginning_is_forgotten(tmp_path):
    (tmp_path / ".writing-dataset.json-77").write_text("{")
    scd.ClipWriter(tmp_path, Discrete(2), fps=10).write(*episode(Discrete(2)))
    # Killed between the card and the manifest.
    (tmp_path / MANIFEST_FILE).unlink()
    clips = scd.ClipWriter(tmp_path, Discrete(2), fps=10)
    assert clips.num_episodes == 0
    clips.write(*episode(Discrete(2)))
    assert len(read_manifest(tmp_path)) == 1


def test_one_writer_at_a_time(tmp_path):
    first = scd.ClipWriter(tmp_path / "own", Discrete(2), fps=10)
    first.write(*episode(Discrete(2)))
    with pytest.raises(BlockingIOError, match="own is being written by another process"):
        scd.ClipWriter(tmp_path / "own", Discrete(2), fps=10)
    first.close()
    assert scd.ClipWriter(tmp_path / "own", Discrete(2), fps=10).num_episodes == 1

    settings = ToyRecording(out=str(tmp_path / "toy"), episodes=1, frames=4, workers=1)
    record(settings)
    with (
        take_lock(tmp_path / "toy/lock"),
        pytest.raises(BlockingIOError, match="toy is being written"),
    ):
        record(settings)


def test_other_arguments_and_other_folders_are_refused(tmp_path):
    scd.ClipWriter(tmp_path / "own", Discrete(2), fps=10).write(*episode(Discrete(2)))
    for space, changes in (
        (Discrete(3), {}),
        (Discrete(2), {"fps": 12}),
        (Discrete(2), {"names": ("a", "b")}),
        (Discrete(2), {"val_fraction": 0.2}),
        (None, {}),
    ):
        with pytest.raises(FileExistsError, match="other settings"):
            scd.ClipWriter(tmp_path / "own", space, **({"fps": 10} | changes))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="something else"):
        scd.ClipWriter(tmp_path / "letters", fps=10)
    record(ToyRecording(out=str(tmp_path / "toy"), episodes=1, frames=4, workers=1))
    with pytest.raises(FileExistsError, match="other settings"):
        scd.ClipWriter(tmp_path / "toy", Discrete(5), fps=10)


def test_wrong_episodes_are_refused_and_leave_nothing(tmp_path):
    pixels, actions = episode(Discrete(2))
    mixed = episode(MIXED)[1]
    outside = [{**mixed[0], "mouse": np.array([0.0, 3.0])}, *mixed[1:]]
    for space, given, said in (
        (Discrete(2), (pixels.astype(float), actions), r"8-bit RGB .*float64 \[6, 8, 12, 3\]"),
        (Discrete(2), (pixels[0], actions), r"8-bit RGB .*\[8, 12, 3\]"),
        (Discrete(2), (pixels[:0], actions[:0]), "8-bit RGB"),
        (Discrete(2), (pixels, None), "one action for each of 6 frames, got None"),
        (Discrete(2), (pixels, actions[1:]), "6 frames need as many actions, got 5"),
        (Discrete(2), (pixels, [0, 1, 2, 0, 0, 0]), r"action 2: .*0 .. 1, got 2"),
        (Discrete(2), (pixels, [0.5] * 6), r"action 0: .*a number of 2 choices, got 0.5"),
        (MIXED, (pixels, mixed[0]), "one action for each of 6 frames"),
        (MIXED, (pixels, outside), r"action 0: .*mouse.*-1 .. 1, got 3"),
        (None, (pixels, actions), "need an action_space"),
    ):
        with pytest.raises(ValueError, match=said):
            scd.ClipWriter(tmp_path / "own", space, fps=10).write(*given)
        assert not (tmp_path / "own").exists()
    clips = scd.ClipWriter(tmp_path / "own", Discrete(2), fps=10, num_labels=2)
    for label, said in ((None, "a label of 0 .. 1, got None"), (2, "a label of 0 .. 1, got 2")):
        with pytest.raises(ValueError, match=said):
            clips.write(pixels, actions, label=label)
    with pytest.raises(ValueError, match="6 frames need as many rewards, got 1"):
        clips.write(pixels, actions, label=0, rewards=[1.0])
    with pytest.raises(ValueError, match="train, val and test, got 'extra'"):
        clips.write(pixels, actions, label=0, split="extra")
    clips.write(pixels, actions, label=1)
    with pytest.raises(ValueError, match=r"episode 1: frames are 12 x 8, those before are 8 x 12"):
        clips.write(pixels.swapaxes(1, 2), actions, label=1)
    assert [one.label for one in read_manifest(tmp_path / "own")] == [1]
    for names in ("ab", ("a",)):
        with pytest.raises(ValueError, match="need 2 names"):
            scd.ClipWriter(tmp_path / "x", Discrete(2), fps=10, names=names)
    with pytest.raises(ValueError, match="fps"):
        scd.ClipWriter(tmp_path / "x", fps=0)
