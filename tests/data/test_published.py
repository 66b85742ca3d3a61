"""Published collections: their own layouts are read, and what is wrong with them is said."""

import errno
import json
import logging
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scd.common.runtime import cache_folder
from scd.data import teco as teco_module
from scd.data.clip import frames_to_pixels
from scd.data.loader import Loader
from scd.data.source import EmptySplit, open_source
from scd.data.teco import read_latents
from scd.data.ucf101 import UCF101Config, UCF101Source, square
from scd.data.video import read_video
from scd.preprocessing.encode import EncodeConfig, open_sources
from tests.layouts import (
    CLASSES,
    moving_pictures,
    published_latents,
    write_dmlab,
    write_lossy,
    write_minecraft,
    write_minecraft_latents,
    write_ucf101,
)

MINECRAFT = "minecraft:{}?size=32&frames=20"
DMLAB = "dmlab:{}?size=16&frames=20"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def minecraft(tmp_path_factory):
    return write_minecraft(tmp_path_factory.mktemp("minecraft"))


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory):
    return write_ucf101(tmp_path_factory.mktemp("ucf101"))


@pytest.fixture
def copy(tmp_path):
    return lambda root: shutil.copytree(root, tmp_path / "copy")


def close_to(frames: torch.Tensor, pixels: np.ndarray) -> bool:
    """Whether frames are these pictures but for what a lossy video loses."""
    error = frames_to_pixels(frames).numpy().astype(float) - pixels
    return bool(np.abs(error).mean() < 6)


def test_minecraft_as_teco_published_it(minecraft):
    source = open_source(MINECRAFT.format(minecraft), "train", strict=True)
    assert (source.num_episodes, source.num_frames(0)) == (3, 20)
    assert source.card.conditions.num_actions == 4 and source.card.height == 32
    # Sorted by path: 0/0, 0/2, 1/1.
    for index, episode in enumerate((0, 2, 1)):
        clip = source.read(index, 7, 5)
        assert close_to(clip.frames, moving_pictures(20, 32, 32, episode)[7:12])
        assert clip.actions.tolist() == [(7 + step + episode) % 4 for step in range(5)]
    test, val = (open_source(MINECRAFT.format(minecraft), s, True) for s in ("test", "val"))
    assert (test.num_episodes, val.num_episodes) == (6, 2)
    assert not set(test.episodes) & set(val.episodes)
    with pytest.raises(ValueError, match=r"frames 18 .. 22 were asked for, .* has 20"):
        source.read(0, 18, 5)
    batch = Loader(source, 2, 6, seed=0).batch(0)
    assert batch.frames.shape == (2, 6, 3, 32, 32) and batch.conditions.actions.shape == (2, 6)


