"""Frames as they are sent: what a decoder makes of them, and when they can be decoded."""

import io

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scd.serving.codec import (
    KEY_INTERVAL,
    Decoder,
    H264Encoder,
    JpegEncoder,
    announced_codec,
    codec_string,
    level_of,
    make_encoder,
)
from scd.serving.messages import Codec


def scene(index: int, height: int = 64, width: int = 48) -> np.ndarray:
    """A smooth picture that moves."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin((rows + speed * index) / 9) + np.cos(columns / 11) for speed in (1, 2, 3)]
    return ((np.stack(waves, -1) + 2) / 4 * 255).astype(np.uint8)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((first.astype(float) - second) ** 2))


def decoded(units: list[bytes]) -> list[np.ndarray]:
    """What a decoder without any knowledge of the encoder makes of access units."""
    context = av.CodecContext.create("h264", "r")
    frames = [frame for unit in units for frame in context.decode(av.Packet(unit))]
    return [frame.to_ndarray(format="rgb24") for frame in frames + context.decode(None)]


def test_jpeg_is_the_frame():
    packed = JpegEncoder(95).encode(scene(3))
    back = np.asarray(Image.open(io.BytesIO(packed.payload)))
    assert packed.key and packed.config is None
    assert back.shape == (64, 48, 3) and psnr(back, scene(3)) > 38
    assert len(JpegEncoder(10).encode(scene(3)).payload) < len(packed.payload)


def test_h264_gives_every_frame_at_once_in_order():
    encoder = H264Encoder(64, 48, 20.0)
    packed = [encoder.encode(scene(index)) for index in range(10)]
    assert [one.key for one in packed] == [True] + [False] * 9
    frames = decoded([one.payload for one in packed])
    assert len(frames) == 10
    assert min(psnr(frame, scene(index)) for index, frame in enumerate(frames)) > 30
    # Without B frames each one is decoded before the next has come.
    context = av.CodecContext.create("h264", "r")
    context.flags |= av.codec.context.Flags.low_delay
    assert [len(context.decode(av.Packet(one.payload))) for one in packed] == [1] * 10


def test_a_restarted_stream_is_decoded_without_its_past():
    encoder = H264Encoder(64, 48, 20.0)
    for index in range(5):
        encoder.encode(scene(index))
    encoder.restart()
    packed = [encoder.encode(scene(index)) for index in range(20, 23)]
    assert [one.key for one in packed] == [True, False, False]
    assert packed[0].config == codec_string(packed[0].payload)
    frames = decoded([one.payload for one in packed])
    assert min(psnr(frame, scene(20 + index)) for index, frame in enumerate(frames)) > 30


def test_key_frames_come_by_themselves():
    encoder = H264Encoder(16, 16, 20.0)
    keys = [encoder.encode(scene(0, 16, 16)).key for _ in range(2 * KEY_INTERVAL + 1)]
    assert [index for index, key in enumerate(keys) if key] == [0, KEY_INTERVAL, 2 * KEY_INTERVAL]


def test_the_codec_string_names_the_baseline_profile():
    config = H264Encoder(64, 64, 20.0).encode(scene(0, 64, 64)).config
    assert config is not None and config.startswith("avc1.42c0") and len(config) == 11
    with pytest.raises(ValueError, match="no sequence parameter set"):
        codec_string(b"\0\0\1\x65abc")


@pytest.mark.parametrize(
    ("height", "width", "fps", "level"),
    [
        # ISO/IEC 14496-10, tables: the largest that a level allows, and a little more.
        (144, 176, 15.0, 10),
        (144, 176, 15.5, 11),
        (288, 352, 7.5, 12),
        (288, 352, 30.0, 13),
        (480, 352, 25.0, 21),
        (480, 720, 15.0, 22),
        (480, 720, 30.0, 30),
        (480, 832, 16.0, 30),
        (480, 832, 60.0, 31),
        (480, 832, 1000.0, 52),
        (480, 832, 1e9, 52),
        (720, 1280, 30.0, 31),
        (720, 1280, 60.0, 32),
        (1080, 1920, 30.0, 40),
        (1080, 1920, 60.0, 42),
        (1088, 2048, 60.0, 42),
        (1104, 2048, 60.0, 50),
        (2160, 3840, 30.0, 51),
        (2160, 3840, 60.0, 52),
        (4320, 7680, 30.0, 60),
        (4320, 7680, 120.0, 62),
        # Few macroblocks, but too many in a row.
        (16, 28 * 16, 1.0, 10),
        (16, 29 * 16, 1.0, 11),
        (64, 64, 0.5, 10),
    ],
)
def test_levels_are_those_of_the_table(height: int, width: int, fps: float, level: int):
    assert level_of(height, width, fps) == level


@pytest.mark.parametrize(
    ("height", "width", "fps"),
    [(64, 64, 60.0), (63, 45, 15.0), (144, 176, 30.0), (480, 832, 16.0), (480, 832, 60.0)],
)
def test_the_stream_has_the_codec_that_was_announced(height: int, width: int, fps: float):
    encoder = H264Encoder(height, width, fps)
    packed = [encoder.encode(scene(index, height, width)) for index in range(3)]
    encoder.restart()
    packed.append(encoder.encode(scene(3, height, width)))
    announced = announced_codec(height, width, fps)
    assert [one.config for one in packed] == [announced, None, None, announced]
    assert announced.endswith(f"{level_of(height, width, fps):02x}")
    context = av.CodecContext.create("h264", "r")
    (frame,) = context.decode(av.Packet(packed[0].payload)) or context.decode(None)
    colours = frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range
    assert [int(one) for one in colours] == [6, 6, 6, 1]


@settings(max_examples=10, deadline=None)
@given(height=st.integers(2, 33), width=st.integers(2, 33))
def test_odd_sizes_repeat_an_edge(height: int, width: int):
    packed = make_encoder("h264", 90, height, width, 20.0).encode(scene(1, height, width))
    (frame,) = decoded([packed.payload])
    assert frame.shape == (height + height % 2, width + width % 2, 3)
    assert psnr(frame[:height, :width], scene(1, height, width)) > 20


@pytest.mark.parametrize("codec", ["jpeg", "h264"])
def test_the_decoder_undoes_the_encoder(codec: Codec):
    encoder, decoder = make_encoder(codec, 95, 64, 48, 20.0), Decoder()
    for index in range(6):
        packed = encoder.encode(scene(index))
        assert psnr(decoder.decode(packed.payload, codec, packed.key), scene(index)) > 30
    with pytest.raises(ValueError):
        Decoder().decode(encoder.encode(scene(6)).payload[:30], codec, key=codec == "jpeg")
