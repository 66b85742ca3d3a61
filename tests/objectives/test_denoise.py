"""The denoising objective: what is averaged, what learns, what repeats."""

import pytest
import torch

from scd.models.flow import CLEAN_TIME
from scd.objectives.config import DenoiseConfig
from scd.objectives.denoise import validation_loss, velocity_loss
from tests.tiny import denoising_loss as denoise
from tests.tiny import random_clips, tiny_dense, tiny_separable

PLAIN = DenoiseConfig(context_noise=0.0, condition_dropout=0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_loss_is_averaged_over_frames_that_are_not_given():
    velocity = torch.zeros(2, 1, 3, 1, 1, 1)
    target = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).view(2, 1, 3, 1, 1, 1)
    given = torch.tensor([[[True, False, False]], [[False, False, True]]])
    by_hand = ((4 + 9) / 2 + (16 + 25) / 2) / 2
    assert velocity_loss(velocity, target, given).item() == pytest.approx(by_hand, rel=1e-6)


def test_a_fresh_model_has_the_loss_of_predicting_zero():
    """Its output is 0, so the loss is E|noise - clean|^2 = 1 + 1 on unit latents."""
    model = tiny_separable(amount=0.0)
    clean, _, _, conditions = random_clips(model, batch=16, num_frames=8)
    loss, _ = denoise(model, clean, conditions, PLAIN, generator())
    assert loss.item() == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("join", ["token_concat", "channel_concat", "add", "prefix"])
def test_it_learns_one_batch(join):
    model = tiny_separable(join, predict="clean", amount=0.0).train()
    clean, _, _, conditions = random_clips(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    losses = []
    for step in range(60):
        loss, _ = denoise(model, clean, conditions, PLAIN, generator(step % 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
def test_gradient_reaches_every_parameter(make):
    model = make().train()
    clean, _, _, conditions = random_clips(model)
    # Half of the actions hidden, so that the null row is used too.
    config = DenoiseConfig(context_noise=0.0, condition_dropout=0.5)
    loss, _ = denoise(model, clean, conditions, config, generator())
    loss.backward()
    idle = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    # The dense model's last block only gives keys and values of clean frames, but the noisy
    # frames go all the way; so nothing is idle in either.
    assert idle == []


def test_the_generator_decides_everything():
    model = tiny_separable()
    clean, _, _, conditions = random_clips(model)
    config = DenoiseConfig()
    first, again, other = (
        denoise(model, clean, conditions, config, generator(seed))[0].item() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_context_noise_reaches_the_decoder_and_grows_with_its_strength():
    model = tiny_separable()
    clean, _, _, conditions = random_clips(model)
    losses = [
        denoise(
            model,
            clean,
            conditions,
            DenoiseConfig(context_noise=strength, condition_dropout=0.0),
            generator(),
        )[0].item()
        for strength in (0.0, 1e-3, 1.0)
    ]
    small, large = (abs(loss - losses[0]) for loss in losses[1:])
    assert 0 < 20 * small < large


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
def test_noisy_history_gives_clean_frames_time_and_no_loss(make):
    model = make()
    clean, _, _, conditions = random_clips(model, batch=4, num_frames=8)
    seen = {}

    def spy(history, noisy, time, conditions, augment):
        seen.update(history=history, noisy=noisy, time=time)
        return model(history, noisy, time, conditions, augment)

    config = DenoiseConfig(history="noisy", clean_fraction=0.5, context_noise=0.0)
    loss, _ = denoise(spy, clean, conditions, config, generator())
    given = seen["time"] == CLEAN_TIME
    assert seen["history"] is None and loss.isfinite()
    assert 0.3 < given.float().mean() < 0.7
    expected = clean[:, None].expand_as(seen["noisy"])[given]
    assert torch.equal(seen["noisy"][given], expected)


def test_a_given_first_frame_is_never_a_target():
    model = tiny_separable(start_frame=False)
    clean, _, _, conditions = random_clips(model)
    for config in (PLAIN, DenoiseConfig(history="noisy", context_noise=0.0)):
        loss, _ = denoise(model, clean, conditions, config, generator(), needs_first_frame=True)
        assert loss.isfinite()
    with pytest.raises(ValueError, match="needed clips"):
        denoise(
            model,
            clean,
            conditions,
            DenoiseConfig(num_target_frames=5),
            generator(),
            needs_first_frame=True,
        )


def test_only_the_last_frames_are_denoised_if_asked():
    model = tiny_separable()
    clean, _, _, conditions = random_clips(model)
    seen = {}

    def spy(clean, noisy, *rest):
        seen["shape"] = noisy.shape
        return model(clean, noisy, *rest)

    denoise(spy, clean, conditions, DenoiseConfig(num_target_frames=2), generator())
    assert seen["shape"][:3] == (2, 2, 2)


def test_history_noise_touches_the_history_only():
    model = tiny_separable()
    clean, _, _, conditions = random_clips(model, batch=64)
    seen = {}

    def spy(history, noisy, time, conditions, augment):
        seen.update(history=history)
        return torch.zeros_like(noisy)

    plain, _ = denoise(spy, clean, conditions, PLAIN, generator())
    assert torch.equal(seen["history"], clean)
    config = DenoiseConfig(context_noise=0.0, condition_dropout=0.0, history_noise=0.5)
    noisy, _ = denoise(spy, clean, conditions, config, generator())
    # Same draws of time and noise before it, so the same target.
    assert noisy.item() == plain.item()
    deviations = (seen["history"] - clean).flatten(2).std(-1)
    assert deviations.max() < 0.65 and deviations.std() > 0.1


def test_validation_uses_the_same_noise_each_time():
    model = tiny_separable()
    clean, _, _, conditions = random_clips(model)
    first = validation_loss(model, clean, conditions, (0.2, 0.8), seed=0)
    assert first == validation_loss(model, clean, conditions, (0.2, 0.8), seed=0)
    assert set(first) == {"loss_at_0.2", "loss_at_0.8", "loss"}
    assert first["loss"] == pytest.approx((first["loss_at_0.2"] + first["loss_at_0.8"]) / 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_draws": 0},
        {"condition_dropout": 1.0},
        {"clean_fraction": 0.1},
        {"context_noise": -0.1},
        {"history_noise": -0.1},
        {"history": "noisy", "history_noise": 0.1},
        {"time_std": 0.0},
    ],
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        DenoiseConfig(**wrong)
