"""Students against scores and discriminators: formulas by hand, what each network sees."""

from dataclasses import replace

import pytest
import torch

from scd.models.flow import clean_from_velocity
from scd.objectives.config import MatchConfig
from scd.objectives.discriminator import (
    Discriminator,
    discriminator_gan_loss,
    discriminator_loss,
    roughness,
    student_gan_loss,
)
from scd.objectives.distribution_matching import (
    Noised,
    Rolled,
    critic_loss,
    dmd_gradient,
    dmd_loss,
    noised,
    score_loss,
)
from tests.tiny import random_clips, tiny_dense, tiny_separable

CONFIG = MatchConfig(num_draws=2)
WINDOW = 4


@pytest.fixture(params=["joint", "prefix", "dense"])
def model(request):
    if request.param == "dense":
        return tiny_dense()
    return tiny_separable("prefix" if request.param == "prefix" else "token_concat")


def rolled(model, seed=0, num_scored=2, requires_grad=False):
    """A clip of two given and three generated frames, of which the last two are scored."""
    clean, _, _, conditions = random_clips(model, seed=seed)
    generated = clean[:, 2:].clone().requires_grad_(requires_grad)
    return Rolled.of(clean[:, :2], generated, conditions, num_scored, WINDOW), generated


def test_teacher_and_critic_see_the_last_frames_without_gradient(model):
    seen, generated = rolled(model, requires_grad=True)
    clean, _, _, conditions = random_clips(model)
    assert torch.equal(seen.history, clean[:, 1:]) and not seen.history.requires_grad
    assert torch.equal(seen.frames, clean[:, 3:]) and seen.frames.requires_grad
    assert seen.conditions.actions is not None and conditions.actions is not None
    assert torch.equal(seen.conditions.actions, conditions.actions[:, 1:])
    whole = Rolled.of(clean[:, :2], generated, conditions, 2, window=9)
    assert torch.equal(whole.history, clean)


@pytest.mark.parametrize("time_per", ["frame", "clip"])
def test_score_loss_is_dmd_of_the_two_clean_estimates(model, time_per):
    config = replace(CONFIG, time_per=time_per)
    critic = tiny_dense(amount=0.2)
    seen, generated = rolled(model, requires_grad=True)
    loss = score_loss(model, critic, seen, config, torch.Generator())
    drawn = noised(seen.frames, config, torch.Generator())
    assert (drawn.time[..., 0] == drawn.time[..., 1]).all() == (time_per == "clip")
    rows, total = [], 0.0
    with torch.no_grad():
        estimates = [
            clean_from_velocity(
                drawn.noisy, net(seen.history, drawn.noisy, drawn.time, seen.conditions), drawn.time
            )
            for net in (model, critic)
        ]
    for b in range(2):
        for r in range(2):
            parts = [part[b, r] for part in (drawn.frames, *estimates)]
            rows += [parts] if time_per == "clip" else [[p[m] for p in parts] for m in range(2)]
    for frames, real, fake in rows:
        total += dmd_loss(frames[None], dmd_gradient(frames[None], real[None], fake[None]))
    torch.testing.assert_close(loss, total / len(rows))
    (gradient,) = torch.autograd.grad(loss, generated)
    assert gradient[:, 0].abs().max() == 0 and gradient[:, 1:].abs().min() > 0


def test_a_critic_that_agrees_with_the_teacher_pushes_nowhere(model):
    seen, generated = rolled(model, requires_grad=True)
    loss = score_loss(model, model, seen, CONFIG, torch.Generator())
    (gradient,) = torch.autograd.grad(loss, generated)
    assert not gradient.any()


def test_sid_passes_through_both_networks_and_leaves_a_frozen_critic_alone(model):
    config = replace(CONFIG, method="sid")
    critic = tiny_dense(amount=0.2).requires_grad_(False)
    seen, generated = rolled(model, requires_grad=True)
    loss = score_loss(model.requires_grad_(False), critic, seen, config, torch.Generator())
    loss.backward()
    assert generated.grad is not None and generated.grad[:, 1:].abs().max() > 0
    assert all(weight.grad is None for weight in [*critic.parameters(), *model.parameters()])


def test_the_critics_loss_is_the_error_of_its_velocity(model):
    seen, _ = rolled(model)
    loss = critic_loss(model, seen, CONFIG, torch.Generator())
    drawn = noised(seen.frames, CONFIG, torch.Generator())
    assert isinstance(drawn, Noised)
    velocity = model(seen.history, drawn.noisy, drawn.time, seen.conditions)
    expected = (velocity - drawn.noise + drawn.frames).square().mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("method", ["dmd", "gan"])
