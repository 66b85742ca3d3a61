"""Rates of frames are compared, and videos brought to one only where somebody asks for it."""

import numpy as np
import pytest
import torch

from scd.cli import main
from scd.data.clip import frames_to_pixels
from scd.data.folder import FolderSource
from scd.data.frame_rate import frames_at, is_same_rate, pool_actions
from scd.data.latents import LatentSource
from scd.data.manifest import write_card, write_episode, write_manifest
from scd.data.source import DataCard, open_source
from scd.data.spaces import ConditionSpec

RATES = {"a": 10.0, "b": 60.0, "c": 30.0}


@pytest.fixture
def mixed(tmp_path):
    """Three videos of 40 frames, whose pictures tell their number, at 10, 60 and 30 frames/s."""
    card = DataCard(
        height=32,
        width=32,
        fps=10.0,
        conditions=ConditionSpec(num_actions=40),
        action_names=tuple(map(str, range(40))),
    )
    pixels = np.broadcast_to(
        np.arange(40, dtype=np.uint8)[:, None, None, None] * 4, (40, 32, 32, 3)
    )
    entries = [
        write_episode(tmp_path, name, pixels, np.arange(40), rate, "train")
        for name, rate in RATES.items()
    ]
    write_card(tmp_path, card)
    write_manifest(tmp_path, entries)
    return tmp_path


def numbers(clip) -> list[int]:
    return (frames_to_pixels(clip.frames)[:, 0, 0, 0] // 4).tolist()


def test_a_moment_shows_the_frame_that_is_on_screen():
    assert frames_at(7, 30.0, 10.0).tolist() == [0, 3, 6]
    assert frames_at(9, 30.0, 16.0).tolist() == [0, 1, 3, 5, 7]
    assert frames_at(3, 10.0, 16.0).tolist() == [0, 0, 1, 1, 2]
    assert frames_at(5, 29.97, 30.0).tolist() == list(range(5))
    for fps, wanted in ((23.976, 10.0), (60.0, 16.0), (12.5, 24.0)):
        frames = frames_at(200, fps, wanted)
        moments = np.arange(len(frames)) / wanted
        # The frame has begun and the next one has not, to a rounding of the rate.
        assert (frames / fps <= moments + 1e-4).all()
        assert ((frames + 1) / fps > moments - 1e-4).all()
        assert frames[-1] <= 199 and len(frames) == pytest.approx(200 / fps * wanted, abs=1)
    assert is_same_rate(29.97, 30.0) and is_same_rate(23.976, 24.0)
    assert not is_same_rate(24.0, 25.0)


def test_actions_are_pooled_over_what_is_passed_over_and_held_where_frames_are():
    frames = frames_at(10, 30.0, 10.0)
    assert frames.tolist() == [0, 3, 6, 9]
    ids = np.array([7, 1, 1, 2, 3, 4, 3, 5, 6, 6])
    assert pool_actions(ids, frames).tolist() == [7, 1, 3, 6]
    assert pool_actions(np.array([0, 1, 2, 3]), np.array([0, 3])).tolist() == [0, 3]
    steering = np.arange(20, dtype=np.float32).reshape(10, 2)
    pooled = pool_actions(steering, frames)
    np.testing.assert_allclose(
        pooled, [steering[0], *(steering[i : i + 3].mean(0) for i in (1, 4, 7))]
    )
    assert pooled.dtype == np.float32
    assert pool_actions(np.array([4, 5, 6]), frames_at(3, 10.0, 16.0)).tolist() == [4, 4, 5, 5, 6]


def test_videos_of_other_rates_than_the_card_says_are_refused(mixed, capsys):
    wanted = r"says 10 frames/s, but of 3 videos 1 of 60, 1 of 30 frames/s, the first is videos/b"
    with pytest.raises(ValueError, match=wanted):
        FolderSource(mixed, "train")
    assert main(["data", "check", str(mixed)]) == 2
    printed = capsys.readouterr()
    assert "1 of 60, 1 of 30" in printed.err and "?fps=10'" in printed.err
    assert main(["data", "check", f"{mixed}?fps=10"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 videos (1 of 60, 1 of 30 frames/s) are brought to 10 frames/s" in printed


def test_videos_are_brought_to_a_rate_by_the_name(mixed):
    source = open_source(f"{mixed}?fps=10", "train")
    assert source.card.fps == 10 and [source.num_frames(i) for i in range(3)] == [40, 7, 14]
    assert numbers(source.read(0, 0, 40)) == list(range(40))
    assert numbers(source.read(1, 2, 4)) == [12, 18, 24, 30]
    clip = source.read(2, 1, 3)
    assert numbers(clip) == [3, 6, 9] and clip.fps == 10
    # All actions are different, so the latest of those since the moment before counts.
    assert clip.actions.tolist() == [3, 6, 9]
    held = open_source(f"{mixed}?fps=16", "train")
    assert numbers(held.read(0, 0, 5)) == held.read(0, 0, 5).actions.tolist() == [0, 0, 1, 1, 2]
    assert "1 of them by showing frames again" in held.oddities()[0]


def test_wrong_rates_in_a_name_are_refused(mixed):
    for name, message in (
        ("?fps=-1", "0 or more, got -1"),
        ("?fps=fast", "needed float, got 'fast'"),
        ("?rate=10", "unknown fields .'rate'."),
        ("?fps", "needed .setting=value"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(f"{mixed}{name}", "train")


def test_latents_keep_the_rate_at_which_they_were_encoded(mixed, tmp_path):
    out = tmp_path / "latents"
    words = ["encode", f"{mixed}?fps=10", "--autoencoder", "pixels", "--out", str(out)]
    assert main([*words, "--device", "cpu"]) == 0
    latents = LatentSource(out, "train")
    assert latents.card.fps == 10 and [latents.num_frames(i) for i in range(3)] == [40, 7, 14]
    # Whoever wants the videos of these latents gets the same frames.
    videos = open_source(str(out), "train")
    assert numbers(videos.read(2, 1, 3)) == [3, 6, 9]
    assert torch.equal(videos.read(1, 0, 7).actions, latents.read(1, 0, 7).actions)
    with pytest.raises(ValueError, match=r"holds latents, which are as they were encoded"):
        open_source(f"{out}?fps=5", "train", latents=True)
