"""The moving picture of README.md: a world being played, with the keys that are held.

    python tools/moving_picture.py [RUN] [--out docs/images/cars-played.webp]

Every frame after the given ones is made by the model, from the frames before it and the key that
is lit. One take, begun with a clip of the world; nothing is drawn over the frames. Which keys are
held, and for how long, was tried until the car stayed on the road.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from scd.common.files import file_aside
from scd.data.clip import Conditions, frames_to_pixels
from scd.models.checkpoint import load_world
from scd.models.names import find_world
from scd.models.shipped import read_clips
from scd.streaming.rollout import Rollout

KEYS = {"left": ((0, 1), 180), "up": ((1, 0), 90), "right": ((2, 1), 0), "down": ((1, 1), 270)}
"""Key -> its column and row, and the direction of its arrow in degrees."""

HELD = {"forward": "up", "gas": "up", "brake": "down"}
"""Action -> its key, where that has another name."""

PLAY = (
    "left*5 gas*4 nothing*8 right*3 gas*4 nothing*6 gas*4 nothing*6 gas*6 nothing*6 left*3 gas*4 "
    "nothing*8 brake*5 nothing*5"
)
"""What is held, and for how many frames."""

KEY, GAP = 44, 6
"""Side of a key and space between two, in pixels of the picture."""

PAPER, INK, LIT, UNLIT = (24, 24, 27), (228, 228, 231), (250, 176, 5), (63, 63, 70)
"""Background, text, a key that is held, one that is not; red, green, blue."""


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """A stream, and how it is shown."""

    run: Annotated[str, tyro.conf.Positional] = "cars"
    """World with clips."""
    clip: int = 1
    """Clip to begin with."""
    given: int = 6
    """Frames that are taken of it."""
    play: str = PLAY
    """Actions to hold, each NAME*FRAMES, with _ for the spaces of a name."""
    seed: int = 0
    """Of the noise."""
    height: int = 320
    """Rows of the enlarged frames: 64x64 pixels are drawn as squares of five."""
    quality: int = 70
    """Of the WebP, 0 to 100."""
    out: Path = Path("docs/images/cars-played.webp")
    """The picture."""


def held(play: str, names: Sequence[str]) -> list[int]:
    """Return the action of each frame.

    Args:
        play: as in the settings.
        names: of the world's actions.

    Raises:
        ValueError: an action that the world has not, or no number of frames.
    """
    actions = []
    for word in play.split():
        name, _, count = word.replace("_", " ").partition("*")
        if name not in names or not count.isdecimal():
            raise ValueError(f"needed NAME*FRAMES with a name of {list(names)}, got {word!r}")
        actions += [names.index(name)] * int(count)
    return actions


def streamed(config: PictureConfig) -> tuple[list[Image.Image], list[str], float]:
    """Return given and made frames, what led to each, and frames per second.

    Raises:
        ValueError: the world has no such clip, or not the actions to play.
    """
    folder = find_world(config.run)
    world, clips = load_world(folder), read_clips(folder)
    if clips is None or config.clip >= len(clips.frames):
        raise ValueError(f"{folder} has no clip {config.clip} to begin with")
    names = world.card.action_names
    actions = held(config.play, names)
    rollout = Rollout(world, seed=config.seed)
    given = clips.pixels(config.clip, config.given)[None]
    rollout.begin(given, Conditions(actions=clips.actions[[config.clip], : config.given]))
    made = [rollout.step(torch.tensor([action])) for action in actions]
    pixels = frames_to_pixels(torch.cat([given[0], *made]))
    labels = ["given"] * given.shape[1] + [names[action] for action in actions]
    return [Image.fromarray(frame.numpy()) for frame in pixels], labels, world.card.fps


def drawn(frame: Image.Image, label: str, number: int, height: int) -> Image.Image:
    """Return one picture: the frame, and beside it the keys, one of them lit."""
    width = frame.width * height // frame.height
    panel = 3 * KEY + 4 * GAP + 2 * GAP
    picture = Image.new("RGB", (width + panel, height), PAPER)
    picture.paste(frame.resize((width, height), Image.Resampling.BICUBIC))
    draw = ImageDraw.Draw(picture)
    left, top = width + 2 * GAP, height // 2 - KEY
    for name, ((column, row), degrees) in KEYS.items():
        x, y = left + column * (KEY + GAP), top + row * (KEY + GAP)
        lit = name == HELD.get(label, label)
        draw.rounded_rectangle((x, y, x + KEY, y + KEY), 8, LIT if lit else UNLIT)
        centre = (x + KEY // 2, y + KEY // 2)
        draw.regular_polygon((*centre, KEY // 4), 3, rotation=degrees - 90, fill=INK)
    large, small = ImageFont.load_default(18), ImageFont.load_default(13)
    draw.text((left, top + 2 * (KEY + GAP) + GAP), label, INK, large)
    draw.text((left, height - 26), f"frame {number}", INK, small)
    return picture


def write_picture(config: PictureConfig) -> None:
    """Stream and write one animated picture."""
    frames, labels, fps = streamed(config)
    pictures = [
        drawn(frame, label, number, config.height)
        for number, (frame, label) in enumerate(zip(frames, labels, strict=True))
    ]
    with file_aside(config.out) as aside:
        pictures[0].save(
            aside,
            format="WebP",
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 / fps),
            loop=0,
            quality=config.quality,
            method=6,
        )


if __name__ == "__main__":
    write_picture(tyro.cli(PictureConfig, description=__doc__))
