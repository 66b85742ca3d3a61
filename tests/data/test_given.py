"""Frames and numbers as people hand them in: what is wrong is said with the call that cures it."""

import numpy as np
import pytest
import torch

import scd
from scd.data.clip import Conditions
from scd.data.given import as_frames, as_ids, as_whole

PIXELS = torch.randint(
    0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
FRAMES = PIXELS.float() / 127.5 - 1
WRONG = {
    "8-bit": PIXELS,
    "8-bit, channels last": PIXELS.movedim(2, -1),
    "int64": PIXELS.long(),
    "uint16 array": PIXELS.numpy().astype(np.uint16),
    "0 .. 255 as floats": PIXELS.float(),
    "0 .. 255 as floats, channels last": PIXELS.movedim(2, -1).float(),
    "channels last": FRAMES.movedim(2, -1),
    "half precision, channels last": FRAMES.half().movedim(2, -1),
    "8-bit array": PIXELS.numpy(),
    "8-bit array, channels last": PIXELS.movedim(2, -1).numpy(),
    "array, channels last": FRAMES.movedim(2, -1).numpy(),
}


@pytest.mark.parametrize("frames", WRONG.values(), ids=WRONG)
def test_the_message_says_range_and_type_and_a_call_that_converts_them(frames):
    with pytest.raises(
        ValueError, match=r"\[streams, frames, 3, rows, columns\] in \[-1, 1\]"
    ) as no:
        as_frames(frames, "streams, frames", (4, 6))
    said, _, call = str(no.value).partition(": convert them by ")
    assert f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)} in " in said
    converted = eval(call, {"scd": scd, "np": np, "frames": frames})
    close = as_frames(converted, "streams, frames", (4, 6))
    torch.testing.assert_close(close, FRAMES, atol=1e-3, rtol=0)


@pytest.mark.parametrize("missing", [1, 2])
def test_axes_in_front_are_put_there_by_the_call(missing):
    frames = FRAMES[(0,) * missing].numpy().astype(np.float64)
    with pytest.raises(ValueError, match="convert them by ") as no:
        as_frames(frames, "streams, frames", (4, 6))
    converted = eval(str(no.value).partition("convert them by ")[2], {"frames": frames})
    taken = as_frames(converted, "streams, frames", (4, 6))
    assert taken.dtype == torch.float32 and taken.shape[:2] == (1, 5 if missing == 1 else 1)


def test_what_a_change_of_size_leaves_is_clipped_by_the_call():
    beyond = FRAMES * 1.2
    with pytest.raises(ValueError, match=r"in -1.2 .. 1.2: convert them by frames.clip\(-1, 1\)"):
        as_frames(beyond, "streams, frames", (4, 6))
    as_frames(beyond.clip(-1, 1), "streams, frames", (4, 6))
    # Rounding is not worth a word.
    assert torch.equal(as_frames(FRAMES * 1.005, "streams, frames", (4, 6)), FRAMES * 1.005)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (FRAMES.new_full((2, 5, 3, 4, 6), float("nan")), "NaN or infinity among them"),
        (torch.where(FRAMES > 0.9, float("inf"), FRAMES), "NaN or infinity among them"),
        (torch.where(FRAMES > 0.9, float("-inf"), FRAMES), "NaN or infinity among them"),
        (PIXELS > 3, "got bool"),
        (PIXELS.long() - 300, r"got int64 .* in -300 \.\. -45$"),
        (FRAMES.to(torch.complex64), "got complex64"),
        (FRAMES[:, :, :1], r"got float32 \[2, 5, 1, 4, 6\]$"),
        (FRAMES[None], r"got float32 \[1, 2, 5, 3, 4, 6\]$"),
        (FRAMES[0, 0, 0], r"got float32 \[4, 6\]$"),
        (FRAMES[..., :4], "frames must be 4x6, got 4x4"),
        (np.array(["a"]), "floats or 8-bit pixels, got <U1"),
        ([1.0], "got list"),
        ("a clip", "got str 'a clip'"),
    ],
)
def test_what_no_call_converts_is_said_too(frames, words):
    with pytest.raises(ValueError, match=words):
        as_frames(frames, "streams, frames", (4, 6))


@pytest.mark.parametrize(
    "value", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3), torch.tensor(3).byte()]
)
def test_whole_numbers_are_of_any_type(value):
    assert as_whole(value, "n") == 3 and type(as_whole(value, "n")) is int


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), 3.0, "3", None, np.array([3]), [3]]
)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="n must be a whole number, got"):
        as_whole(value, "n")
    with pytest.raises(ValueError, match="n must be 4 or more, got 3"):
        as_whole(3, "n", 4)


def test_ids_become_int64_and_truth_values_are_none():
    ids = torch.tensor([[0, 1, 2]])
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        conditions = Conditions(actions=ids.to(kind), labels=ids[0, :1].to(kind))
        for found, wanted in ((conditions.actions, ids), (conditions.labels, ids[0, :1])):
            assert found is not None and found.dtype == torch.int64 and torch.equal(found, wanted)
    assert as_ids(np.arange(3, dtype=np.uint16), "ids").tolist() == [0, 1, 2]
    assert as_ids(torch.zeros(2, 3), "vectors").dtype == torch.float32
    for wrong in (ids > 0, [1]):
        with pytest.raises(ValueError, match="a tensor of integers or floats, got"):
            as_ids(wrong, "ids")
    with pytest.raises(
        ValueError, match=r"8-bit pixels \[..., rows, columns, 3\], got torch.float"
    ):
        scd.pixels_to_frames(FRAMES)