def test_what_the_critic_learns_falls(model, method):
    critic = Discriminator(model) if method == "gan" else model
    (fake, _), (real, _) = rolled(model), rolled(model, seed=5)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        if method == "gan":
            config = MatchConfig(method="gan")
            loss = discriminator_gan_loss(critic, fake, real, config, torch.Generator())
        else:
            loss = critic_loss(critic, fake, CONFIG, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def judging(model):
    """A discriminator whose heads are off their zeros."""
    judge = Discriminator(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in judge.heads.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return judge


@torch.no_grad()
def test_a_logit_belongs_to_its_own_frame(model):
    judge = judging(model)
    clean, noisy, time, conditions = random_clips(model, num_draws=2)
    before = judge(clean, noisy, time, conditions)
    assert before.shape == (2, 2, 5)
    changed = noisy.clone()
    changed[1, 0, 3] += 1.0
    moved = judge(clean, changed, time, conditions) != before
    assert moved.nonzero().tolist() == [[1, 0, 3]]
    assert not Discriminator(model)(clean, noisy, time, conditions).any()


@pytest.mark.parametrize("relativistic", [False, True])
def test_the_judges_loss_in_one_pass_is_that_in_four(model, relativistic):
    config = MatchConfig(method="gan", relativistic=relativistic, roughness=0.1)
    judge = judging(model)
    (fake, _), (real, _) = rolled(model), rolled(model, seed=5)
    loss = discriminator_gan_loss(judge, fake, real, config, torch.Generator())
    generator = torch.Generator()
    drawn = noised(fake.frames, config, generator)
    move = 0.05 * torch.randn(drawn.noise.shape, generator=generator)
    other = replace(drawn, frames=real.frames[:, None].expand_as(drawn.noise))
    logits = [
        judge(clip.history, noisy, drawn.time, clip.conditions)
        for clip, noisy in (
            (real, other.noisy),
            (fake, drawn.noisy),
            (real, other.noisy + move),
            (fake, drawn.noisy + move),
        )
    ]
    expected = discriminator_loss(logits[0], logits[1], relativistic)
    for side in (0, 1):
        expected = expected + 0.1 * roughness(logits[2 + side], logits[side], 0.05)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relativistic", [False, True])
def test_the_student_is_pushed_by_a_judge_that_tells_the_frames_apart(model, relativistic):
    config = MatchConfig(method="gan", relativistic=relativistic)
    judge = judging(model)
    (fake, generated), (real, _) = rolled(model, requires_grad=True), rolled(model, seed=5)
    loss = student_gan_loss(judge, fake, real, config, torch.Generator())
    (gradient,) = torch.autograd.grad(loss, generated)
    assert gradient[:, 1:].abs().max() > 0 and gradient[:, 0].abs().max() == 0
    step = generated.detach() - 0.1 * gradient / gradient.norm()
    clean, _, _, conditions = random_clips(model)
    after = Rolled.of(clean[:, :2], step, conditions, 2, WINDOW)
    # The history changes as well, so only the scored frames are moved.
    after = replace(after, history=fake.history)
    assert student_gan_loss(judge, after, real, config, torch.Generator()) < loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lowest_time": 0.0}, "rise from lowest_time to highest_time"),
        ({"lowest_time": 0.9, "highest_time": 0.5}, "rise from lowest_time to highest_time"),
        ({"score_shift": 0.0}, "score_shift be above 0"),
        ({"num_critic_updates": 0}, "num_critic_updates must be 1 or more, got 0"),
        ({"guidance": 0.0}, "guidance must be 1 or more"),
        ({"alpha": 0.5}, "alpha=0.5 has no effect on method='dmd'"),
        ({"relativistic": True}, "no effect on method='dmd'"),
        ({"method": "gan", "guidance": 2.0}, "guidance=2.0 has no effect on method='gan'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_how_much_of_a_rollout_is_scored():
    assert CONFIG.num_scored(12, window=16) == 8
    assert replace(CONFIG, num_scored_frames=3).num_scored(40, window=4) == 3
    with pytest.raises(ValueError, match="4 frames, 4 of them given, leave 0 to generate"):
        CONFIG.num_scored(4, window=16)
    with pytest.raises(ValueError, match="36 scored frames .* more than the 16 .* trained on"):
        CONFIG.num_scored(40, window=16)
    with pytest.raises(ValueError, match="leave 8 to generate, of which 9 are to be scored"):
        replace(CONFIG, num_scored_frames=9).num_scored(12, window=16)
