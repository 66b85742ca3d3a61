"""Small collections in the layouts of the published ones, written as the originals are."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

CLASSES = ("ApplyEyeMakeup", "BabyCrawling", "HandstandPushups")


def moving_pictures(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A bright square that moves over a gradient; episodes differ by their seed."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.empty((num_frames, height, width, 3), np.uint8)
    for frame in range(num_frames):
        pixels[frame] = (rows * 2 + columns + 40 * seed)[..., None] % 128
        left = (frame * 2 + seed * 5) % (width - 4)
        pixels[frame, 2:6, left : left + 4] = 250
    return pixels


def write_lossy(path: Path, pixels: np.ndarray, codec: str, fps: float, b_frames: int = 2) -> None:
    """Write a video as published ones are: colour at half size, frames that look ahead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.gop_size = 12
        stream.codec_context.bit_rate = 2_000_000
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_minecraft(root: Path, num_frames: int = 20, size: int = 32, fars: bool = False) -> Path:
    """Three episodes to learn from and eight held out; TECO's names, or FAR's with lists."""
    folders = ("training", "validation") if fars else ("train", "test")
    for folder, number in zip(folders, (3, 8), strict=True):
        entries = []
        for episode in range(number):
            path = root / folder / str(episode % 2) / f"{episode}.mp4"
            write_lossy(path, moving_pictures(num_frames, size, size, episode), "libx264", 20)
            actions = (np.arange(num_frames) + episode) % 4
            np.savez_compressed(path.with_suffix(".npz"), actions=actions.astype(np.int32))
            written = Path("datasets/minecraft") / path.relative_to(root)
            entries.append(
                {"video_path": str(written), "action_path": str(written.with_suffix(".npz"))}
            )
        if fars:
            name = "minecraft_train.json" if folder == "training" else "minecraft_val.json"
            (root / name).write_text(json.dumps(entries[::-1]))
    return root


def published_latents(num_frames: int, channels: int, side: int, seed: int) -> torch.Tensor:
    """Latents before they are scaled."""
    generator = torch.Generator().manual_seed(seed)
    return 3.5 * torch.randn(num_frames, channels, side, side, generator=generator)


def write_minecraft_latents(root: Path, ending: str, num_frames: int = 20, side: int = 8) -> Path:
    """Two episodes to learn from and four held out, as .pt, .npy, or together with actions."""
    for folder, number in (("training", 2), ("validation", 4)):
        (root / folder).mkdir(parents=True)
        for episode in range(number):
            latents = published_latents(num_frames, 3, side, episode)
            actions = np.arange(num_frames) % 4
            path = root / folder / f"{episode}{ending}"
            if ending == ".pt":
                torch.save(latents, path)
            elif ending == ".npy":
                np.save(path, latents.numpy())
            if ending == ".npz":
                np.savez(path, latents=latents.numpy(), actions=actions)
            else:
                np.savez(path.with_suffix(".npz"), actions=actions)
    return root


def write_dmlab(root: Path, num_frames: int = 20, size: int = 16) -> Path:
    """Two episodes to learn from and four held out."""
    for folder, number in (("train", 2), ("test", 4)):
        (root / folder / "0").mkdir(parents=True)
        for episode in range(number):
            np.savez(
                root / folder / "0" / f"{episode}.npz",
                video=moving_pictures(num_frames, size, size, episode),
                actions=np.arange(num_frames, dtype=np.int64) % 3,
            )
    return root


def write_ucf101(root: Path, num_train: int = 2, num_test: int = 4, num_frames: int = 20) -> Path:
    """Some videos of each class, and the third pair of lists with Windows' line ends."""
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    train, test = [], []
    for index, name in enumerate(CLASSES):
        for number in range(num_train + num_test):
            group = f"g{number + 1:02d}"
            video = f"{name}/v_{name}_{group}_c01.avi"
            pixels = moving_pictures(num_frames + number, 48, 64, index + number)
            write_lossy(root / "UCF-101" / video, pixels, "mpeg4", 25)
            if number < num_train:
                train.append(f"{video} {index + 1}")
            else:
                test.append(video)
    classes = [f"{index + 1} {name}" for index, name in enumerate(CLASSES)]
    for name, lines in (("classInd", classes), ("trainlist03", train), ("testlist03", test)):
        (lists / f"{name}.txt").write_text("\r\n".join([*lines, ""]))
    return root
