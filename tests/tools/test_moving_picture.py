"""The moving picture of README.md: every frame is the stream's, the key that led to it is lit."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scd.data.clip import Conditions, pixels_to_frames
from scd.models.checkpoint import load_world, save_world
from scd.models.shipped import CLIPS_FILE
from scd.streaming.rollout import Rollout
from tests.servers import tiny_clips, tiny_playable
from tools import moving_picture
from tools.moving_picture import KEYS, LIT, UNLIT, PictureConfig, drawn, held

NAMES = ("none", "forward", "left", "right")


@pytest.fixture
def config(tmp_path) -> PictureConfig:
    """A picture of a tiny world, begun with two frames of its second clip."""
    world = tiny_playable()
    clips = tiny_clips(world.card.conditions.num_actions)
    folder = tmp_path / "world"
    save_world(replace(world, card=replace(world.card, action_names=NAMES)), folder)
    save_file({"frames": clips.frames, "actions": clips.actions}, folder / CLIPS_FILE)
    return PictureConfig(
        run=str(folder),
        given=2,
        play="forward*2 left*1",
        height=200,
        quality=90,
        out=tmp_path / "played.webp",
    )


def test_frames_are_those_of_a_stream_steered_by_the_keys(config):
    frames, labels, fps = moving_picture.streamed(config)
    assert labels == ["given", "given", "forward", "forward", "left"] and fps == 10.0
    clips = tiny_clips(len(NAMES))
    rollout = Rollout(load_world(config.run), seed=config.seed)
    rollout.begin(clips.pixels(1, 2)[None], Conditions(actions=clips.actions[1:2, :2]))
    made = torch.cat([rollout.step(torch.tensor([action])) for action in (1, 1, 2)])
    wanted = torch.cat([clips.pixels(1, 2), made])
    shown = torch.stack(
        [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in frames]
    )
    shown = shown.view(5, frames[0].height, frames[0].width, 3)
    # Half a step of 8 bits.
    torch.testing.assert_close(pixels_to_frames(shown), wanted.clamp(-1, 1), atol=1 / 255, rtol=0)


def test_the_file_moves_at_the_world_s_pace_and_repeats(config):
    moving_picture.write_picture(config)
    with Image.open(config.out) as picture:
        assert picture.format == "WEBP"
        assert getattr(picture, "n_frames", 1) == 5 and picture.info["loop"] == 0
        picture.load()
        assert picture.info["duration"] == 100


@pytest.mark.parametrize("label", [*KEYS, "none", "given"])
def test_the_key_that_is_held_is_lit(label):
    picture = drawn(Image.new("RGB", (64, 64)), label, 3, 320)
    colours = {name: 0 for name in (LIT, UNLIT)}
    for count, colour in picture.getcolors(2**20) or []:
        if colour in colours:
            colours[colour] += count
    num_lit = int(label in KEYS)
    assert (colours[LIT] > 500) == bool(num_lit)
    assert colours[UNLIT] > 500 * (len(KEYS) - num_lit)


def test_bad_play_says_what_was_needed(config):
    for play in ("back*3", "forward", "forward*x"):
        with pytest.raises(ValueError, match=r"needed NAME\*FRAMES with a name of \['none', 'forw"):
            held(play, NAMES)
    with pytest.raises(ValueError, match="has no clip 9"):
        moving_picture.streamed(replace(config, clip=9))
