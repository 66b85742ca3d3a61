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
    codec_string,
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
    encoder = H264Encoder(64, 48)
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
    encoder = H264Encoder(64, 48)
    for index in range(5):
        encoder.encode(scene(index))
    encoder.restart()
    packed = [encoder.encode(scene(index)) for index in range(20, 23)]
    assert [one.key for one in packed] == [True, False, False]
    assert packed[0].config == codec_string(packed[0].payload)
    frames = decoded([one.payload for one in packed])
    assert min(psnr(frame, scene(20 + index)) for index, frame in enumerate(frames)) > 30


def test_key_frames_come_by_themselves():
    encoder = H264Encoder(16, 16)
    keys = [encoder.encode(scene(0, 16, 16)).key for _ in range(2 * KEY_INTERVAL + 1)]
    assert [index for index, key in enumerate(keys) if key] == [0, KEY_INTERVAL, 2 * KEY_INTERVAL]


def test_the_codec_string_names_the_baseline_profile():
    config = H264Encoder(64, 64).encode(scene(0, 64, 64)).config
    assert config is not None and config.startswith("avc1.42c0") and len(config) == 11
    with pytest.raises(ValueError, match="no sequence parameter set"):
        codec_string(b"\0\0\1\x65abc")


@settings(max_examples=10, deadline=None)
@given(height=st.integers(2, 33), width=st.integers(2, 33))
def test_odd_sizes_repeat_an_edge(height: int, width: int):
    packed = make_encoder("h264", 90, height, width).encode(scene(1, height, width))
    (frame,) = decoded([packed.payload])
    assert frame.shape == (height + height % 2, width + width % 2, 3)
    assert psnr(frame[:height, :width], scene(1, height, width)) > 20


@pytest.mark.parametrize("codec", ["jpeg", "h264"])
def test_the_decoder_undoes_the_encoder(codec: Codec):
    encoder, decoder = make_encoder(codec, 95, 64, 48), Decoder()
    for index in range(6):
        packed = encoder.encode(scene(index))
        assert psnr(decoder.decode(packed.payload, codec, packed.key), scene(index)) > 30
    with pytest.raises(ValueError):
        Decoder().decode(encoder.encode(scene(6)).payload[:30], codec, key=codec == "jpeg")