def test_minecraft_as_far_copied_it_has_the_order_of_its_lists(tmp_path, caplog):
    root = write_minecraft(tmp_path / "far", fars=True)
    source = open_source(MINECRAFT.format(root), "test", strict=True)
    names = [files[0].name for files in source.episodes]
    assert names == ["7.mp4", "6.mp4", "5.mp4", "4.mp4", "3.mp4", "2.mp4"]
    assert close_to(source.read(0, 0, 20).frames, moving_pictures(20, 32, 32, 7))
    (root / "validation/1/7.mp4").unlink()
    with caplog.at_level(logging.WARNING):
        left = open_source(MINECRAFT.format(root), "test")
    assert left.episodes[0][0].name == "6.mp4" and "left out 1 of" in caplog.text
    with pytest.raises(ValueError, match="validation/1/7.mp4: no such file"):
        open_source(MINECRAFT.format(root), "test", strict=True)
    (root / "minecraft_val.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="minecraft_val.json: needed a list of objects"):
        open_source(MINECRAFT.format(root), "test")


def test_what_is_wrong_with_an_episode_of_minecraft_is_counted(minecraft, copy, caplog):
    root = copy(minecraft)
    write_lossy(root / "test/0/0.mp4", moving_pictures(20, 32, 48), "libx264", 20)
    write_lossy(root / "test/0/2.mp4", moving_pictures(12, 32, 32), "libx264", 20)
    np.savez(root / "test/0/4.npz", actions=np.arange(12) % 4)
    (root / "test/0/6.mp4").write_bytes((root / "test/0/6.mp4").read_bytes()[:900])
    np.savez(root / "test/1/1.npz", actions=np.full(20, 4))
    (root / "test/1/3.npz").unlink()
    with caplog.at_level(logging.WARNING):
        source = open_source(MINECRAFT.format(root), "val")
    assert source.num_episodes == 2
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="has no episodes; the"):
        open_source(MINECRAFT.format(root), "test")
    for name, message in (
        ("0/0.mp4", "0.mp4: frames are 32 x 48, needed 32"),
        ("0/2.mp4", "2.mp4: has 12 frames, needed 20"),
        ("0/4.mp4", "4.npz: 20 frames need as many actions, got 12"),
        ("0/6.mp4", "6.mp4"),
        ("1/1.mp4", r"1.npz: action ids must lie in 0 .. 3, got 4 .. 4; \?actions=N"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(MINECRAFT.format(root), "test", strict=True)
        (root / "test" / name).unlink()


@pytest.mark.parametrize("ending", [".pt", ".npy", ".npz"])
def test_published_latents_need_an_autoencoders_name(tmp_path, ending):
    root = write_minecraft_latents(tmp_path / "latents", ending)
    with pytest.raises(ValueError, match=r"scd encode minecraft:.* --latent-scale 0.2889"):
        open_source(MINECRAFT.format(root), "train")
    source = open_source(MINECRAFT.format(root), "train", strict=True, whole=True)
    clip = source.read(1, 3, 6)
    assert clip.encoded and torch.equal(clip.frames, published_latents(20, 3, 8, 1)[3:9])
    assert clip.actions.tolist() == [3, 0, 1, 2, 3, 0]


def test_damaged_latents_are_refused_by_name(tmp_path):
    for name in ("a.pt", "a.npy", "a.npz"):
        path = tmp_path / name
        path.write_bytes(b"no latents")
        with pytest.raises(ValueError, match=name):
            read_latents(path)
    torch.save({"latents": torch.zeros(3)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"needed latents \[t, c, h, w\], got dict"):
        read_latents(tmp_path / "b.pt")


def test_dmlab(tmp_path, caplog):
    root = write_dmlab(tmp_path / "dmlab")
    source = open_source(DMLAB.format(root), "train", strict=True)
    clip = source.read(1, 4, 7)
    np.testing.assert_array_equal(
        frames_to_pixels(clip.frames).numpy(), moving_pictures(20, 16, 16, 1)[4:11]
    )
    assert clip.actions.tolist() == [1, 2, 0, 1, 2, 0, 1]
    np.savez(root / "test/0/0.npz", video=np.zeros((20, 16, 16, 3), np.float32), actions=[0] * 20)
    np.savez(root / "test/0/1.npz", frames=np.zeros(3))
    (root / "test/0/2.npz").write_bytes((root / "test/0/2.npz").read_bytes()[:5000])
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="has no episodes"):
        open_source(DMLAB.format(root), "test")
    assert "left out 3 of 3 test episodes" in caplog.text and "got float32" in caplog.text
    assert open_source(DMLAB.format(root), "val").num_episodes == 1


def test_ucf101_by_mcvds_protocol(ucf101):
    source = UCF101Source(ucf101, "test", UCF101Config(size=16), strict=True)
    assert names_of(source) == [
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g03_c01.avi",
        "HandstandPushups/v_HandstandPushups_g05_c01.avi",
    ]
    train, val = (UCF101Source(ucf101, s, UCF101Config(size=16)) for s in ("train", "val"))
    assert train.num_episodes == 6 and val.num_episodes == 1
    assert not set(names_of(source)) & set(names_of(val))
    assert [source.num_frames(0), source.num_frames(1)] == [22, 24]
    clip = source.read(1, 9, 8)
    whole = read_video(ucf101 / "UCF-101" / names_of(source)[1])
    assert close_to(clip.frames, by_pillow(whole[9:17], 16))
    assert clip.label is None and clip.actions is None
    assert source.card.conditions.num_labels == 0


def names_of(source: UCF101Source) -> list[str]:
    return ["/".join(files[0].parts[-2:]) for files in source.episodes]


def by_pillow(pixels: np.ndarray, size: int) -> np.ndarray:
    """A second implementation of reducing and cutting the middle."""
    width = int(pixels.shape[2] * size / pixels.shape[1])
    left = round((width - size) / 2)
    pictures = [Image.fromarray(p).resize((width, size), Image.Resampling.BILINEAR) for p in pixels]
    return np.stack([np.asarray(picture)[:, left : left + size] for picture in pictures])


def test_ucf101_by_lattes_protocol(ucf101):
    config = UCF101Config(protocol="latte", size=16, labels=True)
    source = UCF101Source(ucf101, "test", config)
    assert source.num_episodes == 18 and source.card.conditions.num_labels == 3
    assert source.card.fps == pytest.approx(25 / 3)
    assert source.num_frames(0) == 7  # of 20, every third
    clip = source.read(0, 2, 4)
    whole = read_video(ucf101 / "UCF-101" / names_of(source)[0])
    assert close_to(clip.frames, by_pillow(whole[6:16:3], 16))
    assert [source.read(index, 0, 1).label for index in (0, 2, 4)] == [0, 1, 2]
    assert UCF101Config(protocol="latte").filled.size == 256
    assert UCF101Config().filled.size == 64 and UCF101Config().filled.interval == 1


def test_clips_to_learn_from_are_cut_and_mirrored_by_their_place(ucf101):
    train = UCF101Source(ucf101, "train", UCF101Config(size=16))
    plain = open_source(f"ucf101:{ucf101}?size=16", "train", whole=True)
    kinds = set()
    for start in range(12):
        clip, again = train.read(0, start, 4), train.read(0, start, 4)
        assert torch.equal(clip.frames, again.frames)
        middle = plain.read(0, start, 4).frames
        assert clip.frames.shape == middle.shape
        kinds.add((torch.equal(clip.frames, middle), torch.equal(clip.frames.flip(-1), middle)))
    assert (False, False) in kinds
    wide = torch.arange(24.0).expand(1, 3, 16, 24) / 24
    assert torch.equal(square(wide, 16, 0.0), wide[..., :16])
    assert torch.equal(square(wide, 16, 1.0), wide[..., 8:])
    tall = F.interpolate(wide.transpose(-1, -2), size=(12, 8), mode="bilinear", antialias=True)
    assert torch.allclose(square(wide.transpose(-1, -2), 8), tall[..., 2:10, :])


def test_missing_lists_and_misspelt_classes_of_ucf101_are_named(ucf101, copy):
    root = copy(ucf101)
    (root / "UCF-101/HandstandPushups").rename(root / "UCF-101/HandStandPushups")
    with pytest.raises(ValueError, match="HandstandPushups: no such class .* is it HandStandPushu"):
        open_source(f"ucf101:{root}", "test")
    with pytest.raises(FileNotFoundError, match="trainlist01.txt, .*testlist01.txt; videos: http"):
        open_source(f"ucf101:{root}?list=1", "test")
    path = root / "ucfTrainTestlist/testlist03.txt"
    path.write_text("Babycrawling/v_BabyCrawling_g01_c01.avi\n")
    with pytest.raises(ValueError, match="testlist03.txt line 1: needed Class/video.avi"):
        open_source(f"ucf101:{root}", "test")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing list files: .*testlist03.txt"):
        open_source(f"ucf101:{root}", "test")


def test_broken_videos_of_ucf101_are_counted_and_odd_ones_read(ucf101, copy, caplog):
    root = copy(ucf101)
    first = root / "UCF-101" / f"{CLASSES[0]}/v_{CLASSES[0]}_g03_c01.avi"
    first.write_bytes(b"RIFF no video")
    odd = root / "UCF-101" / f"{CLASSES[2]}/v_{CLASSES[2]}_g05_c01.avi"
    write_lossy(odd, moving_pictures(30, 64, 40), "mpeg4", 29.97)
    with caplog.at_level(logging.WARNING):
        source = open_source(f"ucf101:{root}?size=16", "test")
    assert "left out 1 of 2 test episodes" in caplog.text and source.num_episodes == 1
    assert source.read(0, 0, 30).frames.shape == (30, 3, 16, 16)
    with pytest.raises(ValueError, match="g03_c01.avi"):
        open_source(f"ucf101:{root}", "test", strict=True)


def test_names_of_collections_are_checked(minecraft, tmp_path):
    with pytest.raises(ValueError, match="needed minecraft:PATH"):
        open_source("minecraft:", "train")
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\].*known: .*'size'"):
        open_source(f"minecraft:{minecraft}?colour=red", "train")
    with pytest.raises(ValueError, match="size: needed int, got 'big'"):
        open_source(f"minecraft:{minecraft}?size=big", "train")
    with pytest.raises(ValueError, match="protocol: must be one of"):
        open_source(f"ucf101:{minecraft}?protocol=svg", "train")
    with pytest.raises(ValueError, match=r"\?setting=value"):
        open_source(f"ucf101:{minecraft}?size", "train")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; videos: https"):
        open_source(f"minecraft:{tmp_path / 'nowhere'}", "train")
    with pytest.raises(EmptySplit, match="split 'train' has no episodes"):
        open_source(f"dmlab:{minecraft.parent}", "train")


def test_a_list_too_short_for_a_split_of_ucf101_leaves_it_empty(ucf101, copy):
    root = copy(ucf101)
    path = root / "ucfTrainTestlist/testlist03.txt"
    path.write_text("\n".join(path.read_text().split()[:4]))
    with pytest.raises(EmptySplit, match="split 'val' has no episodes$"):
        open_source(f"ucf101:{root}?size=16", "val")
    config = EncodeConfig(data=f"ucf101:{root}?size=16", autoencoder="pixels", out="unused")
    assert list(open_sources(config)) == ["train", "test"]
    for video in (root / "UCF-101").rglob("*.avi"):
        video.write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match="'test' has no episodes; the first was left out because"
    ) as caught:
        open_source(f"ucf101:{root}?size=16", "test")
    assert not isinstance(caught.value, EmptySplit)


