"""Image metrics against hand-computed values; the memory score against known predictions."""

import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from scd.data.toy import ToyWorld
from scd.evaluation import image, memory


def test_mse_and_psnr_by_hand():
    true = torch.zeros(2, 3, 16, 16)
    predicted = torch.zeros(2, 3, 16, 16)
    predicted[0] += 0.2  # every pixel off by 0.2 of a range of 2: error 0.04, 10 log10(4 / .04)
    predicted[1, :, :8] += 0.2  # half of them: 3.01 dB more
    error = image.mse(predicted, true)
    assert error.tolist() == pytest.approx([0.04, 0.02])
    assert image.psnr_of(error).tolist() == pytest.approx([20.0, 20 + 10 * math.log10(2)])


def test_range_two_on_signed_pixels_is_range_one_on_unit_pixels():
    generator = torch.Generator().manual_seed(0)
    true, predicted = torch.rand(2, 4, 3, 16, 16, generator=generator)
    unit = 10 * torch.log10(1 / (predicted - true).square().mean(dim=(1, 2, 3)))
    signed = image.psnr_of(image.mse(predicted * 2 - 1, true * 2 - 1))
    torch.testing.assert_close(signed, unit)


def test_the_two_psnr_differ_by_name():
    true = torch.zeros(2, 3, 16, 16)
    predicted = torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.02)])
    found = image.estimates(image.frame_values(predicted, true))
    assert found["psnr_per_frame"].mean == pytest.approx((20 + 40) / 2)
    assert found["psnr"].mean == pytest.approx(10 * math.log10(4 / ((0.04 + 0.0004) / 2)))


def test_identical_frames_get_the_ideal_values():
    frames = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, ideal in {"mse": 0.0, "psnr": image.MAX_PSNR, "ssim": 1.0}.items():
        found = image.estimates(image.frame_values(frames, frames))[name]
        assert (found.mean, found.ci_low, found.ci_high) == pytest.approx((ideal,) * 3)


def test_ssim_by_hand():
    # Constant pictures have no variance: SSIM = (2 a b + c1) / (a^2 + b^2 + c1) of their means in
    # [0, 1], c1 = .01^2. Pixels of 0.5 and -0.5 have the means 0.75 and 0.25.
    a, b, c1 = 0.75, 0.25, 0.01**2
    found = image.ssim(torch.full((1, 3, 11, 13), 0.5), torch.full((1, 3, 11, 13), -0.5))
    assert found.item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-5)


def test_ssim_is_that_of_unit_pixels():
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(4, 3, 16, 23, generator=generator)
    predicted = (true + 0.3 * torch.rand(true.shape, generator=generator)).clamp(0, 1)
    # Flat ones, nearly alike, whose variances are differences of nearly equal numbers.
    true[0], predicted[0] = 0.3, 0.30001
    expected = structural_similarity_index_measure(
        predicted.double(), true.double(), data_range=1.0, reduction="none"
    )
    found = image.ssim(predicted * 2 - 1, true * 2 - 1)
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-6)


def test_frames_smaller_than_the_window_have_no_ssim():
    frames = torch.zeros(2, 3, 10, 32)
    with pytest.raises(ValueError, match="at least 11x11, got 10x32"):
        image.ssim(frames, frames)
    assert set(image.frame_values(frames, frames)) == {"mse", "psnr_per_frame"}


def test_interval_covers_the_mean_as_normal_theory_says():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 3 + 5
    found = image.bootstrap(values, seed=2)
    half = 1.96 * values.std().item() / 20
    assert found.mean == pytest.approx(values.mean().item(), abs=1e-5)
    assert found.ci_low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.ci_high == pytest.approx(found.mean + half, abs=0.1 * half)
    assert found == image.bootstrap(values, seed=2)
    assert found != image.bootstrap(values, seed=3)
    with pytest.raises(ValueError, match="at least one clip"):
        image.bootstrap(values[:0])


def test_gain_is_paired():
    # Each clip's error is a tenth of the reference's: 10 dB whichever clips are drawn.
    reference = torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.1
    found = image.psnr_gain(reference / 10, reference)
    assert (found.mean, found.ci_low, found.ci_high) == pytest.approx((10.0,) * 3, abs=1e-4)


@pytest.fixture(scope="module")
def memory_clips() -> memory.MemoryClips:
    return memory.find_memory_clips(ToyWorld(32, "val"), 24, num_given=16, num_predicted=8)


def test_memory_events_are_what_they_say(memory_clips):
    for state, events in zip(memory_clips.states, memory_clips.events, strict=True):
        assert events
        for event in events:
            visible = state.visible[:, event.shape]
            assert event.shape != state.agent
            assert (visible[:16] >= 0.5).any(), "seen among the given frames"
            assert visible[event.last_seen] >= 0.5 and visible[event.frame] >= 0.5
            assert (visible[event.last_seen + 1 : event.frame] < 0.5).all()
            assert event.frame >= 16 and visible[15 : event.frame].min() == 0


def test_memory_score_of_known_predictions(memory_clips):
    true = memory_clips.batch.frames
    after = true[:, 16:]

    def score(predicted):
        return memory.memory_score(memory.memory_counts(predicted, memory_clips)).mean

    assert score(after) == 1
    assert score(true[:, 15:16].expand_as(after)) == 0, "repeating the last given frame"
    assert score(after[:, :, [1, 2, 0]]) == 0, "colours exchanged"
    assert score(after.roll(2, -1)) == 1, "two pixels off"
    assert score(after.roll(4, -1)) < 0.05, "four pixels off"
    assert score(after.roll(1, 0)) < 0.1, "another clip's frames"
    noise = torch.rand(after.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert score(noise) == 0, "noise"
    assert score(after + 0.3 * noise) == 1, "a little noise"
    red = torch.tensor([0.8, -0.5, -0.6])[:, None, None].expand_as(after)
    assert score(red) == 0, "a tint over everything"


def test_memory_score_counts_events_and_has_an_interval(memory_clips):
    true = memory_clips.batch.frames
    half = torch.cat([true[:12, 16:], true[12:, 15:16].expand(-1, 8, -1, -1, -1)])
    counts = memory.memory_counts(half, memory_clips)
    found = memory.memory_score(counts)
    kept = sum(len(events) for events in memory_clips.events[:12])
    assert counts[:, 1].tolist() == [len(events) for events in memory_clips.events]
    assert found.mean == pytest.approx(kept / counts[:, 1].sum().item())
    assert 0.2 < found.ci_low < found.mean < found.ci_high < 0.8


def test_too_few_events_are_an_error(monkeypatch):
    monkeypatch.setattr(memory, "MAX_SEARCHED", 3)
    with pytest.raises(ValueError, match="2 predicted frames there are 0 in 3 episodes"):
        memory.find_memory_clips(ToyWorld(32, "val"), 4, num_given=4, num_predicted=2)