def test_a_file_that_could_not_be_opened_once_is_looked_at_again(minecraft, monkeypatch, caplog):
    probe = teco_module.probe_video

    def too_many(path):
        if path.name == "1.mp4":
            raise OSError(errno.EMFILE, "Too many open files")
        return probe(path)

    monkeypatch.setattr(teco_module, "probe_video", too_many)
    assert open_source(MINECRAFT.format(minecraft), "train").num_episodes == 2
    assert "left out 1 of 3 train episodes" in caplog.text
    monkeypatch.setattr(teco_module, "probe_video", probe)
    assert open_source(MINECRAFT.format(minecraft), "train").num_episodes == 3


def test_headers_are_read_once_and_again_when_a_file_changes(minecraft, copy, monkeypatch):
    root = copy(minecraft)
    seen = []
    probe = teco_module.probe_video

    def watched(path):
        seen.append(path.name)
        return probe(path)

    monkeypatch.setattr(teco_module, "probe_video", watched)
    lengths = []
    for _ in range(2):
        source = open_source(MINECRAFT.format(root), "train")
        lengths.append([source.num_frames(episode) for episode in range(3)])
    assert sorted(seen) == ["0.mp4", "1.mp4", "2.mp4"] and lengths[0] == lengths[1] == [20] * 3
    write_lossy(root / "train/1/1.mp4", moving_pictures(25, 32, 32), "libx264", 20)
    np.savez(root / "train/1/1.npz", actions=np.zeros(25, np.int64))
    changed = open_source(MINECRAFT.format(root), "train")
    assert seen[3:] == ["1.mp4"] and changed.num_frames(2) == 25
    stores = list(cache_folder("headers").glob("*.json"))
    assert stores and all(json.loads(store.read_text()) for store in stores)
    stores[0].write_text("{")
    assert open_source(MINECRAFT.format(root), "train").num_episodes == 3
